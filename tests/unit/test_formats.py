"""Rows as each system writes them (tests/data/formats): recognised, announced, and read to the letter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple, get_args

import pytest
from datasets import Dataset

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.config_types import DataFormat
from chord_megatron.data.formats import FORMATS
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.system.errors import UserError
from tests.unit.chat_templates import GLM4, LLAMA31, MISTRAL, QWEN3, QWEN25, tokenizer_of

FILES = Path(__file__).parents[1] / "data" / "formats"
TOKENIZER, THINKER = tokenizer_of(QWEN25), tokenizer_of(QWEN3)
HELPFUL = "<|im_start|>system\nYou are helpful.<|im_end|>\n"


def turn(role: str, text: str) -> str:
    return f"<|im_start|>{role}\n{text}<|im_end|>\n"


def asked(*questions: str, system: str = "You are helpful.") -> str:
    """Questions and answers in turn, and the model's turn, opened."""
    turns = [turn(("user", "assistant")[index % 2], text) for index, text in enumerate(questions)]
    return turn("system", system) + "".join(turns) + "<|im_start|>assistant\n"


class Case(NamedTuple):
    file: str
    read_as: str  # what the prompts' line says behind the number of rows
    prompts: list[tuple[str, str]]  # the text and the reference
    answers: list[str]  # what an expert teaches behind the same prompt
    data: dict[str, Any] = {}  # noqa: RUF012
    chord: dict[str, Any] = {}  # noqa: RUF012


TOOL = (
    "<|im_start|>system\nYou are helpful.\n\n# Tools\n"
    + '{"type": "function", "function": {"name": "add"}}<|im_end|>\n'
)
CALL = '<|im_start|>assistant\n<tool_call>{"name": "add", "arguments": {"x": 1, "y": 2}}</tool_call><|im_end|>\n'
CASES = [
    Case(
        "ms_swift",
        "messages: messages (chat messages), solution",
        [(asked("2+3?", system="Count."), "5"), (asked("4+5?"), "9")],
        ["five: 5", "nine: 9"],
    ),
    Case(
        "ms_swift_query",
        "ms-swift: query (chat messages), response; 1 row read as ms-swift: query (text), response",
        [(asked("1+1?", "2", "and 2?", "4", "and 3?", system="Count."), "six: 6"), (asked("7+1?"), "8")],
        ["six: 6", "8"],
    ),
    Case(
        "ms_swift_pairs",
        "ShareGPT: conversation (chat messages), final assistant message",
        [(asked("1+1?", "2", "and 1?", system="Count."), "3")],
        ["3"],
    ),
    Case(
        "alpaca",
        "Alpaca: instruction (text), output",
        [(asked("Add the numbers.\n3 and 4"), "7"), (asked("What is 6+6?"), "12")],
        ["7", "12"],
    ),
    Case(
        "sharegpt",
        "ShareGPT: conversations (chat messages), final assistant message",
        [(asked("5+5?"), "10"), (asked("1+5?", system="Count."), "6")],
        ["10", "6"],
    ),
    Case(
        "verl",
        "verl RL: prompt (chat messages), reward_model.ground_truth",
        [(asked("8+1?"), "9"), (asked("8+2?"), "10")],
        ["nine: 9", "ten: 10"],
        chord={"chord_sft_answer_column": "extra_info.answer"},
    ),
    Case(
        "slime",
        "slime: input (text), label; 1 row read as slime: input (chat messages), label",
        [(asked("1+8?"), "9"), (asked("1+9?"), "10")],
        ["9", "10"],
        chord={"chord_sft_answer_column": "label"},
    ),
    Case(
        "nemo_rl",
        "NeMo-RL: input (text), output",
        [(asked("9+9?"), "18"), (asked("9+8?"), "17")],
        ["18", "17"],
    ),
    Case(
        "nemo_rl_messages",
        "messages: messages (chat messages), final assistant message",
        [(asked("9+7?"), "16")],
        ["16"],
    ),
    Case(
        "trl",
        "TRL: prompt (text), completion; 1 row read as TRL: prompt (chat messages), final assistant message",
        [(asked("2+6?"), "8"), (asked("2+7?"), "9")],
        ["8", "9"],
    ),
    Case(
        "prime_rl",
        "prime-rl: messages (chat messages), final assistant message; 1 row read as prime-rl: prompt (text), "
        "completion",
        [(asked("7+7?"), "14"), (asked("7+6?"), "13")],
        ["14", "13"],
        {"format": "prime_rl"},
        {"chord_sft_format": "prime_rl"},
    ),
    Case(
        "trinity",
        "Trinity: prompt (text), response",
        [(asked("6+7?", system="Count."), "13"), (asked("6+8?", system="Count."), "14")],
        ["13", "14"],
    ),
    Case(
        "areal",
        "messages: messages (chat messages), answer",
        [(asked("4+4?"), "8"), (asked("4+6?"), "10")],
        ["8", "10"],
        chord={"chord_sft_answer_column": "answer"},
    ),
    Case(
        "roll",
        "ROLL: messages (chat messages in JSON text), ground_truth",
        [(asked("5+6?"), "11"), (asked("5+7?"), "12")],
        ["11", "12"],
        chord={"chord_sft_answer_column": "ground_truth"},
    ),
]


