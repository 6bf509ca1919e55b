"""Router replay under every layout: what is recorded, what is replayed, and the gradient in float64."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from forked import launch
from router_replay_worker import MU
from selection import selected
from tiny_families import CP_2, EP_2, PP_2, TP_2, VOCAB_SIZE, VPP_2
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from chord_megatron.types import LIVE

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
# Softmax over all experts, with a dense layer between; sigmoid with bias, groups and a factor, behind a dense layer.
MODELS = ("qwen3_moe-mixed", "deepseek_v3")
BASELINE = "TP 1"


def layout(processes: int, *, parallel: dict[str, Any] | None = None, **settings: Any) -> dict[str, Any]:
    plain = {"micro_batch_size": 2, "recompute": False, "shares_prompts": False}
    return {"processes": processes, "parallel": parallel or {}, **plain, **settings}


LAYOUTS = {
    BASELINE: layout(1),
    "TP 1, micro-batch 1": layout(1, micro_batch_size=1),
    "TP 1, recomputed": layout(1, recompute=True),
    "TP 2 + SP": layout(2, parallel=TP_2),
    "TP 2 + SP, prompts shared": layout(2, micro_batch_size=10, shares_prompts=True, parallel=TP_2),
    "PP 2": layout(2, parallel=PP_2),
    # Micro-batches begin before the layers of others are run again.
    "PP 2, recomputed": layout(2, micro_batch_size=1, recompute=True, parallel=PP_2),
    "PP 2, experts recomputed": layout(2, micro_batch_size=1, recompute=["moe"], parallel=PP_2),
    "PP 2 x VPP 2, recomputed": layout(2, micro_batch_size=1, recompute=True, parallel=PP_2 | VPP_2),
    "EP 2": layout(2, parallel=EP_2),
    "CP 2": layout(2, parallel=CP_2),
    "TP 2 + SP x EP 2": layout(2, micro_batch_size=1, parallel=TP_2 | EP_2),
}
IN_SHORT = (
    *(BASELINE, "TP 1, micro-batch 1", "TP 2 + SP", "TP 2 + SP, prompts shared", "PP 2 x VPP 2, recomputed", "EP 2"),
)
each_case = pytest.mark.parametrize(
    ("where", "model"),
    [
        pytest.param(where, model, marks=() if where in IN_SHORT else pytest.mark.slow)
        for where in LAYOUTS
        for model in MODELS
    ],
)
Answers = dict[tuple[str, str], dict[str, Any]]  # by layout and model
ModelDirs = dict[str, tuple[Path, Path]]
References = Callable[[str, str], dict[str, Any]]


def random_sequences(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


ROLLOUTS, EXPERTS = random_sequences(9, 17, 5, 12, 3), random_sequences(6, 2, 21, 11, 8)
ROLLOUTS[1][:2] = ROLLOUTS[3][:2] = EXPERTS[2][:2] = ROLLOUTS[0][:2]  # two prompts, one of them of three completions
ROLLOUTS[4][:2] = ROLLOUTS[2][:2]
PROMPTS = random_sequences(3, 11, 1, 6)
STOP_TOKENS = list(range(20))


@pytest.fixture(scope="module")
def model_dirs(tiny_models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> ModelDirs:
    """Each model, and the same moved a little."""
    moved = tmp_path_factory.mktemp("moved")
    for name in MODELS:
        model = AutoModelForCausalLM.from_pretrained(tiny_models(name))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        model.save_pretrained(moved / name)
    return {name: (tiny_models(name), moved / name) for name in MODELS}


@pytest.fixture(scope="module")
def answers(model_dirs: ModelDirs, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Answers:
    """What the engine says of each selected model and layout; layouts of as many processes share a launch."""
    wanted = selected(request, "where", "model")
    wanted |= {(BASELINE, model) for _, model in wanted}
    answers: Answers = {}
    for processes in sorted({LAYOUTS[where]["processes"] for where, _ in wanted}):
        folder = tmp_path_factory.mktemp("answers")
        questions = {
            "models": {model: [*map(str, paths)] for model, paths in model_dirs.items()},
            "layouts": {
                where: (settings, [model for model in MODELS if (where, model) in wanted])
                for where, settings in LAYOUTS.items()
                if settings["processes"] == processes
            },
            "rollouts": ROLLOUTS,
            "experts": EXPERTS,
            "prompts": PROMPTS,
            "sampling": {"temperature": 0.7, "max_completion_length": 12, "stop_token_ids": STOP_TOKENS},
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        script = HERE / "router_replay_worker.py"
        launch(script, folder / "questions.json", folder / "answers.pt", processes=processes)
        answers |= torch.load(folder / "answers.pt", weights_only=True)
    return answers


@pytest.fixture(scope="module")
def references(answers: Answers, model_dirs: ModelDirs) -> References:
    """(model, what is given) -> the pass of the moved model, in float64."""

    @cache
    def reference(model: str, given: str) -> dict[str, Any]:
        routing = None if given == "live" else answers[BASELINE, model][given]
        return Reference(model_dirs[model][1]).gradient(routing)

    return reference


# --- the same in float64, by transformers -----------------------------------------------------------------------------


class Gate(nn.Module):
    """A router of transformers that is told what to choose, and counts what it did."""

    def __init__(self, gate: nn.Module, config: Any) -> None:
        super().__init__()
        self.weight, self.config = gate.weight, config
        self.bias = getattr(gate, "e_score_correction_bias", None)
        self.given: Tensor | None = None  # [tokens, top k]
        self.chosen = torch.empty(0)  # of the last pass
        self.load = torch.zeros(len(gate.weight), dtype=torch.int64)
        self.replayed = self.differing = 0

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = F.linear(hidden_states.reshape(-1, self.weight.shape[1]), self.weight)
        scores = logits.softmax(-1) if self.bias is None else logits.sigmoid()
        chosen = self.live(scores.detach())
        if self.given is not None:
            is_given = self.given[:, 0] != LIVE
            for live, given in zip(chosen[is_given].tolist(), self.given[is_given].tolist()):
                self.replayed += len(given)
                self.differing += len(set(given) - set(live))
            chosen = torch.where(is_given[:, None], self.given, chosen)
        self.load += chosen.flatten().bincount(minlength=len(self.load))
        self.chosen, weights = chosen, scores.gather(1, chosen)
        if self.config.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights * getattr(self.config, "routed_scaling_factor", 1), chosen

    def live(self, scores: Tensor) -> Tensor:
        """[tokens, top k]"""
        if self.bias is not None:
            scores = scores + self.bias
            groups = scores.view(len(scores), self.config.n_group, -1)
            best = groups.topk(2).values.sum(-1).topk(self.config.topk_group).indices
            is_best = torch.zeros(groups.shape[:2], dtype=torch.bool).scatter(1, best, value=True)
            scores = groups.masked_fill(~is_best[:, :, None], -torch.inf).view_as(scores)
        return scores.topk(self.config.num_experts_per_tok).indices


class Reference:
    """A model whose routers do as they are told."""

    def __init__(self, path: Path) -> None:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, experts_implementation="eager")
        self.model = model.double()  # newer releases of transformers keep routers in float32
        self.gates: list[Gate] = []
        for layer in self.model.model.layers:
            if hasattr(layer.mlp, "gate"):
                layer.mlp.gate = Gate(layer.mlp.gate, self.model.config)
                self.gates.append(layer.mlp.gate)

    def log_probs(self, tokens: list[int], routing: Tensor | None) -> Tensor:
        """[length - 1]"""
        for index, gate in enumerate(self.gates):
            gate.given = None if routing is None else routing[:, index].long()
        everything = self.model(input_ids=torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return everything.gather(1, torch.tensor(tokens[1:])[:, None]).squeeze(1)

    def choices(self, tokens: list[int], routing: Tensor | None) -> Tensor:
        """[length, layers, top k]"""
        self.log_probs(tokens, routing)
        return torch.stack([gate.chosen for gate in self.gates], dim=1)

    def gradient(self, routing: list[Tensor] | None) -> dict[str, Any]:
        """What the worker says of a pass."""
        rollout_loss = expert_loss = torch.zeros((), dtype=torch.float64)
        for index, tokens in enumerate(ROLLOUTS):
            log_probs = self.log_probs(tokens, None if routing is None else routing[index])[1:]
            rollout_loss = rollout_loss - (1 + index) * log_probs.sum()
        for tokens in EXPERTS:
            expert_loss = expert_loss - self.log_probs(tokens, None).sum()
        rollout_loss = rollout_loss / sum(len(tokens) - 2 for tokens in ROLLOUTS)
        expert_loss = expert_loss / sum(len(tokens) - 1 for tokens in EXPERTS)
        loss = (1 - MU) * rollout_loss + MU * expert_loss
        loss.backward()
        gradients = [parameter.grad for parameter in self.model.parameters()]
        return {
            "loss": loss.item(),
            "grad_norm": torch.stack([gradient.norm() for gradient in gradients if gradient is not None]).norm().item(),
            "load": torch.stack([gate.load for gate in self.gates]),
            "replayed": sum(gate.replayed for gate in self.gates),
            "differing": sum(gate.differing for gate in self.gates),
        }


# --- what is recorded -------------------------------------------------------------------------------------------------


@each_case
def test_a_completion_is_drawn_by_the_experts_that_score_it(where: str, model: str, answers: Answers) -> None:
    """Prompts of several lengths in a batch, rows that end early; the last token is never read by the sampler."""
    drawn = answers[where, model]["drawn"]
    assert len({len(sequence) for sequence, _, _ in drawn}) > 1
    for sequence, sampler, trainer in drawn:
        assert sampler.dtype == torch.int16 and len(sampler) == len(sequence)
        assert (sampler[-1] == LIVE).all()
        assert_same_experts(sampler[:-1], trainer[:-1])
        assert (trainer >= 0).all()


@each_case
def test_every_layout_records_the_same(where: str, model: str, answers: Answers) -> None:
    here, alone = answers[where, model], answers[BASELINE, model]
    for (sequence, sampler, _), (expected, of_baseline, _) in zip(here["drawn"], alone["drawn"], strict=True):
        assert sequence == expected
        assert_same_experts(sampler, of_baseline)
    for key in ("scored", "moved, scored", "moved, scored under replay"):
        for routing, expected, tokens in zip(here[key], alone[key], ROLLOUTS, strict=True):
            assert len(routing) == len(tokens)
            assert_same_experts(routing, expected)


@pytest.mark.parametrize(("where", "model"), [(BASELINE, model) for model in MODELS])
def test_what_is_recorded_is_what_transformers_chooses(
    where: str, model: str, answers: Answers, model_dirs: ModelDirs
) -> None:
    first, moved = map(Reference, model_dirs[model])
    of_model = answers[where, model]
    for index, tokens in enumerate(ROLLOUTS):
        given = of_model["scored"][index]
        assert_same_experts(given, first.choices(tokens, None))
        assert_same_experts(of_model["moved, scored"][index], moved.choices(tokens, None))
        assert_same_experts(of_model["moved, scored under replay"][index], moved.choices(tokens, given))


# --- what is replayed -------------------------------------------------------------------------------------------------


@each_case
def test_replay_changes_nothing_where_the_weights_have_not_moved(where: str, model: str, answers: Answers) -> None:
    """Bitwise: the first step of a generation batch."""
    first = answers[where, model]["first"]
    replayed, live = first["scored"], first["live"]
    assert (replayed["loss"], replayed["grad_norm"]) == (live["loss"], live["grad_norm"])
    assert replayed["load"].equal(live["load"])
    assert (replayed["differing"], live["replayed"], live["differing"]) == (0, 0, 0)
    read_again = 3 * 2 if LAYOUTS[where]["shares_prompts"] else 0  # tokens of prompts that are read once
    scored = answers[where, model]["scored"]
    assert replayed["replayed"] == (sum(map(len, scored)) - read_again) * scored[0][0].numel()


@each_case
def test_moved_weights_are_served_by_the_recorded_experts(where: str, model: str, answers: Answers) -> None:
    """Where the routers themselves would choose others."""
    here = answers[where, model]
    assert any(not a.equal(b) for a, b in zip(here["scored"], here["moved, scored"], strict=True))
    for chosen, given in zip(here["moved, scored under replay"], here["scored"], strict=True):
        assert_same_experts(chosen, given)
    replayed, live = here["moved"]["scored"], here["moved"]["live"]
    assert 0 < replayed["differing"] < 0.5 * replayed["replayed"]
    assert abs(replayed["loss"] - live["loss"]) > 1e-3 * abs(live["loss"])


@each_case
@pytest.mark.parametrize("given", ["live", "scored", "shifted"])
def test_gradients_are_those_of_float64(
    where: str, model: str, given: str, answers: Answers, references: References, measure: Callable[[str, float], None]
) -> None:
    """Of moved weights, with rollouts by the routers' choice, the recorded one, and any; of expert rows by choice."""
    found, expected = answers[where, model]["moved"][given], references(model, given)
    for key in ("load", "replayed", "differing") if not LAYOUTS[where]["shares_prompts"] else ():
        assert torch.as_tensor(found[key]).equal(torch.as_tensor(expected[key])), key
    for key in ("loss", "grad_norm"):
        error = abs(found[key] - expected[key]) / abs(expected[key])
        measure(f"{key} under router replay, {where} from float64", error)
        assert error <= 1e-6


