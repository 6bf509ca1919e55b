"""`chord-megatron data show`: what is shown of rows, what is found in them, as text, JSON and a page."""

from __future__ import annotations

import io
import json
import re
import shutil
from html.parser import HTMLParser
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import constants
from rich.console import Console
from typer.testing import CliRunner

from chord_megatron.batching.samples import expert_training_samples
from chord_megatron.cli import app
from chord_megatron.config import Config
from chord_megatron.config_types import DataSource
from chord_megatron.data.conversations import Conversation
from chord_megatron.data.turns import build_turns
from chord_megatron.inspection.duplicates import Repeated, find_duplicates, find_repeats, question_of
from chord_megatron.inspection.findings import findings
from chord_megatron.inspection.lengths import Bin, measure_lengths
from chord_megatron.inspection.lines import role_groups
from chord_megatron.inspection.look import Inspection, inspect_data
from chord_megatron.inspection.page import page_of
from chord_megatron.inspection.reading import experts_as, read_set
from chord_megatron.inspection.references import cut_short
from chord_megatron.inspection.spans import Span, make_spans
from chord_megatron.inspection.text import print_inspection
from chord_megatron.inspection.visible import beginning, ending, visible
from chord_megatron.types import ExpertSample
from tests.unit.chat_templates import GLM4, LLAMA31, MISTRAL, QWEN3, QWEN25, R1_DISTILL, ChatModel, tokenizer_of

CONFIGS = Path(__file__).parents[1] / "data" / "configs"
MODELS = (QWEN25, QWEN3, LLAMA31, MISTRAL, R1_DISTILL, GLM4)
EXPERTS = [
    {"prompt": "1+1?", "answer": "It is 2"},
    {"prompt": "数学：一加一？", "answer": "答案是 2 🎉👩‍👩‍👧"},
    {"prompt": "كم 1+1؟", "answer": "الجواب ٢"},
    {"prompt": '<b>1+1</b> & "x"?', "answer": "<script>alert(1)</script>"},
    {"prompt": [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}], "answer": "2"},
    {"prompt": "1+1?", "answer": [["It is ", 1], ["two, ", 0], ["2 🎉", 0.5]]},
]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config_of(folder: Path, *, prompts: Any = None, held_out: Any = None, experts: Any = None, **groups: Any) -> Config:
    """Of rows that are written into the folder; **groups: further keys of groups."""
    paths = {
        name: write_rows(folder / f"{name}.jsonl", rows)
        for name, rows in (("prompts", prompts), ("held_out", held_out), ("experts", experts))
        if rows is not None
    }
    settings = {
        "model": {"path": "tiny"},
        "data": {"dataset": paths.get("prompts"), "eval_dataset": paths.get("held_out"), **groups.pop("data", {})},
        "chord": {"chord_sft_dataset": paths.get("experts"), **groups.pop("chord", {})},
        "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 1},
        **groups,
    }
    return Config.model_validate(settings)


def inspect(config: Config, model: ChatModel = QWEN25, **options: Any) -> Inspection:
    settings = {"model_length": 10_000, "expert_max_length": 500, "sample": 1000, "show": 3, **options}
    return inspect_data(config, tokenizer_of(model), **settings)


def printed(found: Inspection, **options: Any) -> str:
    file = io.StringIO()
    print_inspection(found, Console(file=file, width=80, **options))
    return "\n".join(line.rstrip() for line in file.getvalue().splitlines())


