"""Runs of a model with experts that replay its routers' choices, and the configurations that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import Outcome, read_lines, read_metrics, run_here, succeeded, train_here, train_on_forks, write_config
from tiny_model import write_tiny_model

from chord_megatron.rollout.recorded_routing import RoutingForm, decode

pytestmark = pytest.mark.e2e

# Two generation batches, each trained on twice, with weights that move far enough for other experts.
SETTINGS = ("train.train_iters=4", "grpo.num_iterations=2", "optimizer.lr=0.02", "grpo.beta=0.1")


@pytest.fixture(scope="module")
def moe_config(assets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small task for a model with experts in both of its layers."""
    root = tmp_path_factory.mktemp("moe")
    write_tiny_model(root / "model", with_experts=True)
    for name in ("prompts.jsonl", "experts.jsonl", "rewards.py"):
        (root / name).write_bytes((assets / name).read_bytes())
    return write_config(root, root)


@pytest.fixture(scope="module")
def runs(moe_config: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of a run by rollout.router_replay; that of the sampler is recorded."""
    found = {}
    for source in ("null", "trainer", "sampler"):
        output = moe_config.with_name(source)
        recording = (f"rollout.record_to={moe_config.with_name('rollouts.jsonl')}",) if source == "sampler" else ()
        train(moe_config, f"rollout.router_replay={source}", f"train.output_dir={output}", *recording)
        found[source] = read_metrics(output)
    return found


def train(config: Path, *overrides: str) -> Outcome:
    return succeeded(train_here(config, *SETTINGS, *overrides))


@pytest.mark.parametrize("source", ["trainer", "sampler"])
def test_the_first_update_of_a_batch_is_that_of_live_routing(source: str, runs: dict[str, list[dict[str, Any]]]):
    """Bit for bit: until weights have moved, what is replayed is what the routers choose.

    Under `trainer` it is itself the pass that later ones replay.
    """
    live, replayed = runs["null"][0], runs[source][0]
    assert replayed["router_replay_mismatch"] == {"trainer": None, "sampler": 0}[source]
    assert {**replayed, "router_replay_mismatch": None} == live


@pytest.mark.parametrize("source", ["trainer", "sampler"])
def test_later_updates_replay_what_routers_would_not_choose(source: str, runs: dict[str, list[dict[str, Any]]]):
    mismatches = [line["router_replay_mismatch"] for line in runs[source]]
    assert mismatches[0] == mismatches[2] == {"trainer": None, "sampler": 0}[source]  # a new batch
    assert 0 < mismatches[1] < 0.5 and 0 < mismatches[3] < 0.5
    assert runs[source][1]["loss"] != runs["null"][1]["loss"]
    for line in runs[source]:
        assert 1 <= line["router_imbalance_mean"] <= line["router_imbalance_max"] <= 2  # 4 experts, 2 a token


def test_sampler_and_trainer_choose_alike_in_the_same_precision(runs: dict[str, list[dict[str, Any]]]):
    """The last token apart, which the sampler never reads, and whose log-probs of a next one nobody needs."""
    for found, expected in zip(runs["sampler"][:2], runs["trainer"][:2], strict=True):
        for key in ("loss", "grad_norm", "kl", "entropy"):
            assert found[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6)


def test_a_recording_replays_its_routing(moe_config: Path, runs: dict[str, list[dict[str, Any]]], tmp_path: Path):
    recording, again = moe_config.with_name("rollouts.jsonl"), tmp_path / "again.jsonl"
    assert all(line["routing"] for line in read_lines(recording))
    replay = ("rollout.engine=replay", f"rollout.replay_from={recording}", "rollout.router_replay=sampler")
    train(moe_config, *replay, f"rollout.record_to={again}", f"train.output_dir={tmp_path / 'run'}")
    assert read_metrics(tmp_path / "run") == runs["sampler"]
    assert again.read_bytes() == recording.read_bytes()


@pytest.mark.distributed
def test_ranks_share_the_routing_of_what_they_draw(
    moe_config: Path, runs: dict[str, list[dict[str, Any]]], tmp_path: Path
):
    """Experts on other ranks, batches of unequal size, of which one rank has more."""
    recording = tmp_path / "rollouts.jsonl"
    layout = ("parallel.expert_model_parallel_size=2", "rollout.max_batch_size=3", "train.micro_batch_size=2")
    replay = ("rollout.router_replay=sampler", f"rollout.record_to={recording}", f"train.output_dir={tmp_path / 'run'}")
    succeeded(train_on_forks(moe_config, *SETTINGS, *layout, *replay))
    found, expected = (experts_of_first_batch(path) for path in (recording, moe_config.with_name("rollouts.jsonl")))
    assert len(found) == 8 and found == expected
    metrics = read_metrics(tmp_path / "run")[0]
    for key in ("loss", "grad_norm", "kl", "entropy", "router_replay_mismatch"):
        assert metrics[key] == pytest.approx(runs["sampler"][0][key], rel=1e-5, abs=1e-6)


def experts_of_first_batch(recording: Path) -> list[tuple[list[int], list[Any]]]:
    """(tokens, experts of each token in each layer) of each completion, experts in order of their numbers."""
    form = RoutingForm(num_layers=2, top_k=2, num_experts=4)
    return [
        (line["tokens"], decode(line["routing"], len(line["tokens"]), form).sort(-1).values.tolist())
        for line in read_lines(recording)
        if line["step"] == 0
    ]


def test_what_cannot_replay_is_a_sentence(config: Path, moe_config: Path, tmp_path: Path):
    dense = run_here("validate", config, "rollout.router_replay=sampler")
    assert (dense.code, dense.errors) == (
        2,
        ["error: rollout.router_replay=sampler is for models with experts, and this one has none; remove it"],
    )
    recording = tmp_path / "rollouts.jsonl"
    train(moe_config, f"rollout.record_to={recording}", f"train.output_dir={tmp_path / 'first'}", "train.train_iters=2")
    outcome = train_here(
        moe_config,
        *SETTINGS,
        "rollout.engine=replay",
        f"rollout.replay_from={recording}",
        "rollout.router_replay=sampler",
        f"train.output_dir={tmp_path / 'second'}",
    )
    sentence = "lacks 'routing' for rollout.router_replay=sampler; record it again with rollout.record_to"
    assert (outcome.code, outcome.errors) == (2, [f"error: {recording}:1: {sentence}"])
