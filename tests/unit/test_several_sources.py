"""Several sources in one data set: their spelling, the order in which their rows come, and what is said of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from chord_megatron.config import ChordConfig, Config, DataConfig, load_config, to_yaml
from chord_megatron.config_types import DataSource, sources_of
from chord_megatron.data.cursor import MixedCursor, ShuffledCursor
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.data.mixture import cursor_over, names_of, weights_of
from chord_megatron.data.samples import columns_of, lengths_of
from chord_megatron.data.vocabulary import check_vocabulary
from chord_megatron.planning.resuming import changes
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.step_metrics import rollout_metrics
from chord_megatron.types import Prompt, ScoredRollouts
from tests.unit.chat_templates import QWEN25, tokenizer_of

TOKENIZER = tokenizer_of(QWEN25)
MINIMAL: dict[str, Any] = {
    "model": {"path": "m"},
    "train": {"output_dir": "runs/x", "global_batch_size": 8, "train_iters": 4},
}


def configured(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return load_config(path, list(overrides))


# spelling


def test_a_source_is_a_path_or_a_path_with_a_weight(tmp_path: Path):
    config = configured(tmp_path, "data.dataset=[a.jsonl, {path: b.parquet, weight: 2.0}, {path: org/c}]")
    expected = ["a.jsonl", DataSource(path="b.parquet", weight=2.0), DataSource(path="org/c")]
    assert config.data.dataset == expected
    assert sources_of(config.data.dataset) == [DataSource(path="a.jsonl"), *expected[1:]]
    assert sources_of("a.jsonl") == [DataSource(path="a.jsonl")]


def test_what_is_written_down_is_read_back_as_the_same(tmp_path: Path):
    config = configured(tmp_path, "data.dataset=[a.jsonl, {path: b.parquet, weight: 2.0}]")
    (tmp_path / "again.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "again.yaml") == config
    groups = yaml.safe_load(to_yaml(config))
    before = {f"{group}.{key}": value for group, keys in groups.items() for key, value in keys.items()}
    assert changes(before, config, "runs/x") == []
    other = configured(tmp_path, "data.dataset=[a.jsonl, {path: b.parquet, weight: 3.0}]")
    with pytest.raises(UserError, match=r"^runs/x holds a run with data.dataset=\[.*2.0\}\], but this one has \[.*3.0"):
        changes(before, other, "runs/x")


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ("[]", "data.dataset=[]: must not be empty"),
        ("5", "data.dataset=5: must be text; put it in quotes"),
        ("{path: a.jsonl}", "data.dataset={'path': 'a.jsonl'}: one source is its path alone, several are a list"),
        ("[a.jsonl, 5]", "data.dataset.1=5: must be text; put it in quotes"),
        ("[{weight: 1.0}]", "configuration key 'data.dataset.0.path' is required"),
        ("[{path: a, weight: 0.0}]", "data.dataset.0.weight=0.0: must be at least 1e-06"),
        ("[{path: a, weight: .inf}]", "data.dataset.0.weight=inf: must be a finite number"),
        (
            "[{path: a, weihgt: 1}]",
            "data.dataset.0={'path': 'a', 'weihgt': 1}: unknown key 'weihgt'; a source has path and weight",
        ),
        (
            "[a.jsonl, b, {path: a.jsonl}]",
            "data.dataset=['a.jsonl', 'b', {'path': 'a.jsonl'}]: names 'a.jsonl' twice; name it once, with the weight "
            "of both",
        ),
    ],
)
def test_other_spellings_are_refused(value: str, sentence: str, tmp_path: Path):
    with pytest.raises(UserError) as error:
        configured(tmp_path, f"data.dataset={value}")
    assert str(error.value) == sentence


def test_without_any_weight_each_row_comes_as_often_as_any_other():
    a, b = DataSource(path="a"), DataSource(path="b")
    assert weights_of([a, b], [7, 100]) == [7.0, 100.0]
    assert weights_of([a, DataSource(path="b", weight=3.0)], [7, 100]) == [1.0, 3.0]


def test_names_are_the_last_parts_of_paths_where_these_differ():
    assert names_of(["data/a.jsonl", "openai/gsm8k:main", "c/"]) == ["a.jsonl", "gsm8k:main", "c"]
    assert names_of(["one/train.jsonl", "two/train.jsonl"]) == ["one/train.jsonl", "two/train.jsonl"]


# order


def places(cursor: MixedCursor, count: int, sizes: Sequence[int]) -> str:
    """The source of each of the next rows, as a letter."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    return "".join("abc"[next(i for i, end in enumerate(ends) if row < end)] for row in cursor.next(count))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        # (drawn + 1/2) / weight: 1/2 and 1/4; 1/2, 3/4; 3/2, 3/4; 3/2, 5/4; 3/2, 7/4; 5/2, 7/4.
        ([1.0, 2.0], "babbab" * 3),
        ([1.0, 1.0], "ab" * 9),  # of equal ones the first
        ([2.0, 1.0, 1.0], "abca" * 4),  # 1/4, 1/2, 1/2; 3/4, ...; then 3/4, 3/2, 3/2; then as at first
        ([1e-6, 1e6], "b" * 18),
    ],
)
def test_sources_take_turns_by_weight(weights: list[float], expected: str):
    sizes = [2, 4, 3][: len(weights)]
    assert places(MixedCursor(sizes, weights, seed=0), len(expected), sizes) == expected


def test_in_the_ratio_of_their_sizes_sources_end_their_epochs_together():
    drawn = MixedCursor([3, 9], [3.0, 9.0], seed=5).next(24)
    assert sorted(drawn[:12]) == sorted(drawn[12:]) == list(range(12))