def source_of(case_file: str, folder: Path) -> str:
    """The file; verl's rows as parquet, which is what verl has."""
    path = FILES / f"{case_file}.jsonl"
    if case_file != "verl":
        return str(path)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    Dataset.from_list(rows).to_parquet(str(folder / "verl.parquet"))
    return str(folder / "verl.parquet")


def load(source: str, tokenizer: Any = TOKENIZER, *, chord: dict[str, Any] | None = None, **data: Any) -> RunData:
    """As prompts, and with `chord` as experts, too."""
    experts = ChordConfig() if chord is None else ChordConfig(chord_sft_dataset=source, **chord)
    settings = DataConfig(dataset=source, max_prompt_length=500, **data)
    return load_run_data(settings, experts, tokenizer, expert_max_length=1000)


@pytest.fixture
def rows(tmp_path):
    """Writes rows to a file, and returns its name."""

    def write(*rows: dict[str, Any]) -> str:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    return write


@pytest.mark.parametrize("case", CASES, ids=[case.file for case in CASES])
def test_rows_of_each_system(case: Case, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = source_of(case.file, tmp_path)
    data = load(source, chord=case.chord, **case.data)
    assert [(prompt.text, prompt.reference) for prompt in data.prompts] == case.prompts
    alike = 1 if " read as " in case.read_as else len(data.prompts)
    note = next(note for note in reversed(data.notes) if " read as " in note)  # of the prompts
    assert note.startswith(f"{source}: {alike} row{'s' * (alike > 1)} read as {case.read_as}")
    for expert, (text, _), answer in zip(data.experts, case.prompts, case.answers, strict=True):
        assert TOKENIZER.decode(expert.tokens[: expert.prompt_length]) == text
        assert TOKENIZER.decode(expert.tokens[expert.prompt_length :]) == f"{answer}<|im_end|>"
        assert expert.token_weights is None


def test_verl_sft_rows_say_whether_to_think(tmp_path):
    source = source_of("verl_sft", tmp_path)
    data = load(source, THINKER, chord={})
    opened = turn("user", "3+3?") + "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert [prompt.text for prompt in data.prompts] == [opened, turn("user", "3+4?") + "<|im_start|>assistant\n"]
    assert [prompt.reference for prompt in data.prompts] == ["6", "7"]
    learnt = [THINKER.decode(expert.tokens[expert.prompt_length :]) for expert in data.experts]
    assert learnt == ["6<|im_end|>", "<think>\n\n</think>\n\n7<|im_end|>"]
    assert data.notes[0] == (
        f"{source}: 2 rows read as verl SFT: messages (chat messages), final assistant message; "
        "beside it: chat_template_kwargs (2)"
    )


def test_a_text_of_its_own_is_learnt_whole():
    source = str(FILES / "trl_text.jsonl")
    chord = ChordConfig(chord_sft_dataset=source)
    (first, second) = load_run_data(DataConfig(prompt_format="text"), chord, TOKENIZER, expert_max_length=100).experts
    assert (TOKENIZER.decode(first.tokens), first.prompt_length) == ("2+2=4<|endoftext|>", 1)
    assert TOKENIZER.decode(second.tokens) == "3+3=6<|endoftext|>"
    with pytest.raises(UserError, match=r":1: column 'text' is a text of its own, which needs data.prompt_format"):
        load_run_data(DataConfig(), chord, TOKENIZER, expert_max_length=100)


# Answers of several turns


def learnt_parts(expert: Any, tokenizer: Any = TOKENIZER) -> list[tuple[str, float]]:
    """The learnt stretches of a sample, and what they weigh."""
    weights = expert.token_weights or [float(i >= expert.prompt_length) for i in range(len(expert.tokens))]
    parts: list[tuple[list[int], float]] = []
    for token, weight, before in zip(expert.tokens, weights, [0.0, *weights]):
        if weight and weight == before:
            parts[-1][0].append(token)
        elif weight:
            parts.append(([token], weight))
    return [(tokenizer.decode(tokens), weight) for tokens, weight in parts]


def test_a_tool_call_and_the_answer_after_it(tmp_path):
    (prompt,), (expert,) = (data := load(source_of("ms_swift_agent", tmp_path), chord={})).prompts, data.experts
    asks = TOOL + turn("user", "add 1 and 2")
    response = "<|im_start|>user\n<tool_response>3</tool_response><|im_end|>\n<|im_start|>assistant\n"
    assert prompt.text == asks + CALL + response
    assert prompt.reference == "3"
    assert TOKENIZER.decode(expert.tokens) == asks + CALL + response + "It is 3<|im_end|>"
    called = '\n<tool_call>{"name": "add", "arguments": {"x": 1, "y": 2}}</tool_call><|im_end|>'
    assert [text.removeprefix("\n") for text, _ in learnt_parts(expert)] == [called[1:], "It is 3<|im_end|>"]
    assert expert.token_weights is not None and expert.token_weights[: expert.prompt_length] == (0.0,) * (
        expert.prompt_length
    )


def test_slimes_turns_are_learnt_but_for_the_masked(tmp_path):
    data = load(source_of("slime_turns", tmp_path), chord={})
    (expert,) = data.experts
    whole = asked("1+1?", "2", "sure?", "no", "and now?") + "yes, 2<|im_end|>"
    assert expert.tokens == tuple(TOKENIZER.encode(whole))
    assert learnt_parts(expert) == [("2<|im_end|>", 1.0), ("yes, 2<|im_end|>", 1.0)]
    assert TOKENIZER.decode(expert.tokens[: expert.prompt_length]) == asked("1+1?")
    assert "answers of earlier turns (1)" in data.notes[0]


USER, SECOND = {"role": "user", "content": "a"}, {"role": "user", "content": "c"}


def said(text: str, **flags: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **flags}


@pytest.mark.parametrize(
    ("first", "last", "learnt"),
    [
        ({}, {}, [("d", 1.0)]),
        ({"loss": True}, {}, [("b", 1.0), ("d", 1.0)]),
        ({"loss": True}, {"loss": False}, [("b", 1.0)]),
        ({"loss": False}, {}, [("d", 1.0)]),
        ({"loss_scale": 0.5}, {"loss_scale": 2}, [("b", 0.5), ("d", 2.0)]),
        ({"step_loss_mask": 1}, {"step_loss_mask": 0}, [("b", 1.0)]),
        ({}, {"loss": True}, [("d", 1.0)]),
        ({"loss": None}, {}, [("d", 1.0)]),
    ],
)
@pytest.mark.parametrize("tokenizer", [TOKENIZER, THINKER], ids=["Qwen2.5", "Qwen3"])
def test_flags_say_which_answers_are_learnt(rows, first, last, learnt, tokenizer):
    chat = [USER, said("b", **first), SECOND, said("d", **last)]
    (expert,) = load(rows({"messages": chat, "answer": "1"}), tokenizer, chord={"chord_sft_format": "messages"}).experts
    ends = [(f"{text}<|im_end|>", weight) for text, weight in learnt]
    found = [(text.removeprefix("<think>\n\n</think>\n\n"), weight) for text, weight in learnt_parts(expert, tokenizer)]
    assert found == ends
    plain = [{"role": message["role"], "content": message["content"]} for message in chat]
    rendered = tokenizer.apply_chat_template(plain, tokenize=False)
    assert rendered.startswith(tokenizer.decode(expert.tokens))  # the template's own words, and nothing else


# Writes thoughts only behind the last question, as Qwen3's does: there an agent thinks between its calls.
AGENT = QWEN3._replace(
    template="""\
{%- set last = namespace(question=0) %}
{%- for message in messages %}
{%- if message.role == 'user' %}{%- set last.question = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
{%- if message.role == 'tool' %}
{{- '<|im_start|>user\\n<tool_response>' + message.content + '</tool_response><|im_end|>\\n' }}
{%- elif message.role != 'assistant' %}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}
{%- else %}
{{- '<|im_start|>assistant\\n' }}
{%- if loop.index0 > last.question and (loop.last or message.reasoning_content) %}
{{- '<think>\\n' + (message.reasoning_content or '') + '\\n</think>\\n\\n' }}
{%- endif %}
{{- message.content or '' }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + (call.function | tojson) + '</call>' }}{%- endfor %}
{{- '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
"""
)
CALLS = {"tool_calls": [{"function": {"name": "add", "arguments": {"x": 1}}}]}
RESULT = {"role": "tool", "content": "2"}
WRITTEN = '<call>{"name": "add", "arguments": {"x": 1}}</call><|im_end|>'


@pytest.mark.parametrize(
    ("model", "chat", "learnt"),
    [
        (LLAMA31, [said("b", loss=True), SECOND, said("d")], ["b<|eot_id|>", "d<|eot_id|>"]),
        (GLM4, [said("b", loss=True), SECOND, said("d")], ["\nb<|user|>", "\nd<|user|>"]),
        (MISTRAL, [said("b", loss=True), SECOND, said("d")], [" b</s>", " d</s>"]),
        (MISTRAL, [{"role": "system", "content": "S"}, said("b", loss=True), SECOND, said("d")], [" b</s>", " d</s>"]),
        (LLAMA31, [{"role": "assistant", **CALLS, "loss": True}, RESULT, said("d")], ["add<|eot_id|>", "d<|eot_id|>"]),
        (
            AGENT,
            [said("", **CALLS, loss=True), RESULT, said("", **CALLS), RESULT, said("d")],
            [WRITTEN, WRITTEN, "<think>\n\n</think>\n\nd<|im_end|>"],
        ),
        (
            AGENT,
            [said("so", **CALLS, reasoning_content="hm", loss=True), RESULT, said("d")],
            ["<think>\nhm\n</think>\n\nso" + WRITTEN, "<think>\n\n</think>\n\nd<|im_end|>"],
        ),
        (AGENT, [said("b", loss=True), SECOND, said("d")], ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"]),
    ],
)
def test_earlier_answers_as_templates_write_them(rows, model, chat, learnt):
    place = 1 if chat[0]["role"] == "system" else 0
    chat = [*chat[:place], USER, *chat[place:]]
    tokenizer = tokenizer_of(model)
    (expert,) = load(rows({"messages": chat, "answer": "1"}), tokenizer, chord={"chord_sft_format": "messages"}).experts
    assert learnt_parts(expert, tokenizer) == [(text, 1.0) for text in learnt]
    plain = [{key: value for key, value in message.items() if key != "loss"} for message in chat]
    rendered = tokenizer.apply_chat_template([*plain, SECOND] if model is GLM4 else plain, tokenize=False)
    assert tokenizer.encode(rendered, add_special_tokens=False)[: len(expert.tokens)] == list(expert.tokens)


@pytest.mark.parametrize(
    ("model", "chat"),
    [
        (AGENT, [said("b", reasoning_content="hm", loss=True), SECOND, said("d")]),
        (QWEN3, [said("so", **CALLS, loss=True), RESULT, said("d")]),
        (GLM4, [said("b", loss=True), RESULT, said("d")]),
    ],
    ids=["a thought that is left out", "a call that is not written", "an end that is another token"],
)
def test_earlier_answers_that_a_template_changes_are_refused(rows, model, chat):
    message = r":1: the chat template writes an answer of an earlier turn .*: message 1; make it a row of its own"
    with pytest.raises(UserError, match=message):
        load(rows({"messages": [USER, *chat], "answer": "1"}), tokenizer_of(model), chord={})


def test_an_answer_in_the_middle_may_be_the_last_that_is_learnt(rows):
    chat = [USER, said("b", loss=True), SECOND]
    (expert,) = load(rows({"messages": chat, "answer": "1"}), chord={}).experts
    assert TOKENIZER.decode(expert.tokens) == asked("a") + "b<|im_end|>"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([USER, said("b", loss=False)], r"column 'messages' leaves every answer out of the loss"),
        ([USER, said("b", loss=False), SECOND, said("d", loss=False)], r"leaves every answer out of the loss"),
        ([USER, said("b", loss="no"), SECOND, said("d")], r"the flag 'loss' of an answer is not true or false: 'no'"),
        ([USER, said("b", loss_scale=-1), SECOND, said("d")], r"the 'loss_scale' of an answer is not a number from 0"),
    ],
)
def test_flags_that_leave_nothing_are_refused(rows, chat, message):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*" + message):
        load(rows({"messages": chat, "answer": "1"}), chord={})


