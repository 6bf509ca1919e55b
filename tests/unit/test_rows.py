"""What rows may hold: values as text, JSON lines, columns by path, and what happens to a row that is unusable."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.system.errors import UserError
from tests.unit.chat_templates import QWEN25, tokenizer_of

TOKENIZER = tokenizer_of(QWEN25)
REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=60)
FINE = {"prompt": "a", "answer": "1"}


@pytest.fixture
def load(tmp_path):
    """Prompts, and experts of the same rows, out of JSON lines."""

    def load_lines(*lines: str | bytes, experts: bool = False, **data: Any) -> RunData:
        path = tmp_path / "rows.jsonl"
        path.write_bytes(b"".join((line.encode() if isinstance(line, str) else line) + b"\n" for line in lines))
        chord = ChordConfig(chord_sft_dataset=str(path)) if experts else ChordConfig()
        return load_run_data(DataConfig(dataset=str(path), **data), chord, TOKENIZER, expert_max_length=500)

    return load_lines


def row(**values: Any) -> str:
    return json.dumps({**FINE, **values})


# Values


@pytest.mark.parametrize(
    ("literal", "text"),
    [
        ("2", "2"),
        ("-0.5", "-0.5"),
        ("0.00001", "0.00001"),
        ("1e20", "100000000000000000000"),
        ("1.5e-7", "0.00000015"),
        ("2.0", "2.0"),
        ("12345678901234567890123", "12345678901234567890123"),
        ('" 2 "', "2"),
        ('"1e20"', "1e20"),
        ('"True"', "True"),
    ],
)
def test_a_reference_is_text_or_the_number_as_it_is_written(load, literal, text):
    (prompt,) = load('{"prompt": "a", "answer": ' + literal + "}").prompts
    assert prompt.reference == text


@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["a", "b"], r"column 'answer' holds a list, .*\['a', 'b'\]"),
        (
            {"ground_truth": "2", "style": "rule"},
            r"column 'answer' holds an object.*'answer\.ground_truth' or 'answer\.style'",
        ),
        ({}, r"column 'answer' holds an empty object"),
        (True, r"column 'answer' holds true or false.*True"),
        (None, r"column 'answer' is empty"),
        (" \n", r"column 'answer' is empty"),
    ],
)
def test_other_values_are_refused_by_row(load, value, message, experts):
    first = {"prompt": "a", "answer": "1", "reference": "1"}
    lines = [json.dumps(first), json.dumps({**first, "answer": value})]
    changes = {"reference_column": "reference"} if experts else {}
    with pytest.raises(UserError, match=r"rows\.jsonl:2: " + message):
        load(*lines, experts=experts, **changes)


@REPEATABLE
@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_keeps_its_value_and_has_no_exponent(number):
    from chord_megatron.data.columns import as_text

    text = as_text(number, "answer")
    assert Decimal(text) == Decimal(repr(number))
    assert not set(text) - set("-0123456789.")


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf, Decimal("NaN")])
def test_numbers_that_are_none_are_refused(number):
    from chord_megatron.data.bad_rows import BadRow
    from chord_megatron.data.columns import as_text

    with pytest.raises(BadRow, match=r"column 'answer' is not a finite number"):
        as_text(number, "answer")


# Columns by path


def test_a_dotted_path_leads_into_an_object(load):
    line = row(reward_model={"ground_truth": {"target": "2"}, "style": "rule"})
    (prompt,) = load(line, reference_column="reward_model.ground_truth.target").prompts
    assert prompt.reference == "2"
    assert prompt.columns == {"answer": "1", "reward_model": {"ground_truth": {"target": "2"}, "style": "rule"}}
    (prompt,) = load(row(**{"a.b": "3", "a": {"b": "4"}}), reference_column="a.b").prompts
    assert prompt.reference == "3"  # a column of that very name wins


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reward_model.truth", r"no column 'reward_model\.truth'; 'reward_model' has 'ground_truth', 'style'"),
        ("model.truth", r"no column 'model\.truth'; it has 'prompt', 'answer', 'reward_model'"),
        ("answer.truth", r"no column 'answer\.truth'; 'answer' is no object"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(load, path, message):
    with pytest.raises(UserError, match=message):
        load(row(reward_model={"ground_truth": "2", "style": "rule"}), reference_column=path)


# What JSON allows and text does not


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "prompt": "b", "answer": "1"}', r"rows\.jsonl:2: .*a key twice in one object: 'prompt'"),
        ('{"prompt": "a", "answer": "1", "x": {"y": 1, "y": 2}}', r"rows\.jsonl:2: .*a key twice in one object: 'y'"),
        ('{"prompt": "a", "answer": NaN}', r"rows\.jsonl:2: .*NaN"),
        ('{"prompt": "a", "answer": "1", "x": -Infinity}', r"rows\.jsonl:2: .*-Infinity"),
        ('{"prompt": "a", "answer": 1e999}', r":2: column 'answer' is not a finite number"),
        ('{"prompt": "\\ud800", "answer": "1"}', r"rows\.jsonl:2: an escape that is no character: \\ud800"),
        ('{"prompt": "a", "answer": "1", "x": ["\\udc00"]}', r"rows\.jsonl:2: .*\\udc00"),
        ('{"prompt": "a", "answer": "1", "\\udfff": 1}', r"rows\.jsonl:2: .*\\udfff"),
        (b'{"prompt": "\xff", "answer": "1"}', r"rows\.jsonl:2: not UTF-8"),
        ('{"prompt": "a", "answer": "1"', r"rows\.jsonl:2: not valid JSON: "),
        ('{"prompt": "a", "answer": ' + "1" * 5000 + "}", r"rows\.jsonl:2: .*digits"),
        ("[" * 100_000, r"rows\.jsonl:2: nested too deeply"),
        (
            '[{"prompt": "a", "answer": "1"}]',
            r"rows\.jsonl:2: no JSON object but a JSON list, where each",
        ),
        ('"a"', r"rows\.jsonl:2: .* a JSON string"),
        ("null", r"rows\.jsonl:2: .* a JSON null"),
    ],
)
def test_a_line_that_is_no_row_is_named_or_skipped(load, line, message):
    with pytest.raises(UserError, match=message):
        load(row(), line)
    data = load(row(), line, row(prompt="b"), on_bad_row="skip")
    assert [prompt.text for prompt in data.prompts] == [
        f"<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in "ab"
    ]


def test_what_json_allows_and_text_too_is_read(load):
    prompts = load(
        b"\xef\xbb\xbf" + row(prompt="bom").encode(),
        '{"prompt": "\\ud83d\\ude00 pair", "answer": "1"}\r',
        '{"prompt": "nul \\u0000", "answer": "1"}',
        '{"prompt": "not a character \\uffff", "answer": "1"}',
        "  ",
        '\t{"answer": "1", "prompt": "order"} ',
    ).prompts
    questions = [prompt.text.split("user\n")[1].split("<|im_end|>")[0] for prompt in prompts]
    assert questions == ["bom", "\U0001f600 pair", "nul \x00", "not a character \uffff", "order"]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
COLUMNS = ("prompt", "messages", "answer", "system", "tools", "images", "chat_template_kwargs")


@REPEATABLE
@given(st.lists(st.dictionaries(st.sampled_from(COLUMNS), JSON, max_size=4), min_size=1, max_size=3))
def test_any_rows_are_read_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for action in ("stop", "skip"):
        data = DataConfig(dataset=str(path), on_bad_row=action)
        chord = ChordConfig(chord_sft_dataset=str(path))
        try:
            loaded = load_run_data(data, chord, TOKENIZER, expert_max_length=500)
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert all(isinstance(prompt.reference, str) and prompt.reference.strip() for prompt in loaded.prompts)


# Unusable rows


def test_skipped_rows_are_counted_by_reason(load):
    lines = [row(), row(answer=None), row(answer=""), row(answer=["x"]), row(answer=[3]), "{", row(images=["a"])]
    data = load(*lines, on_bad_row="skip")
    assert [prompt.id for prompt in data.prompts] == [0]
    (note,) = [note for note in data.notes if "skipped 6" in note]
    assert note.endswith(
        "rows.jsonl: skipped 6 unusable rows: 1 not valid JSON (first: line 6), 2 column 'answer' is empty (first: "
        "line 2), 2 column 'answer' holds a list (first: line 4), 1 column 'images' (first: line 7)"
    )


def test_rows_that_are_all_unusable_end_the_run(load):
    with pytest.raises(UserError, match=r"rows\.jsonl: none of its 2 rows can be used: 2 column 'answer' is empty"):
        load(row(answer=None), row(answer=None), on_bad_row="skip")


def test_a_refusal_names_both_remedies(load):
    with pytest.raises(UserError, match=r":1: .*; mend the row, or set data\.on_bad_row=skip$"):
        load(row(answer=None))


# What was recognised


def test_what_a_data_set_was_taken_for_is_said_once(load):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    lines = [
        json.dumps({"messages": chat, "solution": "1", "system": "s"}),
        json.dumps({"messages": json.dumps(chat), "solution": "1"}),
        json.dumps({"prompt": "a", "solution": "1"}),
    ]
    notes = load(*lines, reference_column="solution").notes
    assert [note.split("rows.jsonl: ")[1] for note in notes] == [
        "1 row read as messages: messages (chat messages), solution; 1 row read as messages: messages (chat messages "
        "in JSON text), solution; 1 row read as plain rows: prompt (text), solution; beside it: system (1)"
    ]


def test_text_that_only_looks_like_json_stays_text(load):
    for text in ("[1, 2]", "[", '[{"a": 1}]', '{"role": "user"}', "[]"):
        (prompt,) = load(row(prompt=text)).prompts
        assert f"<|im_start|>user\n{text}<|im_end|>" in prompt.text


# Tokenizers that append their end token


def test_a_text_prompt_ends_without_an_end_token(load):
    from tokenizers import processors

    tokenizer = tokenizer_of(QWEN25)
    end = tokenizer.eos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A <|endoftext|>",
        special_tokens=[("<|im_start|>", tokenizer.convert_tokens_to_ids("<|im_start|>")), ("<|endoftext|>", end)],
    )
    data = load(row())  # writes the file
    path = data.notes[0].split(": ")[0]
    data = load_run_data(
        DataConfig(dataset=path, prompt_format="text"),
        ChordConfig(chord_sft_dataset=path),
        tokenizer,
        expert_max_length=500,
    )
    start, a, one = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_start|>", "a", "1"))
    assert data.prompts[0].tokens == (start, a)
    assert data.experts[0].tokens == (start, a, one, end)


# Parquet


def test_parquet_fills_absent_keys_with_null(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"x": 1}}}]},
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {"y": 2}}}]},
        {"role": "user", "content": "b"},
    ]
    Dataset.from_list([{"messages": messages, "answer": "1"}]).to_parquet(str(path))
    data = load_run_data(DataConfig(dataset=str(path)), ChordConfig(), TOKENIZER, expert_max_length=500)
    assert '{"name": "f", "arguments": {"x": 1}}' in data.prompts[0].text
    assert '{"name": "f", "arguments": {"y": 2}}' in data.prompts[0].text
    assert "null" not in data.prompts[0].text


# Conversations in other forms


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "[{'role': 'user', 'content': 'a'}]"}, r":1: column 'prompt' .*messages.* JSON"),
        ({"prompt": '[{"role": "user", "content": "a'}, r":1: column 'prompt' .*messages.* JSON"),
        ({"prompt": [{"role": "Human", "content": "a"}]}, r":1: .*role 'Human'.*'user'"),
        (
            {"prompt": [{"role": "user", "content": "a"}, {"role": "model", "content": "1"}]},
            r":1: .*'model'.*'assistant'",
        ),
        ({"prompt": [{"role": "User", "content": "a"}]}, r":1: .*role 'User'.*'user'"),
        ({"history": [["a", "b"]]}, r":1: column 'history'"),
    ],
)
def test_what_would_be_read_differently_than_meant_is_refused(load, values, message):
    with pytest.raises(UserError, match=message):
        load(row(**values))


def test_an_instruction_has_an_input(load):
    line = json.dumps({"instruction": "a", "input": "b", "answer": "1"})
    with pytest.raises(UserError, match=r":1: column 'input'.*'instruction'"):
        load(line, prompt_column="instruction")
    assert load(json.dumps({"instruction": "a", "input": "", "answer": "1"}), prompt_column="instruction").prompts


def test_a_parquet_file_without_rows_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    Dataset.from_dict({"prompt": ["a"], "answer": ["1"]}).select([]).to_parquet(str(path))
    with pytest.raises(UserError, match=r"rows.parquet has no rows"):
        load_run_data(DataConfig(dataset=str(path)), ChordConfig(), TOKENIZER, expert_max_length=500)
