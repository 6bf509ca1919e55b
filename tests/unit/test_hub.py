"""Models by their names on the hub, in a cache that is laid out as huggingface_hub's; nothing is asked of a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from chord_megatron.config import Config
from chord_megatron.data.hub import is_hub_name, with_local_model
from chord_megatron.system.errors import UserError

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"weights"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache without a model, where no request is made; the working directory is an empty one beside it."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot(cache: Path, files: dict[str, bytes]) -> Path:
    """What a download of org/tiny leaves: blobs, links to them, the commit of `main`, what the commit has."""
    repository = cache / "models--org--tiny"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "blobs").mkdir()
    for name, content in files.items():
        (repository / "blobs" / name).write_bytes(content)
        (folder / name).symlink_to(f"../../blobs/{name}")
    return folder


def config_of(path: str) -> Config:
    return Config.model_validate({"model": {"path": path}, "train": {"output_dir": "out", "train_iters": 1}})


def test_a_name_becomes_the_folder_of_its_snapshot(cache: Path):
    folder = snapshot(cache, FILES)
    config = with_local_model(config_of("org/tiny"))
    assert config == config_of(str(folder))
    assert json.loads((Path(config.model.path) / "config.json").read_text()) == {}


def test_a_folder_of_that_name_comes_first(cache: Path):
    snapshot(cache, FILES)
    Path("org/tiny").mkdir(parents=True)
    assert with_local_model(config_of("org/tiny")).model.path == "org/tiny"


@pytest.mark.parametrize("path", ["/models/tiny", "tiny", "./org/tiny", "a/b/c", "../org", "org/", "~/tiny", "org/.x"])
def test_a_path_is_no_name(cache: Path, path: str):
    assert not is_hub_name(path)
    assert with_local_model(config_of(path)).model.path == path


def test_a_name_that_nobody_has_is_one_sentence(cache: Path):
    with pytest.raises(UserError) as error:
        with_local_model(config_of("org/tiny"))
    assert str(error.value).startswith(
        f"model.path=org/tiny is neither a folder (looked for at {Path.cwd()}/org/tiny) nor a model that the hub or "
        "its cache gives (LocalEntryNotFoundError: "
    )
    assert "\n" not in str(error.value)


def test_a_model_without_safetensors_is_refused_where_weights_are_needed(cache: Path):
    folder = snapshot(cache, {"config.json": b"{}"})
    assert with_local_model(config_of("org/tiny"), weights=False).model.path == str(folder)
    with pytest.raises(UserError, match=r"model\.path=org/tiny has no safetensors"):
        with_local_model(config_of("org/tiny"))