@each_case
def test_gradients_are_the_same_under_every_layout(
    where: str, model: str, answers: Answers, measure: Callable[[str, float], None]
) -> None:
    here, alone = answers[where, model]["moved"], answers[BASELINE, model]["moved"]
    for given in ("scored", "shifted"):
        for key in ("loss", "grad_norm"):
            error = abs(here[given][key] - alone[given][key]) / abs(alone[given][key])
            measure(f"{key} under router replay, {where} from {BASELINE}", error)
            assert error <= 1e-6


@each_case
def test_log_probs_are_replayed_and_the_reference_model_routes_by_itself(
    where: str, model: str, answers: Answers, model_dirs: ModelDirs
) -> None:
    found = answers[where, model]["log-probs"]
    reference = Reference(model_dirs[model][0])
    with torch.no_grad():
        for index, tokens in enumerate(ROLLOUTS):
            shifted = reference.log_probs(tokens, answers[where, model]["shifted"][index])
            live = reference.log_probs(tokens, None)
            assert (shifted - live).abs().max() > 0.01
            for kind, expected in (("shifted", shifted), ("live", live), ("reference", live)):
                actual = found[kind][2 * index][2:].double()
                torch.testing.assert_close(actual, expected[1:], atol=1e-5, rtol=0)


def assert_same_experts(found: Tensor, expected: Tensor) -> None:
    """Of each token in each layer, in any order."""
    assert found.sort(-1).values.long().equal(expected.sort(-1).values.long())
