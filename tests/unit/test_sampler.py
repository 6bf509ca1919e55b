"""When the sampler gets the policy's weights, in which order memory is made, and that a disagreement stops the run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from chord_megatron.batching.packing import BatchLayout
from chord_megatron.config import RolloutConfig
from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.sampler import Sampler
from chord_megatron.types import GlobalBatch, Prompt, RolloutRequest, SamplingParams

PROBES = (Prompt(0, "", (5, 6, 7), ""), Prompt(1, "", (8, 9), ""))


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = dist.FileStore(str(tmp_path_factory.mktemp("store") / "file"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Recorder:
    """Stands for the trainer's engine and the rollout engine; both write what they did to one list."""

    def __init__(self, *, scores: Sequence[Sequence[float]] = ((-1.0, -2.0), (-3.0,))) -> None:
        self.done: list[str] = []
        self.weights_version: int | None = None
        self.policy_version = 0
        self.batch_layout = BatchLayout()
        self._scores = [list(row) for row in scores]

    # the trainer's
    @contextmanager
    def offloaded(self, *, optimizer: bool, model: bool) -> Iterator[None]:
        away = [name for name, is_away in (("optimizer", optimizer), ("model", model)) if is_away]
        self.done += [f"-{name}" for name in away]
        yield
        self.done += [f"+{name}" for name in reversed(away)]

    def compute_log_probs(self, batch: GlobalBatch) -> list[Tensor]:
        (micro_batch,) = batch.micro_batches
        assert micro_batch.input_ids.tolist() == [5, 6, 7, 8, 9]
        assert micro_batch.counts.tolist() == [True, True, False, True, False]
        self.done.append("probe")
        return [torch.tensor([0.0, -1.0, -2.0]), torch.tensor([0.0, -3.0])]

    def export_hf_weights(self) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    # the rollout engine's
    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        self.weights_version = policy_version
        self.done.append(f"update {policy_version}")

    def score(self, sequences: Sequence[Sequence[int]]) -> dict[str, list[list[float]]]:
        self.done.append("score")
        return {"the engine": self._scores}

    generation_seconds: float | None = None

    def close(self) -> None: ...

    def generate(self, request: RolloutRequest) -> list:
        assert request.policy_version == self.weights_version
        self.done.append("generate")
        return []


def draw(recorder: Recorder, *versions: int, **options: Any) -> list[str]:
    sampler = Sampler(recorder, recorder, RolloutConfig(**options), PROBES, PhaseTimer())
    for version in versions:
        recorder.policy_version = version
        sampler.draw(PROBES, SamplingParams(), num_generations=1, step=0).result()
    return recorder.done


def test_weights_come_before_the_first_token_and_once_a_version():
    assert draw(Recorder(), 0, 0, 1) == [
        *("probe", "update 0", "score", "generate"),
        "generate",
        *("probe", "update 1", "score", "generate"),
    ]


def test_weights_that_were_dropped_come_again():
    recorder = Recorder()
    draw(recorder, 3)
    recorder.weights_version = None  # as after sleep level 2, or when a server was lost
    recorder.done.clear()
    assert draw(recorder, 3) == ["probe", "update 3", "score", "generate"]


def test_memory_is_made_around_the_update_and_the_generation():
    assert draw(Recorder(), 0, offload_optimizer=True, offload_model=True) == [
        "-optimizer",
        *("probe", "update 0", "-model", "score", "+model"),
        *("-model", "generate", "+model"),
        "+optimizer",
    ]


def test_a_disagreement_stops_before_a_token_is_drawn():
    recorder = Recorder(scores=((-1.0, -2.3), (-3.0,)))
    with pytest.raises(UserError, match=r"the engine and the trainer disagree.*differ by 0.1 on average"):
        draw(recorder, 0)
    assert recorder.done == ["probe", "update 0", "score"]
    with pytest.warns(UserWarning, match=r"differ by 0.1 on average, above rollout.consistency_threshold=0.05"):
        assert draw(Recorder(scores=((-1.0, -2.3), (-3.0,))), 0, consistency_action="warn")[-1] == "generate"
    assert draw(Recorder(scores=((-1.0, -2.3), (-3.0,))), 0, consistency_threshold=0.2)[-1] == "generate"
