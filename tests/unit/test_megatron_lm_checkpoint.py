"""A checkpoint that Megatron-LM core_v0.16.1 wrote itself: read without a config.json, and compared with one.

tests/data/megatron_lm_0161_llama.tar.gz: local layers, two of them, 19 tokens for NullTokenizer, which adds one.
Its tensors hold consecutive integers in the order of the sorted Hugging Face names.
"""

from __future__ import annotations

import argparse
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from chord_megatron.checkpoints.conversion import megatron_to_hf
from chord_megatron.checkpoints.megatron_args import read_megatron_args
from chord_megatron.system.errors import UserError

ARCHIVE = Path(__file__).parents[1] / "data" / "megatron_lm_0161_llama.tar.gz"
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "num_hidden_layers": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "vocab_size": 20,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "rope_theta": 500000.0,
    "rope_scaling": None,
    "head_dim": 4,
    "torch_dtype": "float32",
}
SHAPES = {
    "lm_head.weight": (20, 16),
    "model.embed_tokens.weight": (20, 16),
    "model.norm.weight": (16,),
    **{
        f"model.layers.{layer}.{name}.weight": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm": (16,),
            "mlp.down_proj": (16, 24),
            "mlp.gate_proj": (24, 16),
            "mlp.up_proj": (24, 16),
            "post_attention_layernorm": (16,),
            "self_attn.k_proj": (8, 16),
            "self_attn.o_proj": (16, 16),
            "self_attn.q_proj": (16, 16),
            "self_attn.v_proj": (8, 16),
        }.items()
    },
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The folder above the iterations, as `--save` named it."""
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path / "written", filter="data")
    return tmp_path / "written" / "llama_s"


def config(tmp_path: Path, **changes: Any) -> Path:
    folder = tmp_path / "config"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    return folder


def replace_args(source: Path, **changes: Any) -> None:
    """The same checkpoint, told to be trained with other arguments."""
    checkpoint = source / "iter_0000007"
    args = read_megatron_args(checkpoint)
    assert args is not None
    plain = {name: value for name, value in args.items() if isinstance(value, str | int | float | list | None)}
    torch.save({"args": argparse.Namespace(**plain | changes)}, checkpoint / "common.pt")


def assert_consecutive_integers(directory: Path) -> None:
    tensors, start = load_file(directory / "model.safetensors"), 0
    assert tensors.keys() == SHAPES.keys()
    for name in sorted(SHAPES):
        count = torch.Size(SHAPES[name]).numel()
        expected = torch.arange(start, start + count, dtype=torch.float32).view(SHAPES[name])
        assert torch.equal(tensors[name], expected), name
        start += count


def test_without_a_config_its_arguments_make_one(source: Path, tmp_path: Path):
    megatron_to_hf(source, tmp_path / "hf", verify=True)
    assert_consecutive_integers(tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == CONFIG


def test_with_the_config_of_the_model(source: Path, tmp_path: Path):
    megatron_to_hf(source, tmp_path / "hf", hf_config=config(tmp_path))
    assert_consecutive_integers(tmp_path / "hf")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rms_norm_eps": 1e-5}, "layernorm_epsilon=1e-06 where config.json says rms_norm_eps=1e-05"),
        ({"rope_theta": 1e4}, "rotary_base=500000 where config.json says rope_theta=10000.0"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "use_rope_scaling=False, rope_scaling_factor=8.0, rotary_seq_len_interpolation_factor=None "
            "where config.json says rope_scaling={'rope_type': 'linear', 'factor': 2.0}",
        ),
        (
            {"tie_word_embeddings": True},
            "untie_embeddings_and_output_weights=True where config.json says tie_word_embeddings=True",
        ),
        ({"vocab_size": 18}, "vocab_size=19 where config.json says vocab_size=18"),
        (
            {"num_attention_heads": 8, "head_dim": 2, "num_key_value_heads": 4},
            "num_attention_heads=4 where config.json says num_attention_heads=8, group_query_attention=True, "
            "num_query_groups=2 where config.json says num_key_value_heads=4, "
            "kv_channels=4 where config.json says head_dim=2",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_config_that_contradicts_the_arguments_is_refused(
    source: Path, tmp_path: Path, change: dict[str, Any], said: str
):
    with pytest.raises(UserError) as error:
        megatron_to_hf(source, tmp_path / "hf", hf_config=config(tmp_path, **change))
    assert str(error.value) == (
        f"the checkpoint was trained with {said}; use the config.json that belongs to these weights"
    )
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("changes", [{"max_position_embeddings": 4096}, {"vocab_size": 19}, {"vocab_size": 128}])
def test_a_config_may_say_another_length_and_more_or_less_padding(
    source: Path, tmp_path: Path, changes: dict[str, Any]
):
    """The vocabulary without NullTokenizer's token, or with rows that Megatron-LM padded."""
    megatron_to_hf(source, tmp_path / "hf", hf_config=config(tmp_path, **changes))
    rows = changes.get("vocab_size", 20)
    assert load_file(tmp_path / "hf" / "model.safetensors")["lm_head.weight"].shape == (rows, 16)


@pytest.mark.parametrize("with_config", [True, False], ids=["with a config", "without"])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("layernorm_zero_centered_gamma", True),
        ("rotary_interleaved", True),
        ("rotary_percent", 0.5),
        ("qk_l2_norm", True),
        ("no_rope_freq", 4),
        ("glu_linear_offset", 1.0),
    ],
)
def test_what_no_family_has_is_refused(source: Path, tmp_path: Path, name: str, value: Any, with_config: bool):
    replace_args(source, **{name: value})
    with pytest.raises(UserError) as error:
        megatron_to_hf(source, tmp_path / "hf", hf_config=config(tmp_path) if with_config else None)
    assert str(error.value) == (f"the checkpoint was trained with {name}={value}, which no supported model family has")


def test_a_missing_argument_is_named(source: Path, tmp_path: Path):
    checkpoint = source / "iter_0000007"
    torch.save({"args": argparse.Namespace(num_layers=2, vocab_size=20)}, checkpoint / "common.pt")
    with pytest.raises(UserError) as error:
        megatron_to_hf(source, tmp_path / "hf")
    assert str(error.value) == (
        "the checkpoint's arguments do not say hidden_size; name a folder with the model's config.json by --hf-config"
    )
    megatron_to_hf(source, tmp_path / "hf", hf_config=config(tmp_path))  # what they say does not contradict it
    assert_consecutive_integers(tmp_path / "hf")