# Spans.


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.eos)
def test_what_is_marked_is_what_is_learnt(tmp_path, model):
    """Token by token, against what a run makes of the same rows."""
    tokenizer = tokenizer_of(model)
    config = config_of(tmp_path, experts=[row for row in EXPERTS if model is not R1_DISTILL] or THOUGHTS)
    turns = build_turns(tokenizer, "chat", None, {})
    source = experts_as(config, str(tmp_path / "experts.jsonl"), turns, tokenizer, 500)
    read = read_set(source, turns, 1000, 1000)
    shown = inspect(config, model, show=100).data_sets[0].shown
    assert len(shown) == len(read.kept) > 0
    for row, kept in zip(shown, read.kept, strict=True):
        sample = kept.sample
        assert isinstance(sample, ExpertSample)
        training = expert_training_samples([sample])[0]
        weights = training.loss_mask * training.token_weights
        assert [token for span in row.spans for token in span.tokens] == list(sample.tokens)
        assert [span.weight for span in row.spans for _ in span.tokens] == weights.tolist()
        assert row.trained == int((weights > 0).sum())
        assert "".join(span.text for span in row.spans) == tokenizer.decode(sample.tokens)
        assert all(span.role == "assistant" for span in row.spans if span.weight)


THOUGHTS = [{"prompt": "1+1?", "answer": "<think>\nadd 🎉\n</think>\n\n2"}]


def groups_of(spans: tuple[Span, ...]) -> list[tuple[str, str, list[float]]]:
    return [
        (role, "".join(span.text for span in group), [weight for weight, _ in groupby(span.weight for span in group)])
        for role, group in role_groups(spans)
    ]


@pytest.mark.parametrize(
    ("model", "row", "expected"),
    [
        (
            QWEN25,
            {"prompt": "1+1?", "answer": "It is 2"},
            [
                ("template", "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", [0]),
                ("user", "1+1?", [0]),
                ("template", "<|im_end|>\n<|im_start|>assistant\n", [0]),
                ("assistant", "It is 2<|im_end|>", [1]),
            ],
        ),
        (
            MISTRAL,
            EXPERTS[4],
            [
                ("template", "<s>[INST] ", [0]),
                ("system", "Add.", [0]),
                ("template", "\n\n", [0]),
                ("user", "1+1?", [0]),
                ("template", "[/INST]", [0]),
                ("assistant", " 2</s>", [1]),
            ],
        ),
        (  # the template opens the thought: it is the model's turn, and is not learnt
            R1_DISTILL,
            THOUGHTS[0],
            [
                ("template", "<｜begin▁of▁sentence｜><｜User｜>", [0]),
                ("user", "1+1?", [0]),
                ("template", "<｜Assistant｜>", [0]),
                ("assistant", "<think>\nadd 🎉\n</think>\n\n2<｜end▁of▁sentence｜>", [0, 1]),
            ],
        ),
        (  # parts of an answer that weigh differently
            QWEN25,
            EXPERTS[5],
            [
                ("template", "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", [0]),
                ("user", "1+1?", [0]),
                ("template", "<|im_end|>\n<|im_start|>assistant\n", [0]),
                ("assistant", "It is two, 2 🎉<|im_end|>", [1, 0, 0.5]),
            ],
        ),
    ],
    ids=["qwen", "system in the question", "an opened thought", "parts"],
)
def test_roles_and_weights(tmp_path, model, row, expected):
    shown = inspect(config_of(tmp_path, experts=[row]), model).data_sets[0].shown
    assert groups_of(shown[0].spans) == expected


def test_a_span_keeps_whole_characters_and_special_tokens():
    tokenizer = tokenizer_of(QWEN3)
    tokens = tokenizer.encode("答🎉<think>é<|im_end|>")
    spans = make_spans(tokens, [0.0] * len(tokens), len(tokens), tokenizer, messages=[("user", "答🎉")])
    assert [(span.text, span.special, span.role, len(span.tokens)) for span in spans] == [
        ("答🎉", False, "user", 7),
        ("<think>", True, None, 1),
        ("é", False, None, 2),
        ("<|im_end|>", True, None, 1),
    ]


def test_a_character_that_is_learnt_in_part_is_cut_there():
    tokenizer = tokenizer_of(QWEN25)
    tokens = tokenizer.encode("é")
    spans = make_spans(tokens, [0.0, 1.0], 1, tokenizer, messages=[])
    assert [(span.text, span.weight) for span in spans] == [("�", 0.0), ("�", 1.0)]


