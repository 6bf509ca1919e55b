"""The seam between prompt and answer where templates drop, reorder or do not end what a row holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from chord_megatron.data.load import stop_token_ids
from chord_megatron.rewards.scoring import completion_text
from chord_megatron.system.errors import UserError
from chord_megatron.types import RolloutSample
from tests.unit.chat_templates import DEEPSEEK_V3, GLM4, QWEN3, QWEN25, R1_DISTILL, ChatModel, tokenizer_of
from tests.unit.test_turns import QWEN25_PROMPT, QWEN_PROMPT, R1_PROMPT, ROW, SUM, TOOL, load

DEEPSEEK_PROMPT = "<｜begin▁of▁sentence｜><｜User｜>1+1?<｜Assistant｜>"
DEVELOPER = {"role": "developer", "content": "Add."}


def said(content: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def calling(arguments: Any) -> dict[str, Any]:
    return said("", tool_calls=[{"function": {"name": "add", "arguments": arguments}}])


def read(tmp_path, model: ChatModel, row: dict[str, Any], **data: Any) -> tuple[str, str, str]:
    """What the prompt is, how far it has written the model's turn, and what the expert teaches behind it."""
    tokenizer = tokenizer_of(model)
    loaded = load(tmp_path, tokenizer, row, **data)
    (prompt,), (expert,) = loaded.prompts, loaded.experts
    learnt = tokenizer.decode(expert.tokens[expert.prompt_length :])
    return tokenizer.decode(prompt.tokens), prompt.prefill, learnt


# A turn that the row begins


def test_a_thought_that_the_row_begins_is_opened_once(tmp_path):
    row = {"prompt": [SUM, said("<think>\nLet")], "answer": " me</think>2"}
    assert read(tmp_path, QWEN3, row) == (QWEN_PROMPT + "<think>\nLet", "<think>\nLet", " me</think>2<|im_end|>")
    assert read(tmp_path, R1_DISTILL, row)[0] == R1_PROMPT + "Let"


def test_a_thought_that_the_row_holds_stays_in_the_prompt(tmp_path):
    begun = "<think>\nadd\n</think>\n\nIt is"
    row = {"prompt": [SUM, said(begun)], "answer": " 2"}
    end = "<｜end▁of▁sentence｜>"
    assert read(tmp_path, R1_DISTILL, row) == (R1_PROMPT.removesuffix("<think>\n") + begun, begun, f" 2{end}")
    assert read(tmp_path, QWEN3, row) == (QWEN_PROMPT + begun, begun, " 2<|im_end|>")


def test_a_thought_that_does_not_fit_the_opened_turn_is_refused(tmp_path):
    row = {"prompt": [SUM, said("<think>\nLet")], "answer": " me</think>2"}
    with pytest.raises(UserError, match=r":1: .*opens the model's turn with '<think>\\n\\n</think>"):
        read(tmp_path, QWEN3, row, chat_template_kwargs={"enable_thinking": False})


# What a template does not write


@pytest.mark.parametrize(
    ("model", "row", "data", "message"),
    [
        (DEEPSEEK_V3, {**ROW, "tools": [TOOL]}, {}, r":1: the chat template writes no tools"),
        (
            DEEPSEEK_V3,
            {"messages": [DEVELOPER, SUM, said("2")]},
            {},
            r":1: the chat template .*developer",
        ),
        (QWEN25._replace(template="{{ messages[-1].content }}="), ROW, {"system_prompt": "Add."}, r":1: .*system"),
        (QWEN25, {"messages": [SUM, said("2", reasoning_content="add")]}, {}, r":1: .*'reasoning_content'"),
        (R1_DISTILL, {"messages": [SUM, said("2", reasoning="add")]}, {}, r":1: .*'reasoning'"),
    ],
)
def test_what_a_template_drops_is_named(tmp_path, model, row, data, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, model, row, **data)


def test_content_that_a_template_changes_is_written_all_the_same(tmp_path):
    model = QWEN25._replace(template=QWEN25.template.replace("message.content +", "message.content | upper +"))
    assert read(tmp_path, model, {"prompt": "add", "answer": "2"})[0] == QWEN25_PROMPT.replace("1+1?", "ADD")


# What ends a turn


