"""What travels with the weights into exports, checkpoints and conversions: all that the tokenizer may need."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from chord_megatron.weights import model_files
from chord_megatron.weights.hf_config import parse_config
from chord_megatron.weights.model_files import copy_model_files

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "intermediate_size": 16,
    "max_position_embeddings": 32,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-6,
    "vocab_size": 16,
}
ARCH = parse_config(CONFIG)

TRAVEL = (
    "LICENSE",
    "added_tokens.json",
    "additional_chat_templates/tool_use.jinja",
    "bpe.codes",
    "chat_template.jinja",
    "generation_config.json",
    "merges.txt",
    "modeling_helpers.py",
    "preprocessor_config.json",
    "qwen.tiktoken",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenization_own.py",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "vocabulary",
)
STAY = (
    ".gitattributes",
    ".metadata",
    "README.md",
    "__0_0.distcp",
    "__pycache__/tokenization_own.cpython-311.pyc",
    "adapter_model.safetensors",
    "common.pt",
    "consolidated.00.pth",
    "flax_model.msgpack",
    "iter_0000010/common.pt",
    "latest_checkpointed_iteration.txt",
    "metadata.json",
    "model-00001-of-00002.safetensors",
    "model.Q4_K_M.gguf",
    "model.safetensors.index.json",
    "model.onnx",
    "optimizer.pt",
    "original/tokenizer.model",
    "plot.png",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "rng_00000.safetensors",
    "state.json",
    "tf_model.h5",
    "trainer_state.json",
    "training_args.bin",
)


def write(folder: Path, *names: str, text: str = "text") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {"config.json"}


def test_everything_but_weights_travels(tmp_path: Path) -> None:
    source = write(tmp_path / "source", *TRAVEL, *STAY)
    (tmp_path / "target").mkdir()
    copy_model_files([source], tmp_path / "target", ARCH)
    assert files(tmp_path / "target") == set(TRAVEL)


def test_what_is_there_already_and_earlier_folders_win(tmp_path: Path) -> None:
    first = write(tmp_path / "first", "vocab.txt", "chat_template.jinja", text="first")
    second = write(tmp_path / "second", "vocab.txt", "own.py", text="second")
    target = tmp_path / "target"
    target.mkdir()
    (target / "chat_template.jinja").write_text("there already")
    copy_model_files([first, second], target, ARCH)
    contents = {name: (target / name).read_text() for name in files(target)}
    assert contents == {"vocab.txt": "first", "own.py": "second", "chat_template.jinja": "there already"}


def test_links_of_a_download_become_files_and_linked_folders_stay(tmp_path: Path) -> None:
    """The cache of huggingface_hub holds links to blobs, shared folders may be read-only."""
    source = write(tmp_path / "models--x" / "snapshots" / "1", "own.txt")
    blobs = tmp_path / "models--x" / "blobs"
    blobs.mkdir()
    (source / "config.json").rename(blobs / "5678")
    (blobs / "5678").chmod(0o444)
    (blobs / "1234").write_text("content")
    (source / "config.json").symlink_to("../../blobs/5678")
    (source / "tokenizer.json").symlink_to("../../blobs/1234")
    (source / "same.txt").symlink_to("own.txt")
    (source / "gone.json").symlink_to("../../blobs/9")
    (source / "additional_chat_templates").symlink_to(blobs)
    target = tmp_path / "target"
    target.mkdir()
    assert copy_model_files([source], target, ARCH) == []
    assert files(target) == {"tokenizer.json", "own.txt", "same.txt"}
    assert (target / "config.json").stat().st_mode & 0o200
    assert (target / "tokenizer.json").read_text() == "content" and not (target / "tokenizer.json").is_symlink()


@pytest.mark.parametrize("is_relative", [True, False])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, is_relative: bool) -> None:
    """What is published would hold a file of whoever converts: a Git repository may have such links."""
    (tmp_path / "secret").write_text("secret")
    source = write(tmp_path / "source", "vocab.txt", "additional_chat_templates/own.jinja")
    links = ("id.txt", "additional_chat_templates/id.jinja")
    for name in links:
        to = Path("../" * (1 + name.count("/"))) / "secret" if is_relative else tmp_path / "secret"
        (source / name).symlink_to(to)
    (source / "around.txt").symlink_to("id.txt")
    target = tmp_path / "target"
    target.mkdir()
    assert copy_model_files([source], target, ARCH) == [
        f"{source}/{name} is a link to {tmp_path}/secret, outside of the model's folder: not copied"
        for name in sorted([*links, "around.txt"])
    ]
    assert files(target) == {"vocab.txt", "additional_chat_templates/own.jinja"}


def test_a_file_larger_than_any_vocabulary_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_files, "MAX_BYTES", 4)
    source = write(tmp_path / "source", "vocab.txt", text="1234")
    write(source, "data.txt", text="12345")
    target = tmp_path / "target"
    target.mkdir()
    copy_model_files([source], target, ARCH)
    assert files(target) == {"vocab.txt"}