def test_of_a_very_long_row_both_ends_are_shown():
    tokenizer = tokenizer_of(QWEN25)
    tokens = tokenizer.encode("a" * 3000 + "b" * 3000)
    weights = [0.0] * 3000 + [1.0] * 3000
    spans = make_spans(tokens, weights, 3000, tokenizer, messages=[])
    assert [(span.text[:1], len(span.tokens), span.weight) for span in spans] == [
        ("a", 2000, 0.0),
        ("…", 0, 0.0),
        ("b", 2000, 1.0),
    ]
    assert spans[1].text == "… 2000 tokens are not shown …"


def test_of_a_very_long_reference_the_end_is_shown(tmp_path):
    row = (
        inspect(config_of(tmp_path, prompts=[{"prompt": "1+1?", "answer": "x" * 10**6 + "\n#### 2"}]))
        .data_sets[0]
        .shown[0]
    )
    assert row.reference == "…" + "x" * 492 + " #### 2" and row.read_as == "2"


def test_what_cannot_be_seen_is_written_out():
    assert visible("a\tb\x1b[31m\u202e\u200b\ud800\u2028") == "a\\tb\\x1b[31m\\u202e\\u200b\\ud800\\u2028"
    assert visible("two\nlines 👩‍👩‍👧 عربي 数学") == "two\nlines 👩‍👩‍👧 عربي 数学"
    assert (beginning("a b\n c", 4), beginning("abcdef", 4), ending("abcdef", 4)) == ("a b…", "abc…", "…def")


# Lengths.


def test_quantiles_and_bins():
    lengths = measure_lengths("prompt", [3, 12, 12, 17, 48], ("data.max_prompt_length", 20))
    assert lengths is not None
    assert (lengths.smallest, lengths.median, lengths.p95, lengths.largest, lengths.mean) == (3, 12, 48, 48, 18.4)
    assert lengths.bins == (
        *(Bin(start, start + 5, count) for start, count in [(0, 1), (5, 0), (10, 2), (15, 1), (20, 0), (25, 0)]),
        *(Bin(start, start + 5, count) for start, count in [(30, 0), (35, 0), (40, 0), (45, 1)]),
    )


def test_one_length_is_one_bin():
    lengths = measure_lengths("answer", [7, 7], None)
    assert lengths is not None and lengths.bins == (Bin(7, 8, 2),)
    assert measure_lengths("answer", [], None) is None


# Duplicates.


def questions(*texts: str):
    return [question_of(row, Conversation("prompt", "text", text)) for row, text in enumerate(texts)]


def test_duplicates_exactly_and_but_for_case_and_white_space():
    train, held_out = questions("What is 1+1?", "2+2?", "3+3?"), questions("what  is\n1+1?", "2+2?", "4+4?")
    found = find_duplicates("held-out", held_out, "prompts", train)
    assert (found.of, found.exact, found.normalised) == (3, 1, 1)
    assert found.examples == (Repeated(0, 0, False), Repeated(1, 1, True))
    repeats = find_repeats("prompts", questions("a", "b", "a", "A ", "b"))
    assert (repeats.exact, repeats.normalised) == (2, 1)
    assert repeats.examples == (Repeated(2, 0, True), Repeated(3, 0, False), Repeated(4, 1, True))


def test_text_and_messages_that_ask_the_same_are_duplicates():
    """Whatever the system message is."""
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    of_messages, of_text = question_of(0, Conversation("prompt", "chat", messages)), questions("1+1?")[0]
    assert of_messages == of_text
    answered = [*messages, {"role": "assistant", "content": "2"}, {"role": "user", "content": "And 2+2?"}]
    assert question_of(0, Conversation("prompt", "chat", answered)) != of_text


# References.

PART = "data.reference_pattern takes a part of a number or word"