def test_the_next_turn_ends_one_that_the_template_leaves_open(tmp_path):
    assert read(tmp_path, GLM4, ROW) == ("[gMASK]<sop><|user|>\n1+1?<|assistant|>", "", "\nIt is 2<|user|>")
    tokenizer = tokenizer_of(GLM4)
    ends = stop_token_ids(tmp_path, tokenizer, None, load(tmp_path, tokenizer, ROW).end_token_ids)
    assert tokenizer.convert_ids_to_tokens(ends) == ["<|endoftext|>", "<|user|>"]


def test_a_beginning_of_text_ends_no_turn(tmp_path):
    template = "{% for message in messages %}{{ bos_token + message.content + '=' }}{% endfor %}"
    model = ChatModel(template, "</s>", ("<s>", "</s>"), bos="<s>")
    assert read(tmp_path, model, {"prompt": "1", "answer": "2"})[2] == "<s>2</s>"


@pytest.mark.parametrize("answer", ["2<|endoftext|>", "2<|endoftext|>\n", "2<|im_end|>", "2<|im_end|><|endoftext|>"])
def test_an_answer_may_carry_the_tokenizers_end_token(tmp_path, answer):
    assert read(tmp_path, QWEN25, {**ROW, "answer": answer})[2] == "2<|im_end|>"


@pytest.mark.parametrize("data", [{}, {"prompt_format": "text"}])
def test_nothing_can_be_learnt_behind_an_end_token(tmp_path, data):
    with pytest.raises(UserError, match=r":1: the answer holds its end token in its middle: '<\|endoftext\|>'"):
        read(tmp_path, QWEN25, {**ROW, "answer": "2<|endoftext|>3"}, **data)


# Tool calls


@pytest.mark.parametrize("arguments", [{"a": 1}, '{"a": 1}'])
def test_arguments_of_tool_calls_may_be_json_text_or_objects(tmp_path, arguments):
    row = {"messages": [SUM, calling(arguments)]}
    call = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert read(tmp_path, QWEN25, row) == (QWEN25_PROMPT, "", f"{call}<|im_end|>")
    assert read(tmp_path, DEEPSEEK_V3, row) == (DEEPSEEK_PROMPT, "", '<call>add{"a": 1}<｜end▁of▁sentence｜>')
    further = {"messages": [SUM, calling(arguments), SUM, said("2")]}
    assert call in read(tmp_path, QWEN25, further)[0]


def test_arguments_that_are_no_json_stay_text(tmp_path):
    learnt = read(tmp_path, QWEN25, {"messages": [SUM, calling("a=1")]})[2]
    assert learnt == '<tool_call>{"name": "add", "arguments": "a=1"}</tool_call><|im_end|>'


# Tokenizers that write a space before a text


def llama_like() -> PreTrainedTokenizerFast:
    """In the form of SentencePiece's: "▁" before a text and for each space; a token of its own for each character."""
    letters = ["<unk>", "<s>", "</s>", "▁", "\n", *"ItisAaq0123456789+?:="]
    backend = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(dict.fromkeys(letters))}, merges=[]))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    ends = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
    backend.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=ends)
    template = (
        "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ '=' if m.role == 'user' else eos_token }}{% endfor %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template
    )


@pytest.mark.parametrize(
    ("question", "answer", "learnt"),
    [("q:", " 2", ["▁", "2"]), ("q: ", "2", ["2"]), ("q\n", "2", ["2"]), ("q:", "2", ["2"])],
)
def test_a_text_answer_goes_on_where_the_prompt_ends(tmp_path, question, answer, learnt):
    tokenizer = llama_like()
    row = {"prompt": question, "answer": answer}
    (expert,) = load(tmp_path, tokenizer, row, prompt_format="text").experts
    assert tokenizer.convert_ids_to_tokens(expert.tokens[expert.prompt_length :]) == [*learnt, "</s>"]


def test_the_space_between_a_begun_turn_and_its_end_is_seen(tmp_path):
    tokenizer = llama_like()
    row = {"prompt": [SUM, said("It is")], "answer": " 2"}
    data = load(tmp_path, tokenizer, row)
    (prompt,), (expert,) = data.prompts, data.experts
    tokens, mask = torch.tensor(expert.tokens), torch.arange(len(expert.tokens)) >= expert.prompt_length
    rollout = RolloutSample(0, 0, tokens, mask, torch.zeros(len(tokens)), 0, "stop")
    assert completion_text(prompt, rollout, tokenizer) == "It is 2"