def test_a_thought_that_the_template_drops_later_cannot_be_learnt(rows):
    chat = [USER, said("<think>\nhm\n</think>\n\nb", loss=True), SECOND, said("d")]
    source = rows({"messages": chat, "answer": "1"})
    with pytest.raises(UserError, match=r":1: the chat template writes an answer of an earlier turn .*message 1"):
        load(source, THINKER, chord={})


def test_several_messages_of_a_completion_are_all_learnt(rows):
    row = {"prompt": [USER], "completion": [said("b"), SECOND, said("d")], "answer": "1"}
    (expert,) = load(rows(row), chord={"chord_sft_format": "trl"}).experts
    assert learnt_parts(expert) == [("b<|im_end|>", 1.0), ("d<|im_end|>", 1.0)]


# What is not guessed


CHAT = [USER, said("b")]


@pytest.mark.parametrize(
    ("row", "data", "message"),
    [
        (
            {"prompt": "a", "messages": CHAT, "answer": "1"},
            {},
            r"columns 'messages' and 'prompt' may each be the question; name one in data\.prompt_column, or set "
            r"data\.format to one of plain, messages",
        ),
        (
            {"prompt": "a", "answer": "1", "solution": "2"},
            {},
            r"columns 'answer' and 'solution' may each be the reference; name one in data\.reference_column",
        ),
        ({"question": "a", "answer": "1"}, {}, r"no column 'prompt'; it has .*, of which data\.prompt_column may name"),
        ({"prompt": "a", "target": "1"}, {}, r"no column 'answer'; it has .*of which data\.reference_column may name"),
        ({"messages": CHAT, "target": "1"}, {}, r"no column 'answer'; .* data\.reference_column may name one"),
        (
            {"messages": CHAT, "answer": "1"},
            {"prompt_column": "question"},
            r"no column 'question'; .*data\.prompt_column",
        ),
        ({"messages": "what is 1+1?", "answer": "1"}, {}, r"column 'messages' must hold chat messages, not 'what"),
        (
            {"messages": "[{'role': 'user'", "answer": "1"},
            {},
            r"column 'messages' holds chat messages as text that is not",
        ),
        (
            {"text": "a", "answer": "1"},
            {},
            r"column 'text' is a text without a question; name one in data\.prompt_column",
        ),
    ],
)
def test_rows_that_could_be_read_in_two_ways_are_refused(rows, row, data, message):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: " + message):
        load(rows(row), **data)


