"""`chord-megatron convert` on real runs: a checkpoint becomes its export, a run starts from a converted model."""

from __future__ import annotations

import argparse
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import Result
from harness import read_metrics, succeeded, train_here, weights, write_config
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.cli import convert as cli_convert
from chord_megatron.weights.hf_config import read_architecture

pytestmark = pytest.mark.e2e

LINE = r"wrote {}: 0\.00 GB in \d+\.\d s \(\d+\.\d\d GB/s\)\n"
CHECK = r"verified: {} tensors, 0\.00 GB, read back from disk bitwise equal; crc32 ([0-9a-f]{{8}}) of {}, \1 of {}\n"
LOG_PROBS = r"log-probs against transformers: largest difference (\d\.\de-\d\d|0\.0e\+00)\n"


def convert(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["convert", *map(str, arguments)])


@pytest.fixture(scope="module")
def model(assets: Path) -> Path:
    return assets / "model"


@pytest.fixture(scope="module")
def megatron(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("converted") / "megatron"
    result = convert("hf-to-megatron", model, target, "--verify")
    assert result.exit_code == 0, result.output
    expected = LINE.format(target) + CHECK.format(25, model, target) + LOG_PROBS
    assert re.fullmatch(expected, result.stdout), result.stdout
    assert result.stderr == ""
    return target


def test_there_and_back(model: Path, megatron: Path, tmp_path: Path):
    target = tmp_path / "hf"
    result = convert("megatron-to-hf", megatron, target, "--verify", "--max-shard-size", "40kB")
    assert result.exit_code == 0, result.output
    assert re.fullmatch(LINE.format(target) + CHECK.format(19, megatron, target) + LOG_PROBS, result.stdout)
    shards = {name: tensor for path in target.glob("*.safetensors") for name, tensor in load_file(path).items()}
    assert len(list(target.glob("*.safetensors"))) > 1
    expected = load_file(model / "model.safetensors")
    assert shards.keys() == expected.keys()
    assert all(torch.equal(shards[name], tensor) for name, tensor in expected.items())
    others = {path.name: path.read_bytes() for path in target.iterdir() if "model" not in path.name}
    assert others == {name: (model / name).read_bytes() for name in others}
    assert {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"} <= others.keys()


def test_a_run_starts_from_a_converted_model(assets: Path, megatron: Path, tmp_path: Path):
    metrics = []
    for name, path in (("hf", assets / "model"), ("megatron", megatron)):
        (tmp_path / name).mkdir()
        config = write_config(assets, tmp_path / name)
        succeeded(train_here(config, f"model.path={path}", "train.train_iters=2"))
        metrics.append(read_metrics(tmp_path / name / "run"))
    assert metrics[0] == metrics[1]

    checkpoint = tmp_path / "megatron" / "run" / "checkpoints" / "step_2"
    target = tmp_path / "exported"
    result = convert("megatron-to-hf", checkpoint, target)
    assert result.exit_code == 0, result.output
    ours, theirs = load_file(target / "model.safetensors"), weights(tmp_path / "hf" / "run", 2)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
    assert (target / "tokenizer.json").read_bytes() == (assets / "model" / "tokenizer.json").read_bytes()


def test_the_script_is_the_same_command(model: Path, tmp_path: Path):
    target = tmp_path / "megatron"
    script = Path(__file__).parents[2] / "tools" / "convert_checkpoint.py"
    command = [sys.executable, script, "hf-to-megatron", model, target]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert re.fullmatch(LINE.format(target), done.stdout)
    assert done.stderr == ""


def test_mistakes_are_one_sentence_and_exit_code_2(model: Path, megatron: Path, tmp_path: Path):
    for arguments, message in (
        (["hf-to-megatron", model, megatron], f"{megatron} exists; remove it or name another folder"),
        (["megatron-to-hf", model, tmp_path / "x"], f"{model} is not a Megatron checkpoint: it has neither"),
        (["megatron-to-hf", megatron, tmp_path / "x", "--max-shard-size", "0GB"], "--max-shard-size 0GB is not a size"),
        (["hf-to-megatron", tmp_path / "none", tmp_path / "x"], f"the model folder {tmp_path / 'none'} is not"),
    ):
        result = convert(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500MB", 5 * 10**8), ("2GiB", 2**31), ("1.5k", 1500), ("7", 7), ("3 B", 3)]
)
def test_sizes(text: str, size: int):
    assert cli_convert._parse_size(text) == size


# Holds a conversion after its first tensor, as a slow disk would.
HOLD = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in a shell's background
from chord_megatron.checkpoints import conversion
from chord_megatron.cli.convert import app

cast = conversion.cast
def hold(tensor, dtype, name):
    print("at work", flush=True)
    if name != {first!r}:
        time.sleep(600)
    return cast(tensor, dtype, name)
conversion.cast = hold
app(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("command", "first", "sent"),
    [
        ("hf-to-megatron", "embedding.word_embeddings.weight", signal.SIGINT),
        ("megatron-to-hf", "model.embed_tokens.weight", signal.SIGTERM),
    ],
)
def test_an_interrupt_leaves_nothing(
    model: Path, megatron: Path, tmp_path: Path, command: str, first: str, sent: signal.Signals
):
    source = model if command == "hf-to-megatron" else megatron
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(first=first), command, source, tmp_path / "out"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert [process.stdout.readline() for _ in range(2)] == ["at work\n"] * 2
    (partial,) = tmp_path.iterdir()
    assert any(path.stat().st_size for path in partial.iterdir())
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr == "interrupted; nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_grow_leaves_nothing(model: Path, megatron: Path, tmp_path: Path):
    """The operating system's own refusal, in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        results = [
            convert("hf-to-megatron", model, tmp_path / "out"),
            convert("megatron-to-hf", megatron, tmp_path / "out"),
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    reason = os.strerror(27)
    for result in results:
        assert result.exit_code == 2
        assert result.stderr == f"error: {tmp_path / 'out'} cannot be written ({reason}); nothing was written\n"
    assert list(tmp_path.iterdir()) == []


def test_a_megatron_lm_folder(model: Path, megatron: Path, tmp_path: Path):
    shutil.copytree(megatron, tmp_path / "run" / "iter_0000040")
    (tmp_path / "run" / "iter_0000040" / "config.json").unlink()
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("40")
    assert "name the Hugging Face folder of the model with --hf-config" in (
        convert("megatron-to-hf", tmp_path / "run", tmp_path / "out").stderr
    )
    result = convert("megatron-to-hf", tmp_path / "run", tmp_path / "out", "--hf-config", model, "--dtype", "bfloat16")
    assert result.exit_code == 0, result.output
    expected = {name: tensor.bfloat16() for name, tensor in load_file(model / "model.safetensors").items()}
    ours = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.items())


def test_a_megatron_lm_folder_without_a_config(model: Path, megatron: Path, tmp_path: Path):
    """config.json is made from the arguments that Megatron-LM keeps; transformers computes the same with it."""
    source = tmp_path / "iter_0000040"
    shutil.copytree(megatron, source)
    for path in source.glob("*.json"):
        if path.name != "metadata.json":
            path.unlink()
    arch = read_architecture(model)
    args = argparse.Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        group_query_attention=True,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.head_dim,
        vocab_size=arch.vocab_size,
        max_position_embeddings=arch.max_position_embeddings,
        rotary_base=arch.rope_theta,
        norm_epsilon=arch.norm_eps,
        qk_layernorm=arch.qk_layernorm,
        add_qkv_bias=arch.qkv_bias,
        untie_embeddings_and_output_weights=not arch.tie_word_embeddings,
    )
    torch.save({"args": args}, source / "common.pt")
    result = convert("megatron-to-hf", source, tmp_path / "out")
    assert result.exit_code == 0, result.output
    models = [AutoModelForCausalLM.from_pretrained(folder) for folder in (model, tmp_path / "out")]
    logits = [one(torch.arange(20)[None]).logits for one in models]
    assert torch.equal(*logits)

    args.rotary_base = 1234
    torch.save({"args": args}, source / "common.pt")
    result = convert("megatron-to-hf", source, tmp_path / "again", "--hf-config", model)
    assert "was trained with rotary_base=1234 where config.json says rope_theta=10000.0" in result.stderr
    assert result.exit_code == 2 and not (tmp_path / "again").exists()
