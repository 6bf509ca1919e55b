"""A run that another release of megatron-core started goes on as the uninterrupted one, to 1e-6."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch
from harness import read_metrics
from packaging.version import Version
from release_runs import RECORDINGS, RESUMED_STEP, RUNS, STEPS, prepare, run

from chord_megatron.checkpoints.common_state import read_common_state
from chord_megatron.checkpoints.conversion import megatron_to_hf
from chord_megatron.system.versions import installed_version

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]

ARCHIVES = sorted(RECORDINGS.glob("*.tar.gz"))
# Those of the installed release can wait: test_resume.py resumes such runs.
INSTALLED = installed_version("megatron-core")
CASES = [pytest.param(path, marks=[pytest.mark.slow] * path.name.startswith(f"{INSTALLED}_")) for path in ARCHIVES]


@pytest.mark.parametrize("archive", CASES, ids=lambda path: path.name.removesuffix(".tar.gz"))
def test_a_run_of_another_release_goes_on(archive: Path, tmp_path: Path):
    release, name = archive.name.removesuffix(".tar.gz").split("_")
    config, overrides, processes = prepare(tmp_path, name)
    with tarfile.open(archive) as file:
        file.extractall(tmp_path, filter="data")
    recorded = read_metrics(tmp_path / "run")
    assert [line["step"] for line in recorded] == list(range(STEPS))

    run(config, overrides, processes)

    resumed = read_metrics(tmp_path / "run")
    assert resumed[:RESUMED_STEP] == recorded[:RESUMED_STEP]
    for key in ("loss", "grad_norm", "lr"):
        ours, theirs = (
            torch.tensor([line[key] for line in lines], dtype=torch.float64) for lines in (resumed, recorded)
        )
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    for step, writer in ((RESUMED_STEP, release), (STEPS, INSTALLED)):
        document = json.loads((tmp_path / "run" / "checkpoints" / f"step_{step}" / "state.json").read_text())
        assert document["megatron_core"] == writer


@pytest.mark.parametrize("name", RUNS)
def test_checkpoints_of_all_releases_become_the_same_model(name: str, tmp_path: Path):
    """The recordings are of one run, whose weights both ends computed alike."""
    written = set()
    for archive in RECORDINGS.glob(f"*_{name}.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(tmp_path / archive.stem, filter="data")
        source, target = tmp_path / archive.stem / "run" / "checkpoints" / f"step_{RESUMED_STEP}", tmp_path / "hf"
        megatron_to_hf(source, target / archive.stem, verify=True)
        written.add((target / archive.stem / "model.safetensors").read_bytes())
    assert len(written) == 1


def test_both_ends_are_recorded_and_put_their_common_state_elsewhere(tmp_path: Path):
    for archive in ARCHIVES:
        release, name = archive.name.removesuffix(".tar.gz").split("_")
        assert name in RUNS
        with tarfile.open(archive) as file:
            file.extractall(tmp_path / archive.stem, filter="data")
        checkpoint = tmp_path / archive.stem / "run" / "checkpoints" / f"step_{RESUMED_STEP}"
        assert (checkpoint / "common.pt").exists() == (Version(release) < Version("0.19"))
        assert read_common_state(checkpoint, "record it again")["optimizer"]
