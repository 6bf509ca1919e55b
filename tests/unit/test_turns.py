"""The seam between prompt and answer, under templates in the form of public models': what is read and learnt."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.load import RunData, load_run_data, stop_token_ids
from chord_megatron.rewards.builtin import accuracy, format_reward
from chord_megatron.rewards.scoring import completion_text
from chord_megatron.system.errors import UserError
from chord_megatron.types import Prompt, RolloutSample
from tests.unit.chat_templates import LLAMA31, MISTRAL, QWEN3, QWEN25, R1_DISTILL, ChatModel, tokenizer_of

TOKENIZERS = {model: tokenizer_of(model) for model in (QWEN25, QWEN3, LLAMA31, MISTRAL, R1_DISTILL)}
SUM = {"role": "user", "content": "1+1?"}
TOOL = {"type": "function", "function": {"name": "add"}}
CALL = [{"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}]


def load(tmp_path, tokenizer: PreTrainedTokenizerFast, *rows: dict[str, Any], **data: Any) -> RunData:
    """The same rows as prompts and as experts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"reference": "2", **row}) + "\n" for row in rows))
    settings = {"dataset": str(path), "reference_column": "reference", "max_prompt_length": 500, **data}
    return load_run_data(
        DataConfig(**settings),
        ChordConfig(chord_sft_dataset=str(path)),
        tokenizer,
        expert_max_length=1000,
    )


class Case(NamedTuple):
    name: str
    model: ChatModel
    row: dict[str, Any]
    prompt: str
    prefill: str  # what of the model's turn the prompt holds already
    learnt: str  # what an expert teaches behind the prompt
    data: dict[str, Any] = {}  # noqa: RUF012 - a NamedTuple's default, which nobody changes


QWEN_PROMPT = "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
QWEN25_PROMPT = "<|im_start|>system\nYou are helpful.<|im_end|>\n" + QWEN_PROMPT
LLAMA_PROMPT = "<|start_header_id|>user<|end_header_id|>\n\n1+1?<|eot_id|>"
LLAMA_OPEN = "<|start_header_id|>assistant<|end_header_id|>\n\n"
R1_PROMPT = "<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜><think>\n"
ROW = {"prompt": "1+1?", "answer": "It is 2"}
THOUGHT = {"prompt": "1+1?", "answer": "<think>\nadd\n</think>\n\n2"}