@pytest.mark.parametrize(
    ("reference", "text", "pattern", "expected"),
    [
        ("72", "72", None, None),
        (r"so \boxed{\frac{1}{2}}", "", None, None),
        (r"so \boxed{\frac{1}{2", "", None, ("its mark of the final answer does not end", r"so \boxed{\frac{1}{2")),
        (r"\frac{1}{2", "", None, ("a brace in it does not close", r"\frac{1}{2")),
        (r"x \in \{1, 2", "", None, None),
        ("and then ...", "", None, ("it ends in an ellipsis", "and then ...")),
        ("1", "#### 1,234", r"#### (\d+)", (PART, "1,234")),
        ("5", "#### -5", r"(\d+)$", (PART, "-5")),
        ("5", "sum: 5.", r": (\d+)", None),
        ("5", "2-5", r"-(\d+)", None),
        ("1,234", "#### 1,234", r"#### (.+)", None),
    ],
)
def test_references_that_seem_to_be_cut(reference, text, pattern, expected):
    assert cut_short(reference, text, pattern) == expected


# All of it.

PROMPTS = [
    {"prompt": "1+1?", "answer": "2"},
    {"prompt": "2+2?", "answer": "4"},
    {"prompt": "1+1?", "answer": "2"},
    {"prompt": "x" * 100, "answer": "0"},
    {"prompt": "3+3?"},
]
HELD_OUT = [{"prompt": "1+1 ?", "answer": "2"}, {"prompt": "2+2?", "answer": r"\boxed{4"}]
ANSWERS = [
    {"prompt": "1+1?", "answer": "It is #### 2"},
    {"prompt": "2+2?", "answer": "It is #### 5"},
    {"prompt": "9+9?", "answer": "It is #### 18"},
]


def test_everything_in_words(tmp_path):
    config = config_of(
        tmp_path,
        prompts=PROMPTS,
        held_out=HELD_OUT,
        experts=ANSWERS,
        data={"max_prompt_length": 140, "on_bad_row": "skip"},
    )
    found = inspect(config, show=1)
    assert findings(found) == [
        "experts: accuracy rejects 1 of 3 answers: a run learns them from the experts, and is punished for them in "
        "its own completions",
        "prompts: 1 row cannot be used; data.on_bad_row=skip: a run skips them",
        "prompts: 1 of 4 rows are longer than data.max_prompt_length=140 (up to 145 tokens), and left out",
        "held-out: 1 of 2 references seem to be cut (line 2: its mark of the final answer does not end)",
        "prompts: 1 of 4 questions come twice or more, all of them exactly",
        "held-out: 1 of 2 questions are also in the prompts, all of them exactly",
        "held-out: 1 of 2 questions are also in the experts, all of them exactly",
    ]
    assert printed(found).splitlines()[: len(findings(found)) + 1][1:] == [f"- {line}" for line in findings(found)]


def test_files_of_other_formats_among_several_sources(tmp_path):
    """What they are taken for is said, rows are named by their file, and turns that are learnt are marked."""
    (tmp_path / "alpaca").mkdir()
    for name in ("a", "b"):
        rows = [{"instruction": f"add {name}", "input": str(n), "output": str(n)} for n in range(2)]
        write_rows(tmp_path / "alpaca" / f"{name}.jsonl", [*rows, {"instruction": "add", "output": ""}])
    alpaca, few = str(tmp_path / "alpaca"), write_rows(tmp_path / "few.jsonl", PROMPTS[:2])
    roles = ("user", "assistant", "user", "assistant")
    chat = [{"role": role, "content": str(n)} for n, role in enumerate(roles)]
    chat[1]["loss"] = True
    config = config_of(tmp_path, experts=[{"messages": chat}] * 3, data={"dataset": [few, alpaca], "max_rows": 5})
    found = inspect(config, show=1)
    assert [(each.name, each.path, each.rows, each.forms) for each in found.data_sets] == [
        ("prompts 1", few, 2, ("read as plain rows: prompt (text), answer: 2",)),
        ("prompts 2", alpaca, 5, ("read as Alpaca: instruction (text), output: 4",)),
        (
            "experts",
            str(tmp_path / "experts.jsonl"),
            3,
            (
                "read as messages: messages (chat messages), final assistant message: 3",
                "beside it: answers of earlier turns: 3",
            ),
        ),
    ]
    (bad,) = found.data_sets[1].bad
    assert (bad.reason, bad.count, bad.places) == ("column 'output' is empty", 1, (f"{alpaca}/a.jsonl line 3",))
    assert found.data_sets[1].shown[0].place == f"{alpaca}/a.jsonl line 1"
    # "1" and "3" with <|im_end|>, of which a byte is a token unless it is a mark of the template
    (shown,) = found.data_sets[2].shown
    assert [span.text for span in shown.spans if span.weight > 0] == ["1", "<|im_end|>", "3", "<|im_end|>"]
    assert shown.trained == 4