def test_an_answer_column_that_is_not_there_is_an_error_beside_messages(rows):
    source = rows({"messages": CHAT, "answer": "1"})
    with pytest.raises(UserError, match=r":1: no column 'worked'; .*chord\.chord_sft_answer_column may name one"):
        load(source, chord={"chord_sft_answer_column": "worked"})
    (expert,) = load(source, chord={"chord_sft_answer_column": "answer"}).experts
    assert TOKENIZER.decode(expert.tokens) == asked("a") + "1<|im_end|>"


def test_columns_that_the_configuration_names_win(rows):
    source = rows({"prompt": "a", "question": "q", "messages": CHAT, "answer": "1", "solution": "2"})
    (prompt,) = load(source, prompt_column="question", reference_column="solution").prompts
    assert (prompt.text, prompt.reference) == (asked("q"), "2")
    (prompt,) = load(source, prompt_column="messages", reference_column="answer").prompts
    assert (prompt.text, prompt.reference) == (asked("a"), "1")
    (prompt,) = load(source, format="messages", reference_column="answer").prompts
    assert prompt.text == asked("a")


def test_columns_that_agree_are_not_in_doubt(rows):
    (prompt,) = load(rows({"prompt": "a", "answer": "1", "ground_truth": "1"})).prompts
    assert prompt.reference == "1"


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "a", "reward_model": {"style": "rule"}}, "verl"),
        ({"messages": CHAT}, "verl_sft"),
        ({"messages": CHAT, "ground_truth": "1"}, "roll"),
        ({"messages": CHAT}, "sharegpt"),
        ({"instruction": "a", "answer": "1"}, "alpaca"),
        ({"prompt": "a", "answer": "1"}, "query"),
        ({"input": "a", "answer": "1"}, "slime"),
        ({"prompt": "a", "answer": "1"}, "trinity"),
        ({"prompt": "a", "answer": "1"}, "completion"),
        ({"prompt": "a", "text": "1"}, "text"),
        ({"input": "a", "answer": "1"}, "input_output"),
        ({"messages": CHAT}, "plain"),
        ({"prompt": "a", "answer": "1"}, "messages"),
        ({"prompt": "a", "answer": "1"}, "ms_swift"),
        ({"query": "a", "response": "1"}, "trl"),
        ({"prompt": "a", "answer": "1"}, "nemo_rl"),
        ({"prompt": "a", "answer": "1"}, "prime_rl"),
        ({"prompt": "a", "answer": "1"}, "areal"),
    ],
)
def test_rows_of_another_format_than_the_one_that_is_set(rows, row, name):
    message = rf":1: data\.format={name}: no row of that format, which has {FORMATS[name].columns}; it has '"
    with pytest.raises(UserError, match=message):
        load(rows(row), format=name)


