"""Every loader of a file that is not ours reads it, or says in one sentence what is wrong with it: nothing else.

A loader is a line of LOADERS: the folder with whole files, the file that is damaged, and what reads it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mutations import check_damaged
from safetensors.torch import load_file, save_file
from tiny_families import write_model
from tiny_tokenizer import write_tokenizer

from chord_megatron.checkpoints.common_state import read_common_state
from chord_megatron.checkpoints.conversion import hf_to_megatron
from chord_megatron.checkpoints.megatron_args import architecture_from_args, read_megatron_args
from chord_megatron.checkpoints.metadata import find_checkpoint, refuse_unsafe
from chord_megatron.checkpoints.reader import MegatronReader
from chord_megatron.data.tokenizer import generation_end_tokens, load_tokenizer
from chord_megatron.system.errors import UserError
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.mapping import parameter_names
from chord_megatron.weights.safetensors_io import SafetensorsReader, check_complete
from chord_megatron.weights.shards import import_parameter

pytestmark = pytest.mark.attack

EXAMPLES = 60


def read_hf_weights(folder: Path) -> None:
    """As training and conversion do."""
    arch = read_architecture(folder)
    with SafetensorsReader(folder) as reader:
        check_complete(reader, arch)
        for name in parameter_names(arch):
            import_parameter(name, arch, reader.get_slice, tp_rank=0, tp_size=1, padded_vocab_size=arch.vocab_size)


def read_megatron_weights(folder: Path) -> None:
    refuse_unsafe(folder)
    arch = read_architecture(folder)
    reader = MegatronReader(folder, arch)
    for name in parameter_names(arch):
        reader.spec(name)
        reader.read(name)


def read_states(folder: Path) -> None:
    read_common_state(folder, "copy it again")
    args = read_megatron_args(folder)
    if args is not None:
        architecture_from_args(args)


def write_folder(folder: Path, family: str) -> None:
    """A model with everything that a loader may look at."""
    write_model(folder, family, num_hidden_layers=2, hidden_size=16)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 1], "temperature": 0.6}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": {"content": "<end>", "lstrip": false}}')
    (folder / "added_tokens.json").write_text('{"<end>": 2}')
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def write_shards(folder: Path) -> None:
    write_folder(folder, "llama")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {"1.safetensors": dict(list(weights.items())[:5]), "2.safetensors": dict(list(weights.items())[5:])}
    for file, tensors in files.items():
        save_file(tensors, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": {name: f for f, tensors in files.items() for name in tensors}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_megatron(folder: Path) -> None:
    write_folder(folder / "hf", "llama")
    hf_to_megatron(folder / "hf", folder / "megatron")
    for file in (folder / "megatron").iterdir():
        file.rename(folder / file.name)
    (folder / "megatron").rmdir()
    shutil.rmtree(folder / "hf")


def write_megatron_lm(folder: Path) -> None:
    (folder / "iter_0000007").mkdir()
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    write_megatron(folder / "iter_0000007")


FOLDERS: dict[str, Callable[[Path], None]] = {
    **{name: partial(write_folder, family=name) for name in ("llama", "qwen3_moe", "deepseek_v3")},
    "shards": write_shards,
    "megatron": write_megatron,
    "Megatron-LM": write_megatron_lm,
}


class Loader(NamedTuple):
    """What reads a file of a folder."""

    folder: str  # of FOLDERS
    file: str
    load: Callable[[Path], Any]
    first_bytes: int | None = None  # the damage is within these; None: anywhere


load_the_tokenizer = partial(load_tokenizer, trust_remote_code=False)
LOADERS: dict[str, Loader] = {
    "config.json of Llama": Loader("llama", "config.json", read_architecture),
    "config.json of Qwen3-MoE": Loader("qwen3_moe", "config.json", read_architecture),
    "config.json of DeepSeek-V3": Loader("deepseek_v3", "config.json", read_architecture),
    "tokenizer.json": Loader("llama", "tokenizer.json", load_the_tokenizer),
    "tokenizer_config.json": Loader("llama", "tokenizer_config.json", load_the_tokenizer),
    "special_tokens_map.json": Loader("llama", "special_tokens_map.json", load_the_tokenizer),
    "added_tokens.json": Loader("llama", "added_tokens.json", load_the_tokenizer),
    "chat_template.jinja": Loader("llama", "chat_template.jinja", load_the_tokenizer),
    "config.json of a tokenizer": Loader("llama", "config.json", load_the_tokenizer),
    "generation_config.json": Loader("llama", "generation_config.json", generation_end_tokens),
    "header of safetensors": Loader("llama", "model.safetensors", read_hf_weights, first_bytes=2500),
    "index of safetensors": Loader("shards", "model.safetensors.index.json", read_hf_weights),
    ".metadata": Loader("megatron", ".metadata", read_megatron_weights),
    "metadata.json": Loader("megatron", "metadata.json", read_megatron_weights),
    "tensors of a checkpoint": Loader("megatron", "__0_0.distcp", read_megatron_weights),
    "common.pt": Loader("megatron", "common.pt", read_states),
    "tracker of Megatron-LM": Loader("Megatron-LM", "latest_checkpointed_iteration.txt", find_checkpoint),
}


@pytest.fixture
def folder_of(make_once: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy of a folder of FOLDERS, to be damaged."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(make_once(f"mutated {name}", FOLDERS[name]), tmp_path / "folder"))

    return copy


def failure(load: Callable[[Path], Any], folder: Path) -> str | None:
    """What a loader raises that is not one sentence for the user."""
    try:
        load(folder)
    except UserError as error:
        return None if str(error).strip() and "\n" not in str(error) else f"no sentence: {error!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", LOADERS)
def test_damaged_bytes_are_read_or_refused(
    name: str, folder_of: Callable[[str], Path], measure: Callable[[str, int], None]
) -> None:
    loader = LOADERS[name]
    folder = folder_of(loader.folder)
    loader.load(folder)  # the whole file is not refused
    content = (folder / loader.file).read_bytes()
    start, rest = content[: loader.first_bytes], content[len(content[: loader.first_bytes]) :]

    def check(damaged: bytes) -> None:
        (folder / loader.file).unlink()  # a mapped file must not change
        (folder / loader.file).write_bytes(damaged + rest)
        assert failure(loader.load, folder) is None

    measure("inputs mutated", check_damaged(start, EXAMPLES, check))


def nothing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def dangling_link(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    "replace", [nothing, empty, directory, dangling_link, link_to_itself], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("name", FOLDERS)
def test_files_that_are_something_else_are_refused(
    name: str, replace: Callable[[Path], None], make_once: Callable[..., Path], tmp_path: Path
) -> None:
    whole = make_once(f"mutated {name}", FOLDERS[name])
    failures = []
    for file in sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file()):
        folder = Path(shutil.copytree(whole, tmp_path / "folder"))
        replace(folder / file)
        for load in {loader.load for loader in LOADERS.values() if loader.folder == name}:
            if found := failure(load, folder):
                failures.append((str(file), found))
        shutil.rmtree(folder)
    assert not failures
