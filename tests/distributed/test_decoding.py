"""The embedded engine draws the same, whichever rows it decodes together, and reads each prompt once.

Prompts of several lengths and generations, in batches that cut groups, under every kind of layout; what is compared
with is each row by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import launch
from selection import selected
from tiny_families import EP_2, PP_2, TP_2, VOCAB_SIZE, VPP_2

pytestmark = pytest.mark.distributed

HERE = Path(__file__).parent
PP_3 = {"pipeline_model_parallel_size": 3, "pipeline_layout": [1, 3, 0]}
# Processes and settings.
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "TP 1": (1, {}),
    "TP 2 + SP": (2, TP_2),
    "PP 2": (2, PP_2),
    "PP 2 x VPP 2": (2, PP_2 | VPP_2),
    "DP 2": (2, {}),
    "EP 2": (2, EP_2),
    "PP 3, uneven": (3, PP_3),
    "PP 3 x VPP 2": (3, {"pipeline_model_parallel_size": 3, "pipeline_layout": [0, 1, 1, 1, 1, 0]} | VPP_2),
    "TP 2 + SP x PP 2": (4, TP_2 | PP_2),
    "PP 2 x EP 2": (4, PP_2 | EP_2),
    "PP 2 x VPP 2 x EP 2": (4, PP_2 | VPP_2 | EP_2),
}
# Llama, latent attention and experts; every kind of layout, and every kind of cache in a pipeline.
IN_SHORT = (
    *((layout, "llama") for layout in ("TP 1", "PP 2 x VPP 2", "DP 2", "PP 3, uneven")),
    *((layout, "deepseek_v3") for layout in ("TP 1", "TP 2 + SP", "PP 2")),
    *(("TP 1", "qwen3_moe"), ("EP 2", "qwen3_moe"), ("PP 2 x EP 2", "qwen3_moe")),
)
CASES = [
    pytest.param(layout, model, marks=() if (layout, model) in IN_SHORT else pytest.mark.slow)
    for layout in LAYOUTS
    for model in ("llama", "deepseek_v3", "qwen3_moe")
    if "EP" not in layout or model != "llama"
]
each_case = pytest.mark.parametrize(("layout", "model"), CASES)
PROMPT_LENGTHS = (3, 11, 1, 6)
NUM_GENERATIONS = 3
STOP_TOKENS = tuple(range(20))
SAMPLING = {"temperature": 0.7, "top_p": 0.9, "max_completion_length": 12, "stop_token_ids": STOP_TOKENS}
BATCH_SIZES = (256, 4, 7, 1)
Answers = dict[tuple[str, str], dict[str, Any]]  # by layout and model


def prompts() -> list[list[int]]:
    """Four, and the first one again."""
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(0, VOCAB_SIZE, (length,), generator=generator).tolist() for length in PROMPT_LENGTHS]
    return [*drawn, drawn[0]]


@pytest.fixture(scope="module")
def answers(
    tiny_models: Callable[..., Path], request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Answers:
    """What each selected layout and model draws; layouts of as many processes share a launch."""
    wanted = selected(request, "layout", "model")
    wanted |= {("TP 1", model) for _, model in wanted}
    models = sorted({str(model) for _, model in wanted})
    answers: Answers = {}
    for processes in (1, 2, 3, 4):
        layouts = {
            layout: (settings, [model for model in models if (layout, model) in wanted])
            for layout, (count, settings) in LAYOUTS.items()
            if count == processes
        }
        if not any(of_layout for _, of_layout in layouts.values()):
            continue
        folder = tmp_path_factory.mktemp("decoding")
        questions = {
            "models": {model: str(tiny_models(model)) for model in models},
            "layouts": layouts,
            "prompts": prompts(),
            "num_generations": NUM_GENERATIONS,
            "sampling": SAMPLING,
            "batch_sizes": BATCH_SIZES,
        }
        (folder / "questions.json").write_text(json.dumps(questions), encoding="utf-8")
        launch(HERE / "decoding_worker.py", folder / "questions.json", folder / "answers.pt", processes=processes)
        answers |= torch.load(folder / "answers.pt", weights_only=True)
    return answers


@each_case
def test_rows_decoded_together_draw_what_each_draws_alone(
    layout: str, model: str, answers: Answers, measure: Callable[[str, float], None]
) -> None:
    """Alone under the same layout, where fewer rows than stages are, and in one process."""
    here, expected = answers[layout, model], answers["TP 1", model]["alone"]
    lengths = [len(tokens) for tokens, _ in expected]
    assert len(set(lengths)) > 4 and max(lengths) == SAMPLING["max_completion_length"]
    for name, drawn in (("alone", here["alone"]), ("together", here["together"]), *here["rollout"].items()):
        assert [tokens for tokens, _ in drawn] == [tokens for tokens, _ in expected], name
        pairs = zip(drawn, expected)
        error = max(abs(a - b) for (_, ours), (_, theirs) in pairs for a, b in zip(ours, theirs, strict=True))
        measure(f"log-probs of what is drawn, {layout} from each row alone", error)
        assert error <= 1e-5, name


# (prompts, longest) of what is read at first; 15 rows of prompts 0, 1, 2, 3 and 0, three of each.
READ_TOGETHER = {
    1: [(4, 11)],
    2: [(3, 11), (3, 6)],  # rows 0-6 and 7-14
    3: [(2, 11), (3, 11), (2, 6)],  # rows 0-4, 5-9 and 10-14
}
READ_BY_REPLICA = {
    (1, 256): [[(4, 11)]],
    (1, 4): [[(2, 11), (2, 11), (2, 6), (1, 3)]],
    (2, 256): [[(3, 11)], [(3, 6)]],  # rows 0-6, and 7-14
    (2, 4): [[(2, 11), (2, 11)], [(2, 6), (2, 6)]],
    (2, 7): [[(3, 11)], [(3, 6), (1, 3)]],
}


@each_case
def test_each_prompt_is_read_once_a_cohort(layout: str, model: str, answers: Answers) -> None:
    stages = LAYOUTS[layout][1].get("pipeline_model_parallel_size", 1)
    assert answers[layout, model]["read"]["together"] == READ_TOGETHER[stages]


@pytest.mark.parametrize(("layout", "model"), [case for case in CASES if "PP" not in case.values[0]])
def test_the_completions_of_a_prompt_stay_on_one_replica(layout: str, model: str, answers: Answers) -> None:
    """Where its share and the largest batch allow."""
    read = answers[layout, model]["read"]
    replicas = len(read[256])
    for (count, size), expected in READ_BY_REPLICA.items():
        if count == replicas:
            idle = [(1, 1)] if (layout, size) == ("EP 2", 7) else []  # for the other replica's sake
            assert read[size] == [expected[0] + idle, *expected[1:]]