@pytest.mark.parametrize(
    ("data", "columns"),
    [
        ({}, "no column 'answer', 'solution', 'ground_truth' or 'label'; data.reference_column may name another"),
        ({"reference_column": "truth"}, "no column 'truth', which data.reference_column names"),
    ],
)
def test_experts_without_any_reference_say_which_columns_were_looked_for(tmp_path, data, columns):
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    prompts = [{"prompt": "5+5?", "answer": "10", "truth": "10"}]
    config = config_of(tmp_path, prompts=prompts, experts=[{"messages": turns}], data=data)
    assert findings(inspect(config)) == [
        "experts: no row has a reference to compare its answer with: no prompt asks the same, and there is " + columns
    ]


def test_experts_are_compared_with_the_prompt_that_asks_the_same_else_with_their_own_column(tmp_path):
    config = config_of(
        tmp_path,
        prompts=[{"prompt": "1+1?", "truth": "2"}],
        experts=[
            {"prompt": " 1+1?", "answer": "#### 2"},
            {"prompt": "2+2?", "answer": "#### 5", "truth": "4"},
            {"prompt": "3+3?", "answer": "#### 6"},
        ],
        data={"reference_column": "truth"},
    )
    rewards = inspect(config).expert_rewards
    assert rewards is not None
    assert (rewards.by_prompt, rewards.by_own, rewards.without_reference, rewards.rejected) == (1, 1, 1, 1)
    function = rewards.functions[0]
    assert (function.name, function.mean, function.smallest, function.largest) == ("accuracy", 0.5, 0.0, 1.0)
    example = rewards.examples[0]
    assert (example.place, example.reference, example.read_as, example.answer) == ("line 2", "4", "5", "#### 5")


def test_an_answer_with_another_mark_than_the_one_that_is_paid_is_rejected(tmp_path):
    experts = [{"prompt": "1+1?", "answer": r"It is \boxed{2}"}]
    for answer_format, rejected, read_as in (("any", 0, []), ("boxed", 0, []), ("hash", 1, [None])):
        config = config_of(tmp_path, prompts=PROMPTS[:1], experts=experts, rewards={"answer_format": answer_format})
        rewards = inspect(config).expert_rewards
        assert rewards is not None and rewards.rejected == rejected
        assert [example.read_as for example in rewards.examples] == read_as


FUNCTION = """
import os

def length(prompts, completions, references, completion_ids, unit):
    assert os.getpid() != PARENT
    rows = zip(completion_ids, completions, unit)
    return [len(ids) - 9 if u == "tokens" else float(len(text)) for ids, text, u in rows]

def broken(completions):
    raise ValueError("no judge")
"""


def test_functions_of_the_users_are_asked_in_their_process_and_get_what_training_gives_them(tmp_path):
    """The columns of the prompt, the tokens with their end, the answer without it."""
    import os

    (tmp_path / "own.py").write_text(FUNCTION.replace("PARENT", str(os.getpid())), encoding="utf-8")
    config = config_of(
        tmp_path,
        prompts=[
            {"prompt": "1+1?", "answer": "2", "unit": "tokens"},
            {"prompt": "2+2?", "answer": "4", "unit": "text"},
        ],
        experts=[{"prompt": "1+1?", "answer": "It is 2"}, {"prompt": "2+2?", "answer": "It is 4"}],
        rewards={"reward_funcs": [f"{tmp_path / 'own.py'}:length", "accuracy"], "reward_weights": [1.0, 0.5]},
    )
    rewards = inspect(config).expert_rewards
    assert rewards is not None and rewards.error is None
    own, accuracy = rewards.functions
    assert (own.smallest, own.largest, own.rejected) == (-1.0, 7.0, 1)  # 7 bytes and an end token; 7 characters
    assert (accuracy.mean, rewards.rejected, rewards.examples[0].functions) == (1.0, 1, (own.name,))


