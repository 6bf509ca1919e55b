"""Each model family, tied and untied, against transformers: weights, log-probs, greedy completions, the reference."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from safetensors.torch import load_file
from selection import selected
from tiny_families import CP_2, EP_2, PP_2, TP_2, VOCAB_SIZE, WITH_EXPERTS
from tiny_families import MODELS as NAMES
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from chord_megatron.config import ParallelConfig
from chord_megatron.planning.memory import stage_parameters
from chord_megatron.weights.hf_config import read_architecture

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
MODELS = [f"{name} untied" for name in NAMES] + [f"{name} tied" for name in ("llama", "qwen2", "qwen3_moe")]
MODELS.append("qwen2 said to be tied")  # with a head of its own, which transformers 5 keeps
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 1": (1, {}),
    "TP 2 + SP": (2, TP_2),
    "PP 2": (2, PP_2),
    # The last stage is the head alone: latent attention, and dense layers before those with experts, on uneven stages.
    "PP 3, uneven": (3, {"pipeline_model_parallel_size": 3, "pipeline_layout": [1, 3, 0]}),
    "EP 2": (2, EP_2),
    "TP 2 + SP x EP 2": (2, TP_2 | EP_2),
    "CP 2": (2, CP_2),
    "CP 2 x EP 2": (2, CP_2 | EP_2),  # a sequence's tokens on both ranks, which serve each other's experts
}


def in_short(layout: str, model: str) -> bool:
    """Every model at TP 1 and TP 2 + SP; one of each architecture, or one alone, under the other layouts."""
    if layout == "PP 3, uneven":  # tests/distributed/test_exactness.py has what this one lacks
        return model == "deepseek_v3 untied"
    return layout in ("TP 1", "TP 2 + SP") or model in ("llama tied", "qwen3_moe untied", "deepseek_v3 untied")


# Expert parallelism needs experts.
CASES = [
    pytest.param(layout, model, marks=() if in_short(layout, model) else pytest.mark.slow)
    for layout in LAYOUTS
    for model in MODELS
    if "EP" not in layout or model.startswith(WITH_EXPERTS)
]
each_case = pytest.mark.parametrize(("layout", "model"), CASES)
SEQUENCE_LENGTHS = (30, 1, 17, 2, 9)
PROMPT_LENGTHS = (3, 11, 1, 6)
Answers = dict[tuple[str, str], dict[str, Any]]  # by layout and model
STOP_TOKENS = tuple(range(20))
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_completion_length": 12, "stop_token_ids": STOP_TOKENS}


def random_sequences(lengths: tuple[int, ...]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


SEQUENCES, PROMPTS = random_sequences(SEQUENCE_LENGTHS), random_sequences(PROMPT_LENGTHS)


@pytest.fixture(scope="module")
def model_dirs(tiny_models: Callable[..., Path]) -> dict[str, Path]:
    def options(model: str) -> dict[str, bool]:
        return {"said_tied": True} if "said" in model else {"tied": model.endswith(" tied")}

    return {model: tiny_models(model.split()[0], **options(model)) for model in MODELS}


@pytest.fixture(scope="module")
def answers(
    model_dirs: dict[str, Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """What the engine says of each selected model and layout; layouts of as many processes share a launch."""
    wanted = selected(request, "layout", "model")
    wanted |= {("TP 1", model) for _, model in wanted}
    answers: Answers = {}
    for processes in (1, 2, 3):
        folder = tmp_path_factory.mktemp("answers")
        questions = {
            "models": {model: str(path) for model, path in model_dirs.items()},
            "layouts": {
                layout: (settings, [model for model in MODELS if (layout, model) in wanted])
                for layout, (count, settings) in LAYOUTS.items()
                if count == processes
            },
            "sequences": SEQUENCES,
            "prompts": PROMPTS,
            "sampling": SAMPLING,
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        launch(HERE / "models_worker.py", folder / "questions.json", folder / "answers.pt", processes=processes)
        answers |= torch.load(folder / "answers.pt", weights_only=True)
    return answers


@pytest.fixture(scope="module")
def expected(model_dirs: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """What transformers says of each model."""
    models = {name: AutoModelForCausalLM.from_pretrained(path) for name, path in model_dirs.items()}
    return {
        name: {
            "log_probs": [log_probs(model, tokens) for tokens in SEQUENCES],
            "greedy": [greedy_completion(model, tokens) for tokens in PROMPTS],
        }
        for name, model in models.items()
    }


@torch.no_grad()
def log_probs(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """[length], 0 at the first token."""
    logits = model(input_ids=torch.tensor([tokens])).logits[0, :-1]
    chosen = torch.log_softmax(logits, dim=-1).gather(1, torch.tensor(tokens[1:], dtype=torch.int64)[:, None])
    return torch.cat([torch.zeros(1), chosen.squeeze(1)])


def greedy_completion(model: PreTrainedModel, tokens: list[int]) -> list[int]:
    """The completion with its stop token."""
    output = model.generate(
        torch.tensor([tokens]),
        attention_mask=torch.ones(1, len(tokens), dtype=torch.int64),
        max_new_tokens=SAMPLING["max_completion_length"],
        do_sample=False,
        eos_token_id=list(STOP_TOKENS),
        pad_token_id=0,
    )
    return output[0, len(tokens) :].tolist()


@each_case
def test_weights_come_back_bitwise(layout: str, model: str, answers: Answers, model_dirs: dict[str, Path]) -> None:
    assert_same_tensors(answers[layout, model]["weights"], load_file(model_dirs[model] / "model.safetensors"))


@each_case
def test_every_rank_holds_as_many_parameters_as_estimated(
    layout: str, model: str, answers: Answers, model_dirs: dict[str, Path]
) -> None:
    stages = stage_parameters(read_architecture(model_dirs[model]), ParallelConfig(**LAYOUTS[layout][1]))
    found = answers[layout, model]["num_parameters"]
    assert found == [(stage, stages[stage].dense + stages[stage].expert) for stage, _ in found]
    assert {stage for stage, _ in found} == set(range(len(stages)))


@each_case
def test_log_probs_are_those_of_transformers(
    layout: str, model: str, answers: Answers, expected: dict, measure: Callable[[str, float], None]
) -> None:
    pairs = zip(answers[layout, model]["log_probs"], expected[model]["log_probs"], strict=True)
    error = max((actual - wanted).abs().max().item() for actual, wanted in pairs)
    measure(f"log-probs, {layout} from transformers", error)
    assert error <= 1e-5


@each_case
def test_sampler_and_trainer_have_the_same_log_probs(layout: str, model: str, answers: Answers) -> None:
    """At a temperature and before top-p, with prompts of several lengths in one batch."""
    completions = answers[layout, model]["sampled"]
    assert len({len(tokens) for tokens, _ in completions}) > 1
    for (tokens, sampler), trainer in zip(completions, answers[layout, model]["log_probs_of_sampled"], strict=True):
        assert not set(tokens[:-1]) & set(STOP_TOKENS)
        torch.testing.assert_close(torch.tensor(sampler), trainer[-len(tokens) :], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("layout", "model"), [case for case in CASES if case.values[0] == "TP 2 + SP x EP 2"])
def test_ranks_agree_on_a_token_that_they_draw_differently(layout: str, model: str, answers: Answers) -> None:
    """As rounding makes them: experts compute the tensor-parallel ranks' copies of a token as other rows."""
    of_model = answers[layout, model]
    assert of_model["sampled_astray"] == [of_model["sampled"]] * 2


