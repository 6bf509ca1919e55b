"""A checkpoint of a run goes from one cut of the layers, or of the sequences, to the next: weights and both moments
bitwise, and on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from forked import launch
from selection import selected
from tiny_families import CP_2, PP_2, VOCAB_SIZE, VPP_2
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # files are read without it
]

HERE = Path(__file__).parent
# Processes and settings; each loads what the one before it has saved. The models have four layers.
CUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "PP 2": (2, PP_2),
    "CP 2": (2, CP_2),
    "PP 3": (3, {"pipeline_model_parallel_size": 3}),
    "PP 2 x VPP 2, uneven": (2, {**PP_2, **VPP_2, "pipeline_layout": [0, 2, 1, 1]}),
    "PP 2, last stage of 1": (2, {**PP_2, "num_layers_in_last_pipeline_stage": 1}),
    "one process": (1, {}),
}
# Model, tied, distributed optimizer.
QUICK = [("qwen2", True, True), ("deepseek_v3", False, True)]  # of PP 3, the first stage has no experts
LONG = [("qwen2", False, False), ("deepseek_v3", False, False), ("qwen3_moe-mixed", False, False)]
each_case = pytest.mark.parametrize(
    "case", [*QUICK, *(pytest.param(case, marks=pytest.mark.slow) for case in LONG)], ids=str
)
Case = tuple[str, bool, bool]


@pytest.fixture(scope="module")
def steps(
    tiny_models: Callable[..., Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, dict[str, list[float]]]]:
    """The folder of all checkpoints; and of each cut and case loss and gradient norm of the two steps after them."""
    folder = tmp_path_factory.mktemp("cuts")
    generator = torch.Generator().manual_seed(1)
    cases = {
        str(case): {"path": str(tiny_models(case[0], tied=case[1])), "distributed_optimizer": case[2]}
        for (case,) in sorted(selected(request, "case"))
    }
    sequences = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (9, 4, 12, 7)]
    source, steps = None, {}
    for cut, (processes, parallel) in CUTS.items():
        target = folder / cut
        questions = {"parallel": parallel, "cases": cases, "sequences": sequences, "source": source, "target": target}
        (folder / "questions.json").write_text(json.dumps(questions, default=str), encoding="utf-8")
        launch(HERE / "cuts_worker.py", folder / "questions.json", folder / "steps.json", processes=processes)
        steps[cut] = json.loads((folder / "steps.json").read_text(encoding="utf-8"))
        source = target
    return folder, steps


def tensors_of(checkpoint: Path) -> dict[str, Tensor]:
    """Everything that a checkpoint holds, whole."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        key: torch.full(tuple(stored.size), float("nan"), dtype=stored.properties.dtype)
        for key, stored in reader.read_metadata().state_dict_metadata.items()
        if isinstance(stored, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@each_case
@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "PP 2"])
def test_weights_and_moments_come_through_bitwise(cut: str, case: Case, steps: tuple[Path, dict]) -> None:
    folder, _ = steps
    before, after = tensors_of(folder / "PP 2" / str(case)), tensors_of(folder / cut / str(case))
    assert after.keys() == before.keys()
    assert [key for key in before if not torch.equal(before[key], after[key])] == []
    for moment in ("exp_avg", "exp_avg_sq"):
        moments = [tensor for key, tensor in after.items() if f".{moment}." in key]
        assert len(moments) > 20 and all(tensor.count_nonzero() for tensor in moments)


@each_case
@pytest.mark.parametrize("cut", [cut for cut in CUTS if cut != "PP 2"])
def test_the_next_steps_are_the_same(cut: str, case: Case, steps: tuple[Path, dict]) -> None:
    """The second tells whether Adam has gone on counting in the first, which the bias of its moments needs."""
    assert steps[1][cut][str(case)] == pytest.approx(steps[1]["PP 2"][str(case)], rel=1e-5)
