"""A run goes on from a damaged checkpoint or refuses it in one sentence, whichever of its files is damaged."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness import succeeded, train_here, write_config
from mutations import check_damaged

from chord_megatron.backend.groups import shut_down_distributed
from chord_megatron.config import load_config
from chord_megatron.system.errors import UserError
from chord_megatron.training.run import Run

pytestmark = [pytest.mark.attack, pytest.mark.e2e]

EXAMPLES = 60
FILES = ("state.json", "rng_00000.safetensors", "common.pt", ".metadata", "__0_0_0.distcp", "metadata.json")


@pytest.fixture(scope="module")
def run(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """One that has resumed from the checkpoint of two steps, and can do so again."""
    base = tmp_path_factory.mktemp("damaged")
    config = write_config(assets, base)
    succeeded(train_here(config, "train.train_iters=2"))
    run = Run(load_config(config))
    yield run
    run._opened.close()
    shut_down_distributed()


@pytest.fixture
def checkpoint(run: Run) -> Iterator[Path]:
    """The checkpoint's folder, which is put right afterwards."""
    directory = run.run_dir.checkpoint(2)
    whole = directory.with_name("whole")
    shutil.copytree(directory, whole)
    yield directory
    shutil.rmtree(directory)
    whole.rename(directory)


def refused(run: Run) -> bool:
    try:
        assert run._resume() == 2
    except UserError as error:
        assert str(error).strip() and "\n" not in str(error) and len(str(error)) < 1000, error
        return True
    return False


@pytest.mark.parametrize("name", FILES)
def test_damaged_bytes_are_read_or_refused(name: str, run: Run, checkpoint: Path, measure: Callable[[str, int], None]):
    assert not refused(run)
    number_refused = 0

    def check(damaged: bytes) -> None:
        nonlocal number_refused
        (checkpoint / name).unlink()
        (checkpoint / name).write_bytes(damaged)
        number_refused += refused(run)

    measure("inputs mutated", check_damaged((checkpoint / name).read_bytes(), EXAMPLES, check))
    assert number_refused > EXAMPLES // 10 or name == "metadata.json"  # which only `convert` reads


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("content", [b"", b"{}", b"[]", None], ids=["empty", "object", "list", "folder"])
def test_something_else_in_its_place_is_refused(name: str, content: bytes | None, run: Run, checkpoint: Path):
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir() if content is None else (checkpoint / name).write_bytes(content)
    assert refused(run) or name == "metadata.json"