def test_the_configuration_and_the_documentation_know_every_format():
    assert get_args(DataFormat) == ("auto", *FORMATS)
    text = (FILES.parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    assert [name for name in FORMATS if f"`{name}`" not in text] == []


# A fault in a row of each system


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [USER, {"role": "tool_call", "content": "add"}], "solution": "1"},
            r"a call of a tool that is no",
        ),
        ({"query": "a", "response": "1", "history": "b"}, r"column 'history' must hold pairs"),
        ({"conversation": [{"human": 1, "assistant": "b"}]}, r"needs messages of 'role' and 'content'; message 0"),
        ({"instruction": "a", "input": "b", "output": None}, r"no column 'prompt'"),
        ({"conversations": [{"from": "robot"}], "answer": "1"}, r"needs messages of 'role' and 'content'"),
        (
            {"data_source": "x", "prompt": [USER], "reward_model": {"ground_truth": {"a": 1}}},
            r"column 'reward_model\.ground_truth' holds an object.*'reward_model\.ground_truth\.a'",
        ),
        ({"messages": CHAT, "enable_thinking": True, "answer": ""}, r"column 'answer' is empty"),
        ({"input": "a", "label": True}, r"column 'label' holds true or false"),
        ({"input": 3, "output": "b"}, r"column 'input' must hold text or chat messages, not 3"),
        ({"prompt": "a", "completion": ""}, r"column 'completion' is empty"),
        ({"prompt": "a", "response": ["b"]}, r"column 'response' holds a list"),
        ({"messages": '[{"role": "user", "content": ', "ground_truth": "1"}, r"messages as text that is not JSON"),
        ({"messages": [USER], "reward": 1, "id": 3}, r"no column 'answer'.*data\.reference_column"),
    ],
)
def test_a_wrong_row_of_each_kind_is_one_sentence(rows, row, message):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: .*" + message) as caught:
        load(rows(row))
    assert "\n" not in str(caught.value) and str(caught.value).endswith("mend the row, or set data.on_bad_row=skip")