def test_each_source_has_an_order_of_its_own_and_the_first_the_one_that_it_has_alone():
    drawn = MixedCursor([50, 50], [1.0, 1.0], seed=3).next(300)
    first, second = [row for row in drawn if row < 50], [row - 50 for row in drawn if row >= 50]
    assert first == ShuffledCursor(50, 3).next(150)
    assert second == ShuffledCursor(50, 3 + 2**32).next(150)
    assert first != second


@pytest.mark.parametrize("drawn", range(12))
def test_a_resumed_mixture_goes_on_with_the_same_rows(drawn: int):
    sizes, weights = [2, 3], [1.0, 2.5]
    cursor = MixedCursor(sizes, weights, seed=1)
    cursor.next(drawn)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = MixedCursor(sizes, weights, seed=1)
    resumed.next(5)
    resumed.load_state_dict(state)
    assert resumed.next(20) == cursor.next(20)
    assert resumed.state_dict() == cursor.state_dict()


def test_another_mixture_is_refused():
    state = MixedCursor([2, 3], [1.0, 2.0], seed=1).state_dict()
    with pytest.raises(UserError, match=r"weights changed since the checkpoint: weights were \[1.0, 2.0\], now \[2.0"):
        MixedCursor([2, 3], [2.0, 2.0], seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="size was 3, now 4"):
        MixedCursor([2, 4], [1.0, 2.0], seed=1).load_state_dict(state)
    with pytest.raises(UserError, match="weights were those of one source, now"):
        MixedCursor([2, 3], [1.0, 2.0], seed=1).load_state_dict(ShuffledCursor(5, 1).state_dict())


# rows


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def load(dataset: Any, experts: Any = None, **data: Any) -> RunData:
    chord = ChordConfig(chord_sft_dataset=experts)
    return load_run_data(DataConfig(dataset=dataset, **data), chord, TOKENIZER, expert_max_length=500)


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Of two rows and three, the first of which is bad."""
    easy = [{"prompt": f"easy {n}", "answer": str(n), "level": n} for n in range(2)]
    hard = [{"prompt": "", "answer": "1"}, *({"prompt": f"hard {n}", "answer": str(n)} for n in range(1, 3))]
    return [write(tmp_path / "easy.jsonl", easy), write(tmp_path / "hard.jsonl", hard)]


def test_rows_are_numbered_through_and_know_their_source(paths: list[str]):
    data = load([paths[0], {"path": paths[1], "weight": 2.0}], experts=paths, on_bad_row="skip")
    assert [(prompt.id, prompt.source, prompt.reference) for prompt in data.prompts] == [
        (0, "easy.jsonl", "0"),
        (1, "easy.jsonl", "1"),
        (3, "hard.jsonl", "1"),
        (4, "hard.jsonl", "2"),
    ]
    assert [expert.id for expert in data.experts] == [0, 1, 3, 4]
    assert [prompt.id for prompt in data.prompts[1:3]] == [1, 3] and data.prompts[-1].id == 4
    assert list(lengths_of(data.prompts)) == [(prompt.id, len(prompt.tokens)) for prompt in data.prompts]
    assert columns_of(data.prompts) == ["answer", "level"]
    assert data.notes[-1] == f"rows drawn: {paths[0]} 33.3% of 2, {paths[1]} 66.7% of 2"


def test_a_list_of_one_is_that_one(paths: list[str]):
    alone, listed = load(paths[0]), load(paths[:1])
    assert listed == alone and isinstance(listed.prompts, list) and listed.prompts[0].source == ""
    assert fingerprint(listed.prompts) == fingerprint(alone.prompts)
    assert cursor_over(listed.prompts, 4).state_dict() == ShuffledCursor(2, 4).state_dict()


def test_no_row_moves_from_one_source_to_the_next_unseen(tmp_path: Path):
    rows = [{"prompt": f"{n}", "answer": "1"} for n in range(4)]
    names = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    found = set()
    for cut in (1, 2, 3):
        found.add(fingerprint(load([write(names[0], rows[:cut]), write(names[1], rows[cut:])]).prompts))
    assert len(found) == 3


def test_a_token_that_the_model_lacks_is_named_by_its_source_and_row(paths: list[str], tmp_path: Path):
    data = load(paths, on_bad_row="skip")
    config = Config.model_validate({**MINIMAL, "data": {"dataset": paths}})
    largest = max(token for prompt in data.prompts for token in prompt.tokens)
    eos = SimpleNamespace(eos_token_id=0)
    check_vocabulary(config, eos, largest + 1, data)
    only_hard = [part._replace(samples=[]) for part in data.prompts.parts[:1]] + [*data.prompts.parts[1:]]  # type: ignore[attr-defined]
    hard = type(data.prompts)(only_hard)  # type: ignore[call-arg]
    shown = RunData(hard, [], [], frozenset({0}), ())
    with pytest.raises(UserError, match=rf"^{paths[1]} row 1 has token {largest}, of which a model of vocab_size"):
        check_vocabulary(config, eos, largest, shown)


# metrics


def test_rewards_are_told_by_source():
    sources = ["a", "a", "b", "", "c"]
    prompts = tuple(Prompt(0, "", (1,), "", source=source) for source in sources)
    rewards = (1.0, 0.5, float("nan"), 7.0, 2.0)
    rollouts = tuple(SimpleNamespace(response_mask=[1], finish_reason="stop", sum=0) for _ in sources)
    for rollout in rollouts:
        rollout.response_mask = SimpleNamespace(sum=lambda: 1)
    metrics = rollout_metrics(ScoredRollouts(prompts, rollouts, rewards, {}, (0,) * 5))  # type: ignore[arg-type]
    found = {name: value for name, value in metrics.items() if name.startswith("reward_by_source/")}
    assert found == {"reward_by_source/a": 0.75, "reward_by_source/b": None, "reward_by_source/c": 2.0}