CASES = [
    Case("plain", QWEN25, ROW, QWEN25_PROMPT, "", "It is 2<|im_end|>"),
    Case(
        "a system prompt",
        QWEN25,
        ROW,
        "<|im_start|>system\nAdd.<|im_end|>\n" + QWEN_PROMPT,
        "",
        "It is 2<|im_end|>",
        {"system_prompt": "Add."},
    ),
    Case(
        "a system column",
        QWEN25,
        {**ROW, "system": "Sum."},
        "<|im_start|>system\nSum.<|im_end|>\n" + QWEN_PROMPT,
        "",
        "It is 2<|im_end|>",
        {"system_prompt": "Add."},
    ),
    Case(
        "tools",
        QWEN25,
        {"messages": [SUM, {"role": "assistant", "content": "It is 2"}], "tools": [TOOL]},
        '<|im_start|>system\nYou are helpful.\n\n# Tools\n{"type": "function", "function": {"name": "add"}}'
        "<|im_end|>\n" + QWEN_PROMPT,
        "",
        "It is 2<|im_end|>",
    ),
    Case(
        "tools as JSON text, and null keys as parquet fills them in",
        QWEN25,
        {
            "messages": [
                {**SUM, "tool_calls": None},
                {**CALL[0], "tool_calls": [{"function": {"name": "add", "arguments": None}}]},
                {"role": "tool", "content": "2", "tool_calls": None},
                {"role": "assistant", "content": "It is 2", "tool_calls": None},
            ],
            "tools": json.dumps([TOOL]),
        },
        '<|im_start|>system\nYou are helpful.\n\n# Tools\n{"type": "function", "function": {"name": "add"}}<|im_end|>\n'
        '<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n<tool_call>{"name": "add"}</tool_call><|im_end|>\n'
        "<|im_start|>user\n<tool_response>2</tool_response><|im_end|>\n<|im_start|>assistant\n",
        "",
        "It is 2<|im_end|>",
    ),
    Case("an answer that ends itself", QWEN25, {**ROW, "answer": "2<|im_end|>"}, QWEN25_PROMPT, "", "2<|im_end|>"),
    Case(
        "an answer begun by the row",
        QWEN25,
        {"prompt": [SUM, {"role": "assistant", "content": "It is"}], "answer": " 2"},
        QWEN25_PROMPT + "It is",
        "It is",
        " 2<|im_end|>",
    ),
    Case(
        "an answer begun by the row, and given whole",
        QWEN25,
        {"prompt": [SUM, {"role": "assistant", "content": "It is"}], "answer": "It is 2"},
        QWEN25_PROMPT + "It is",
        "It is",
        " 2<|im_end|>",
    ),
    Case(
        "messages as JSON text",
        QWEN25,
        {"messages": json.dumps([SUM, {"role": "assistant", "content": "It is 2"}])},
        QWEN25_PROMPT,
        "",
        "It is 2<|im_end|>",
    ),
    Case(
        "content in parts",
        QWEN25,
        {
            "prompt": [{"role": "user", "content": [{"type": "text", "text": "1+"}, {"type": "text", "text": "1?"}]}],
            "answer": "It is 2",
        },
        QWEN25_PROMPT,
        "",
        "It is 2<|im_end|>",
    ),
    Case(
        "an answer that calls a tool",
        QWEN25,
        {"messages": [SUM, *CALL]},
        QWEN25_PROMPT,
        "",
        '<tool_call>{"name": "add"}</tool_call><|im_end|>',
    ),
    Case("no reasoning", QWEN3, ROW, QWEN_PROMPT, "", "<think>\n\n</think>\n\nIt is 2<|im_end|>"),
    Case("reasoning", QWEN3, THOUGHT, QWEN_PROMPT, "", "<think>\nadd\n</think>\n\n2<|im_end|>"),
    Case(
        "reasoning in a column of its own",
        QWEN3,
        {"messages": [SUM, {"role": "assistant", "content": "2", "reasoning_content": "add"}]},
        QWEN_PROMPT,
        "",
        "<think>\nadd\n</think>\n\n2<|im_end|>",
    ),
    Case(
        "thinking turned off",
        QWEN3,
        ROW,
        QWEN_PROMPT + "<think>\n\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "It is 2<|im_end|>",
        {"chat_template_kwargs": {"enable_thinking": False}},
    ),
    Case(
        "thinking turned off by the row",
        QWEN3,
        {**ROW, "chat_template_kwargs": {"enable_thinking": False}},
        QWEN_PROMPT + "<think>\n\n</think>\n\n",
        "<think>\n\n</think>\n\n",
        "It is 2<|im_end|>",
    ),
    Case("plain", LLAMA31, ROW, "<|begin_of_text|>" + LLAMA_PROMPT + LLAMA_OPEN, "", "It is 2<|eot_id|>"),
    Case(
        "null keys, of which the template asks whether they are there",
        LLAMA31,
        {"messages": [{**SUM, "tool_calls": None}, {"role": "assistant", "content": "It is 2", "tool_calls": None}]},
        "<|begin_of_text|>" + LLAMA_PROMPT + LLAMA_OPEN,
        "",
        "It is 2<|eot_id|>",
    ),
    Case(
        "an answer that is trimmed",
        LLAMA31,
        {**ROW, "answer": " It is 2\n"},
        "<|begin_of_text|>" + LLAMA_PROMPT + LLAMA_OPEN,
        "",
        "It is 2<|eot_id|>",
    ),
    Case("plain", MISTRAL, ROW, "<s>[INST] 1+1?[/INST]", "", " It is 2</s>"),
    Case(
        "a system prompt",
        MISTRAL,
        ROW,
        "<s>[INST] Add.\n\n1+1?[/INST]",
        "",
        " It is 2</s>",
        {"system_prompt": "Add."},
    ),
    Case("reasoning", R1_DISTILL, THOUGHT, R1_PROMPT, "<think>\n", "add\n</think>\n\n2<｜end▁of▁sentence｜>"),
    Case(
        "reasoning without its first mark",
        R1_DISTILL,
        {"prompt": "1+1?", "answer": "add\n</think>\n\n2"},
        R1_PROMPT,
        "<think>\n",
        "add\n</think>\n\n2<｜end▁of▁sentence｜>",
    ),
    Case(
        "reasoning on the line of its mark",
        R1_DISTILL,
        {"prompt": "1+1?", "answer": "<think>add</think>2"},
        R1_PROMPT,
        "<think>\n",
        "add</think>2<｜end▁of▁sentence｜>",
    ),
]
NAMES = {QWEN25: "Qwen2.5", QWEN3: "Qwen3", LLAMA31: "Llama 3.1", MISTRAL: "Mistral", R1_DISTILL: "R1"}


