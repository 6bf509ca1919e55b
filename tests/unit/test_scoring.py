"""The rewards of a generation batch, and the metrics made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from chord_megatron.rewards import build_reward_function, builtin
from chord_megatron.rewards.scoring import score_rollouts
from chord_megatron.tracking.step_metrics import rollout_metrics
from chord_megatron.types import Prompt, RolloutSample


class Letters:
    """A tokenizer whose tokens are characters."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        return "".join(map(chr, tokens))


def rollout(index: int, text: str) -> RolloutSample:
    tokens = torch.tensor([0, *map(ord, text)], dtype=torch.int32)
    mask = torch.arange(len(tokens)) > 0
    return RolloutSample(index // 2, index, tokens, mask, torch.zeros(len(tokens)), 0, "length")


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_what_failed_is_counted_in_the_metrics_of_its_step(one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_for_73(text: str, *_: str) -> str:
        if text == "73":
            raise RecursionError
        return text

    monkeypatch.setattr(builtin, "final_answer", raise_for_73)
    prompts = [Prompt(0, "p", (0,), "72"), Prompt(1, "q", (0,), "5")]
    rollouts = [rollout(i, text) for i, text in enumerate(["72", "73", "5", "6"])]
    with pytest.warns(RuntimeWarning, match="accuracy failed"):
        scored = score_rollouts(prompts, rollouts, Letters(), build_reward_function(["accuracy"], None, 1))
    assert scored.rewards == (1.0, 0.0, 1.0, 0.0)
    assert scored.reward_errors == (0, 1, 0, 0)
    assert rollout_metrics(scored)["reward_errors"] == 1
    assert rollout_metrics(scored.slice(0, 2))["reward_errors"] == 1
    assert rollout_metrics(scored.slice(2, 4))["reward_errors"] == 0
    assert rollout_metrics(None)["reward_errors"] is None
