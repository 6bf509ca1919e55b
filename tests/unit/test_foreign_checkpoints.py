"""Folders and files of other kinds than a Hugging Face model: each refusal says what it is and how to go on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from chord_megatron.checkpoints.conversion import hf_to_megatron
from chord_megatron.system.errors import UserError
from chord_megatron.weights.hf_config import parse_config, read_architecture
from chord_megatron.weights.mapping import hf_tensors
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "rms_norm_eps": 1e-6,
    "vocab_size": 16,
    "tie_word_embeddings": False,
}
ARCH = parse_config(CONFIG)
NAMES = list(hf_tensors(ARCH, torch.float32))


def make(folder: Path, *files: str, config: bool = False) -> Path:
    folder.mkdir(exist_ok=True)
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    if config:
        (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def refusal_of(folder: Path) -> str:
    """What training and conversion say of a model folder."""
    with pytest.raises(UserError) as error:
        arch = read_architecture(folder)
        with SafetensorsReader(folder) as reader:
            check_complete(reader, arch)
    return str(error.value)


# Files of a folder -> what the sentence says.
FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "PEFT adapter": (
        ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
        "is a PEFT adapter, not a model; load it with its base model, merge_and_unload(), and save that by "
        "save_pretrained",
    ),
    "pickles": (
        ("pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"),
        "has pickled weights (pytorch_model-00001-of-00002.bin), which could run code; load it with transformers and "
        "save it by save_pretrained, which writes safetensors",
    ),
    "GGUF": (
        ("model-Q4_K_M.gguf",),
        "has GGUF weights (model-Q4_K_M.gguf), which are for inference; give the Hugging Face folder that they were "
        "made from",
    ),
    "Meta's format": (
        ("consolidated.00.pth", "params.json", "tokenizer.model"),
        "has weights in their author's own format (consolidated.00.pth); give the Hugging Face folder of the model",
    ),
    "Mistral's format": (
        ("consolidated.safetensors", "params.json"),
        "has weights in their author's own format (consolidated.safetensors); give the Hugging Face folder",
    ),
    "Megatron-LM": (
        ("latest_checkpointed_iteration.txt", "iter_0000007/.metadata"),
        "is a folder of Megatron-LM; run `chord-megatron convert megatron-to-hf` on it",
    ),
    "Megatron-LM's old format": (
        ("mp_rank_00/model_optim_rng.pt",),
        "is a folder of Megatron-LM; run `chord-megatron convert megatron-to-hf` on it",
    ),
    "cache of a download": (
        ("snapshots/0123abc/config.json", "refs/main"),
        "is the cache of a download; give the folder below its snapshots/",
    ),
    "checkpoints of a trainer": (
        ("checkpoint-500/config.json",),
        "holds folders of checkpoints (checkpoint-500); give one of them",
    ),
    "a run": (
        ("config.yaml", "hf/step_5/config.json", "checkpoints/latest"),
        "is the folder of a run; give one of its exports, hf/step_N",
    ),
    "shards without an index": (
        ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"),
        "has shards without model.safetensors.index.json; download that file, too",
    ),
    "another name": (
        ("weights.safetensors",),
        "has safetensors under other names (weights.safetensors); save the model with save_pretrained",
    ),
}


@pytest.mark.parametrize("with_config", [False, True], ids=["no config", "with a config"])
@pytest.mark.parametrize("kind", FOLDERS)
def test_folders_of_other_kinds_are_told_apart(tmp_path: Path, kind: str, with_config: bool) -> None:
    files, message = FOLDERS[kind]
    text = refusal_of(make(tmp_path / "model", *files, config=with_config))
    assert text.startswith(str(tmp_path / "model")) and message in text
    assert "download it again" not in text


def test_an_adapter_beside_its_base_model_is_not_passed_over(tmp_path: Path) -> None:
    """transformers would apply it."""
    folder = make(tmp_path / "model", "adapter_config.json", config=True)
    write(folder, NAMES)
    assert "is a PEFT adapter, not a model" in refusal_of(folder)


def test_a_name_of_the_hub_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="Qwen/Qwen3-8B is not a directory") as error:
        read_architecture(Path("Qwen/Qwen3-8B"))
    assert str(error.value) == (
        f"the model folder Qwen/Qwen3-8B is not a directory (looked for at {tmp_path}/Qwen/Qwen3-8B); download the "
        "model and give the folder that holds its config.json."
    )


def test_an_old_megatron_folder_names_the_way(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder of Megatron-LM; run `chord-megatron convert megatron-to-hf`"):
        hf_to_megatron(make(tmp_path / "source", "mp_rank_00/model_optim_rng.pt"), tmp_path / "target")


def write(folder: Path, names: Iterable[str]) -> None:
    specs = hf_tensors(ARCH, torch.float32)
    plain = torch.zeros(2)
    tensors = {name: torch.zeros(specs[name].shape) if name in specs else plain.clone() for name in names}
    save_file(tensors, folder / "model.safetensors")


QUANTIZED = "use the unquantized checkpoint"
ADAPTER = "merge the adapter with merge_and_unload() and save that model by save_pretrained"


def prefixed(prefix: str) -> list[str]:
    return [prefix + name for name in NAMES]


# Names of tensors -> what the sentence says.
TENSORS: dict[str, tuple[list[str], str]] = {
    "PEFT": (prefixed("base_model.model."), ADAPTER),
    "LoRA": ([*NAMES, "model.layers.0.self_attn.q_proj.lora_A.weight"], ADAPTER),
    "LoRA's base": (
        [name.replace("q_proj.weight", "q_proj.base_layer.weight") for name in NAMES],
        ADAPTER,
    ),
    "DDP": (prefixed("module."), "every name of the model begins with `module.`, a wrapper's; save the model in it"),
    "torch.compile": (
        prefixed("_orig_mod."),
        "every name of the model begins with `_orig_mod.`, a wrapper's; save the model in it",
    ),
    "FSDP": (
        prefixed("_fsdp_wrapped_module."),
        "every name of the model begins with `_fsdp_wrapped_module.`, a wrapper's",
    ),
    "a value head": (
        [*prefixed("pretrained_model."), "v_head.summary.weight"],
        "every name of the model begins with `pretrained_model.`, a wrapper's",
    ),
    "vision and language": (
        [*(name.replace("model.", "model.language_model.", 1) for name in NAMES), "model.visual.blocks.0.weight"],
        "the names begin with `model.language_model.`: this is the language model inside of another; save it alone",
    ),
    "vision and language, as transformers 4 wrote it": (
        [*prefixed("language_model."), "vision_tower.blocks.0.weight"],
        "the names begin with `language_model.`: this is the language model inside of another; save it alone",
    ),
    "without a head": (
        [name.removeprefix("model.") for name in NAMES if name != "lm_head.weight"],
        "the names lack `model.`: it was saved without its head; save AutoModelForCausalLM, not AutoModel",
    ),
    "only the head is missing": (
        [name for name in NAMES if name != "lm_head.weight"],
        "lacks lm_head.weight; set tie_word_embeddings: true in config.json if the embedding is the head, or save the "
        "model with its head",
    ),
    "GPTQ": ([name.replace("proj.weight", "proj.qweight") for name in NAMES], QUANTIZED),
    "AWQ": (
        [*(n.replace("proj.weight", "proj.qweight") for n in NAMES), "model.layers.0.mlp.up_proj.qzeros"],
        QUANTIZED,
    ),
    "bitsandbytes, 4 bits": ([*NAMES, "model.layers.0.mlp.up_proj.weight.absmax"], QUANTIZED),
    "bitsandbytes, 8 bits": ([*NAMES, "model.layers.0.mlp.up_proj.SCB"], QUANTIZED),
    "compressed": ([name.replace("proj.weight", "proj.weight_packed") for name in NAMES], QUANTIZED),
    "FP8": ([*NAMES, "model.layers.0.mlp.up_proj.weight_scale_inv"], QUANTIZED),
    "Meta's names": (
        ["tok_embeddings.weight", "layers.0.attention.wq.weight"],
        "these are Meta's or Mistral's own names; give the Hugging Face folder of the model",
    ),
    "Megatron's names": (
        ["embedding.word_embeddings.weight", "decoder.layers.0.self_attention.linear_qkv.weight"],
        "these are Megatron's names; export the model as a Hugging Face folder",
    ),
    "a layer too few": (
        [name for name in NAMES if ".1." not in name],
        "lacks tensors of a llama model: model.layers.1.input_layernorm.weight",
    ),
    "a layer too many": (
        [*NAMES, "model.layers.2.mlp.up_proj.weight"],
        "has tensors that a llama model does not: model.layers.2.mlp.up_proj.weight (1); use the config.json that",
    ),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_under_other_names_get_the_remedy_that_fits(tmp_path: Path, kind: str) -> None:
    names, message = TENSORS[kind]
    folder = make(tmp_path / "model", config=True)
    write(folder, names)
    text = refusal_of(folder)
    assert message in text and len(text) < 1500
    assert ("download it again" in text) == (kind == "a layer too few")


def test_numbers_that_are_no_weights_are_refused(tmp_path: Path) -> None:
    """Integers under the names of weights are a quantized model's."""
    folder = make(tmp_path / "model", config=True)
    tensors = {name: torch.zeros(spec.shape) for name, spec in hf_tensors(ARCH, torch.float32).items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors")
    assert refusal_of(folder) == (
        "model.layers.0.mlp.up_proj.weight (1) hold int8 numbers, which are no weights; use the unquantized checkpoint"
    )