@pytest.mark.parametrize("case", CASES, ids=[f"{NAMES[case.model]}: {case.name}" for case in CASES])
def test_prompts_and_experts(tmp_path, case: Case):
    tokenizer = TOKENIZERS[case.model]
    data = load(tmp_path, tokenizer, case.row, **case.data)
    (prompt,), (expert,) = data.prompts, data.experts
    assert prompt.text == case.prompt
    assert prompt.prefill == case.prefill
    tokens = tuple(tokenizer.encode(case.prompt, add_special_tokens=False))
    assert prompt.tokens == expert.tokens[: expert.prompt_length] == tokens
    assert expert.tokens[expert.prompt_length :] == tuple(tokenizer.encode(case.learnt, add_special_tokens=False))


@pytest.mark.parametrize(
    ("model", "ends"),
    [
        (QWEN25, ("<|endoftext|>", "<|im_end|>")),
        (QWEN3, ("<|im_end|>",)),
        (LLAMA31, ("<|end_of_text|>", "<|eot_id|>")),
        (MISTRAL, ("</s>",)),
        (R1_DISTILL, ("<｜end▁of▁sentence｜>",)),
    ],
    ids=lambda value: NAMES.get(value, "") if isinstance(value, ChatModel) else None,
)
def test_the_end_of_a_turn_stops_rollouts(tmp_path, model, ends):
    tokenizer = TOKENIZERS[model]
    data = load(tmp_path, tokenizer, THOUGHT)
    expected = tuple(sorted(tokenizer.convert_tokens_to_ids(list(ends))))
    assert stop_token_ids(tmp_path, tokenizer, None, data.end_token_ids) == expected
    assert stop_token_ids(tmp_path, tokenizer, [7], data.end_token_ids) == (7,)