@each_case
def test_greedy_completions_are_those_of_transformers(
    layout: str, model: str, answers: Answers, expected: dict
) -> None:
    assert answers[layout, model]["greedy"] == expected[model]["greedy"]


@each_case
def test_a_training_step_is_the_same_under_every_layout(
    layout: str, model: str, answers: Answers, measure: Callable[[str, float], None]
) -> None:
    """Loss and gradient norm, also of experts on other ranks and of latent attention."""
    here, alone = answers[layout, model], answers["TP 1", model]
    errors = [abs(here[key] - alone[key]) / alone[key] for key in ("loss", "grad_norm")]
    measure(f"loss and gradient norm of any family, {layout} from TP 1", max(errors))
    assert max(errors) <= 1e-5


@each_case
def test_a_prompt_read_once_changes_nothing(
    layout: str, model: str, answers: Answers, measure: Callable[[str, float], None]
) -> None:
    """Log-probs and gradient norm of rows that share it, under every kind of attention."""
    (shared, norm), (apart, norm_apart) = answers[layout, model]["shared"], answers[layout, model]["apart"]
    error = max((ours - theirs).abs().max().item() for ours, theirs in zip(shared, apart, strict=True))
    measure(f"log-probs of any family, shared prompts, {layout}", error)
    assert error <= 1e-5 and norm == pytest.approx(norm_apart, rel=1e-5)


@each_case
def test_the_reference_stays_frozen(layout: str, model: str, answers: Answers) -> None:
    """After a training step it has the log-probs from before, and asking for them changes no weight."""
    of_model = answers[layout, model]
    for before, after, reference in zip(*(of_model[k] for k in ("log_probs", "trained_log_probs", "ref_log_probs"))):
        assert torch.equal(before, reference)
        assert len(before) == 1 or not torch.allclose(before, after, atol=1e-2)
    assert_same_tensors(of_model["weights_after_reference"], of_model["trained_weights"])


def assert_same_tensors(actual: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert actual.keys() == wanted.keys()
    different = [name for name in wanted if not torch.equal(actual[name], wanted[name])]
    assert not different