@pytest.mark.parametrize(("train", "is_asked"), [({}, False), ({"eval_steps": 5}, True)])
def test_functions_are_asked_where_a_run_would_score_anything(tmp_path, train, is_asked):
    """With mu 1 throughout nothing is drawn, and without evaluations nothing is scored."""
    config = config_of(tmp_path, experts=ANSWERS, chord={"chord_mu_peak": 1.0, "chord_mu_valley": 1.0})
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    found = inspect(config)
    assert (found.expert_rewards is not None) == is_asked and "experts" in printed(found)


def test_a_function_that_fails_is_a_finding(tmp_path):
    (tmp_path / "own.py").write_text(FUNCTION, encoding="utf-8")
    config = config_of(
        tmp_path, prompts=PROMPTS[:2], experts=ANSWERS, rewards={"reward_funcs": [f"{tmp_path / 'own.py'}:broken"]}
    )
    found = inspect(config)
    assert found.expert_rewards is not None and found.expert_rewards.functions == ()
    assert "no judge" in findings(found)[0]


def test_a_sample_is_the_same_each_time_and_is_said(tmp_path):
    rows = [{"prompt": f"{number}?", "answer": "1"} for number in range(50)]
    config = config_of(tmp_path, prompts=[*rows, rows[0]])
    first, second = inspect(config, sample=5, show=5), inspect(config, sample=5, show=5)
    assert first == second
    data_set = first.data_sets[0]
    assert (data_set.rows, data_set.compared, data_set.sample, data_set.usable, len(data_set.shown)) == (
        51,
        51,
        5,
        5,
        5,
    )
    assert first.duplicates[0].counts.exact == 1  # of all questions
    assert "51 rows; read in tokens: a sample of 5" in printed(first)


def test_several_sources_are_looked_at_one_by_one(tmp_path):
    more = [write_rows(tmp_path / f"{name}.jsonl", rows) for name, rows in (("p", PROMPTS[1:2]), ("e", ANSWERS[1:2]))]
    config = config_of(tmp_path, prompts=PROMPTS[:3], experts=ANSWERS[:1])
    second = DataSource(path=more[0], weight=2.0)
    config = config.model_copy(
        update={
            "data": config.data.model_copy(update={"dataset": [config.data.dataset, second]}),
            "chord": config.chord.model_copy(update={"chord_sft_dataset": [config.chord.chord_sft_dataset, more[1]]}),
        }
    )
    found = inspect(Config.model_validate(config.model_dump()))
    assert [data_set.name for data_set in found.data_sets] == ["prompts 1", "prompts 2", "experts 1", "experts 2"]
    counts = {(each.counts.data_set, each.counts.other): each.counts.count for each in found.duplicates}
    assert counts == {
        **{(data_set.name, data_set.name): 0 for data_set in found.data_sets},
        ("prompts 1", "prompts 1"): 1,
        ("prompts 2", "prompts 1"): 1,
        ("experts 2", "experts 1"): 0,
    }
    assert found.expert_rewards is not None and found.expert_rewards.by_prompt == 2
    assert found.expert_rewards.examples[0].place == "experts 2 line 1"


def test_without_colour_the_brackets_say_it_and_with_colour_a_line_too(tmp_path):
    found = inspect(config_of(tmp_path, experts=ANSWERS[:1]))
    assert "⟦It is #### 2⟧⟦<|im_end|>⟧" in printed(found)
    coloured = printed(found, force_terminal=True, color_system="standard")
    trained = "\x1b[1;4;32m"
    assert f"{trained}⟦It is #### 2⟧\x1b[0m{trained}⟦<|im_end|>⟧\x1b[0m" in coloured  # bold, underlined, green