@pytest.mark.parametrize(
    ("model", "row", "data", "message"),
    [
        (R1_DISTILL, ROW, {}, r":1: .*opens the model's turn with '<think>\\n'.* neither begins with it nor"),
        (QWEN3, THOUGHT, {"chat_template_kwargs": {"enable_thinking": False}}, r":1: .*<think>\\n\\n</think>"),
        (MISTRAL, {"prompt": [SUM, SUM], "answer": "2"}, {}, r":1: the chat template refuses .*: roles must"),
        (QWEN25, {"prompt": [{"role": "tool"}], "answer": "2"}, {}, r":1: .*message 0 .*'content'"),
        (LLAMA31, {"prompt": CALL, "answer": "2"}, {}, r":1: .*assistant.* no text"),
        (QWEN25, {**ROW, "answer": "2<|im_end|>3"}, {}, r":1: .*its end token in its middle: '<\|im_end\|>'"),
        (QWEN25, {**ROW, "images": ["a.png"]}, {}, r":1: column 'images'.*text"),
        (QWEN25, {**ROW, "videos": ["a.mp4"]}, {}, r":1: column 'videos'"),
        (QWEN25, {**ROW, "audios": [{"path": "a"}]}, {}, r":1: column 'audios'"),
        (QWEN25, {**ROW, "tools": "add"}, {}, r":1: column 'tools'.*JSON"),
        (QWEN25, {**ROW, "system": 3}, {}, r":1: column 'system' .*text"),
        (
            QWEN25,
            {"messages": [{"role": "system", "content": "a"}, SUM], "system": "b", "answer": "2"},
            {},
            r":1: column 'system' and a system message",
        ),
        (
            QWEN25,
            {"messages": [SUM, {"role": "assistant", "content": "2", "loss": False}]},
            {},
            r":1: column 'messages' leaves every answer out of the loss",
        ),
        (
            QWEN25,
            {"messages": [SUM, {"role": "assistant", "content": "2", "loss": True, "loss_scale": 0.0}]},
            {},
            r":1: column 'messages' leaves every answer out of the loss",
        ),
        (
            QWEN25,
            {"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "2"},
            {},
            r":1: .*message 0.*'image'",
        ),
        (QWEN25, {**ROW, "tools": [TOOL]}, {"prompt_format": "text"}, r":1: column 'tools'.*prompt_format: chat"),
    ],
)
def test_rows_that_cannot_be_rendered_are_named(tmp_path, model, row, data, message):
    with pytest.raises(UserError, match=message):
        load(tmp_path, TOKENIZERS[model], row, **data)


def test_the_null_content_beside_a_tool_call_is_kept(tmp_path):
    """Templates of DeepSeek tell a tool call by it; other keys that are null are as good as absent."""
    template = "{% for m in messages %}{{ 'calls' if m.content is none else m.content }}{{ 'name' in m }};{% endfor %}"
    tokenizer = tokenizer_of(QWEN25._replace(template=template))
    messages = [{**SUM, "name": None}, {**CALL[0], "name": None}, SUM, {"role": "assistant", "content": "2"}]
    (prompt,) = load(tmp_path, tokenizer, {"messages": messages}).prompts
    assert prompt.text == "1+1?False;callsFalse;1+1?False;"


def test_whatever_a_template_raises_is_the_rows_sentence(tmp_path):
    for expression in ("1 / 0", "messages[0] + 1", "messages.missing.key", "none | length", "[] | first | upper + 3"):
        tokenizer = tokenizer_of(QWEN25._replace(template="{{ " + expression + " }}"))
        with pytest.raises(UserError, match=r":1: the chat template"):
            load(tmp_path, tokenizer, ROW)


def test_a_template_that_writes_no_answers_ends_them_with_eos(tmp_path):
    tokenizer = tokenizer_of(QWEN25._replace(template="{{ messages[0].content }}="))
    data = load(tmp_path, tokenizer, ROW)
    (prompt,), (expert,) = data.prompts, data.experts
    assert (prompt.text, prompt.prefill) == ("1+1?=", "")
    assert expert.tokens[expert.prompt_length :] == tuple(tokenizer.encode("It is 2<|endoftext|>"))


def test_settings_of_ours_are_not_the_templates(tmp_path):
    for name in ("tokenize", "add_generation_prompt", "tools"):
        with pytest.raises(UserError, match=rf"data.chat_template_kwargs.*{name!r}"):
            load(tmp_path, TOKENIZERS[QWEN3], ROW, chat_template_kwargs={name: True})


@pytest.mark.parametrize(
    ("model", "written", "finish_reason", "seen"),
    [
        (R1_DISTILL, "add\n</think>\n\n2<｜end▁of▁sentence｜>", "stop", "<think>\nadd\n</think>\n\n2"),
        (QWEN3, "<think>1</think>4<|im_end|>", "stop", "<think>1</think>4"),
        (QWEN25, "4<|im_start|>", "length", "4<|im_start|>"),
        (QWEN25, "<|im_end|>", "stop", ""),
    ],
)
def test_rewards_see_the_models_turn_with_its_special_tokens(tmp_path, model, written, finish_reason, seen):
    tokenizer = TOKENIZERS[model]
    (prompt,) = load(tmp_path, tokenizer, THOUGHT).prompts
    response = tokenizer.encode(written, add_special_tokens=False)
    tokens = torch.tensor([*prompt.tokens, *response])
    mask = torch.arange(len(tokens)) >= len(prompt.tokens)
    rollout = RolloutSample(0, 0, tokens, mask, torch.zeros(len(tokens)), 0, finish_reason)
    assert completion_text(prompt, rollout, tokenizer) == seen


def test_marks_that_are_special_tokens_are_graded():
    marks = ("<think>", "</think>", "<answer>", "</answer>")
    tokenizer = tokenizer_of(QWEN25._replace(markers=(*QWEN25.markers, *marks)))
    tokens = torch.tensor(tokenizer.encode("<think>1</think><answer>4</answer><|im_end|>"))
    rollout = RolloutSample(
        0, 0, tokens, torch.ones(len(tokens), dtype=torch.bool), torch.zeros(len(tokens)), 0, "stop"
    )
    text = completion_text(Prompt(0, "", (), "4"), rollout, tokenizer)
    assert text == "<think>1</think><answer>4</answer>"
    assert accuracy([""], [text], ["4"]) == format_reward([""], [text], ["4"]) == [1.0]
