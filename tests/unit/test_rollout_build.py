"""How colocated engines are built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from chord_megatron.config import Config
from chord_megatron.rollout import build, vllm_colocate


@pytest.mark.parametrize(("optimizer", "model"), [(False, False), (True, False), (True, True)])
def test_a_colocated_vllm_starts_where_the_trainer_has_made_room(
    optimizer: bool, model: bool, monkeypatch: pytest.MonkeyPatch
):
    """vLLM refuses to start where less than its share of the GPU is free (v1/worker/utils.py, request_memory)."""
    away: dict[str, bool] = {}
    seen: list[dict[str, bool]] = []

    @contextmanager
    def offloaded(**parts: bool) -> Iterator[None]:
        away.update(parts)
        yield
        away.clear()

    def start(*args: Any, **kwargs: Any) -> str:
        seen.append(dict(away))
        return "engine"

    monkeypatch.setattr(vllm_colocate, "VllmColocateRollout", start)
    config = Config.model_validate(
        {
            "model": {"path": "model"},
            "data": {"dataset": "prompts.jsonl"},
            "chord": {"chord_mu_peak": 0, "chord_mu_valley": 0},
            "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 1},
            "rollout": {
                "engine": "vllm",
                "vllm_mode": "colocate",
                "offload_optimizer": optimizer,
                "offload_model": model,
            },
        }
    )
    trainer: Any = SimpleNamespace(arch=None, groups=SimpleNamespace(device="cpu"), offloaded=offloaded)
    assert build.build_rollout(config, trainer, groups=None) == "engine"  # type: ignore[arg-type]
    assert seen == [{"optimizer": optimizer, "model": model}] and away == {}