# The page.


class _Page(HTMLParser):
    """Tags, the text in each kind of them, and what could be loaded or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: dict[str, list[str]] = {}
        self.suspicious: list[Any] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("script", "link", "img", "iframe", "object", "form", "base") or any(
            name.startswith("on") or name in ("src", "href") for name, _ in attributes
        ):
            self.suspicious.append((tag, attributes))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)


def test_the_page_escapes_everything_and_loads_nothing(tmp_path):
    bad = "<img src=x onerror=alert(1)>"
    config = config_of(
        tmp_path,
        prompts=[
            {"prompt": bad, "answer": bad},
            {"prompt": bad},
            {"prompt": [{"role": bad, "content": bad}], "answer": bad},
        ],
        experts=[{"prompt": bad, "answer": f"{bad}\x1b[31m\u202e"}],
        data={"on_bad_row": "skip"},
    )
    text = page_of(inspect(config))
    page = _Page(text)
    assert page.suspicious == [] and page.open == []
    legend, *learnt = page.texts["mark"]
    assert legend == "what is marked and underlined is learnt"
    assert "".join(learnt) == f"{bad}\\x1b[31m\\u202e<|im_end|>"
    assert "http" not in text.replace("http-equiv", "") and "url(" not in text and "@import" not in text
    assert "default-src 'none'" in text
    assert re.search(r"prefers-color-scheme: dark.*max-width: 480px", text, re.DOTALL)


# The command.


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Run `data show` on a configuration file in the working directory."""
    model = tmp_path / "model"
    model.mkdir()
    shutil.copy(CONFIGS / "Qwen2.5-7B" / "config.json", model)
    tokenizer_of(QWEN25).save_pretrained(model)
    monkeypatch.chdir(tmp_path)
    config = config_of(tmp_path, prompts=PROMPTS[:3], experts=ANSWERS).model_dump()
    config["model"]["path"] = "model"
    config["data"]["dataset"], config["chord"]["chord_sft_dataset"] = "prompts.jsonl", "experts.jsonl"
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return lambda *arguments: CliRunner().invoke(app, ["data", "show", "my.yaml", *arguments])


def test_the_command_prints_and_writes_a_page(run, tmp_path):
    result = run("--html", "page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("What model reads\n- experts: accuracy rejects 1 of 3 answers")
    assert result.stdout.endswith("wrote page.html\n")
    assert "<title>What model reads</title>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_command_as_json(run):
    result = run("--json", "--rows", "2", "--show", "1")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    prompts, experts = found["data_sets"]
    assert [prompts["name"], prompts["rows"], prompts["sample"], experts["name"]] == ["prompts", 3, 2, "experts"]
    assert len(prompts["shown"]) == 1
    assert [span["text"] for span in experts["shown"][0]["spans"] if span["weight"]][-1] == "<|im_end|>"
    assert found["duplicates"][0]["counts"]["exact"] == 1
    assert found["expert_rewards"]["functions"][0]["name"] == "accuracy"


def test_a_model_of_the_hub_is_read_in_its_cache(run, tmp_path, monkeypatch):
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    shutil.copytree(tmp_path / "model", repository / "snapshots" / commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    result = run("model.path=org/tiny")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"What {repository / 'snapshots' / commit} reads\n")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--html", "prompts.jsonl"], "--html prompts.jsonl must be a file named *.html"),
        (["--html", "no/page.html"], "--html no/page.html must be a file named *.html in a folder that exists"),
        (["data.dataset=none.jsonl"], "cannot read none.jsonl: No such file or directory"),
        (["data.dataset=null", "chord.chord_sft_dataset=null"], "the configuration names no data; set data.dataset"),
        (["rewards.reward_funcs=[acuracy]"], "unknown reward function 'acuracy'"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(run, tmp_path, arguments, sentence):
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()
