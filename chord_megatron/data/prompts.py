"""Rows -> Prompts: chat template or plain text, the reference answer, and the row's other columns."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from jinja2 import TemplateError

from chord_megatron.data.sources import Row, Rows
from chord_megatron.system.errors import UserError
from chord_megatron.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PromptFormat: TypeAlias = Literal["chat", "text"]
Messages: TypeAlias = list[dict[str, Any]]

MESSAGES_COLUMN = "messages"  # ms-swift's rows: the whole conversation in one column


def load_prompts(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    source: str,
    prompt_column: str,
    reference_column: str,
    reference_pattern: str | None,
    prompt_format: PromptFormat,
    system_prompt: str | None,
    max_prompt_length: int,
) -> tuple[list[Prompt], int]:
    """The prompts of `rows`, and how many were dropped for having more than `max_prompt_length` tokens.

    `Prompt.id` is the row number, from 0. A row without `prompt_column` may have ms-swift's `messages`.
    Raises UserError naming `source`, the row and the column where a row cannot be used.
    """
    find_reference = _reference_finder(reference_pattern)
    if not len(rows):
        raise UserError(f"{source} has no rows")
    prompts = []
    for index, row in enumerate(rows):
        where = f"{source} row {index}"
        column, prompt, _ = read_prompt(row, prompt_column, where)
        reference = find_reference(read_text(row, reference_column, where), where)
        text, tokens = encode_prompt(prompt, tokenizer, prompt_format, system_prompt, where)
        if len(tokens) <= max_prompt_length:
            columns = {name: value for name, value in row.items() if name not in (column, reference_column)}
            prompts.append(Prompt(index, text, tokens, reference, columns))
    if not prompts:
        raise UserError(
            f"all {len(rows)} prompts of {source} are longer than data.max_prompt_length={max_prompt_length}"
        )
    return prompts, len(rows) - len(prompts)


def read_prompt(row: Row, prompt_column: str, where: str) -> tuple[str, str | Messages, str | None]:
    """The column that holds the prompt, the prompt, and the final assistant message of `messages`."""
    column = prompt_column if prompt_column in row or MESSAGES_COLUMN not in row else MESSAGES_COLUMN
    prompt = _read_column(row, column, where)
    if isinstance(prompt, list):
        _check_messages(prompt, where, column)
    elif not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: column {column!r} must hold text or chat messages, not {prompt!r}")
    if column == MESSAGES_COLUMN and isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        *prompt, final = prompt
        if not prompt:
            raise UserError(f"{where}: column {column!r} has nothing before the assistant message")
        return column, prompt, final["content"]
    return column, prompt, None


def read_text(row: Row, column: str, where: str) -> str:
    """`row[column]`, text or a number, as text. Raises UserError where it is missing or empty."""
    value = _read_column(row, column, where)
    if value is None or not str(value).strip():
        raise UserError(f"{where}: column {column!r} is empty")
    return str(value)


def encode_prompt(
    prompt: str | Messages,
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    system_prompt: str | None,
    where: str,
) -> tuple[str, tuple[int, ...]]:
    """What the model reads, as text and as tokens.

    "chat" renders the tokenizer's template up to the assistant's turn; a system message in the row wins over
    `system_prompt`. "text" keeps the tokenizer's own special tokens and puts `system_prompt` and a blank line
    in front. Raises UserError.
    """
    if prompt_format == "text":
        if not isinstance(prompt, str):
            raise UserError(f"{where}: chat messages need data.prompt_format: chat")
        text = prompt if system_prompt is None else f"{system_prompt}\n\n{prompt}"
        return text, tuple(tokenizer.encode(text))
    if not tokenizer.chat_template:
        raise UserError("the tokenizer has no chat template; set data.prompt_format: text")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if system_prompt is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    try:
        text = str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except TemplateError as error:
        raise UserError(f"{where}: the tokenizer's chat template refuses the messages: {error}") from None
    # The template has written the special tokens already.
    return text, tuple(tokenizer.encode(text, add_special_tokens=False))


def _read_column(row: Row, column: str, where: str) -> Any:
    if column not in row:
        raise UserError(f"{where} has no column {column!r}; it has {', '.join(map(repr, row))}")
    return row[column]


def _check_messages(messages: list[Any], where: str, column: str) -> None:
    for message in messages:
        match message:
            case {"role": str(), "content": str()}:
                continue
        raise UserError(f"{where}: column {column!r} needs messages of 'role' and 'content', not {message!r}")
    if not messages:
        raise UserError(f"{where}: column {column!r} holds no messages")


def _reference_finder(pattern: str | None) -> Callable[[str, str], str]:
    if pattern is None:
        return lambda text, where: text.strip()
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.reference_pattern={pattern!r} is not a regular expression: {error}") from None
    if compiled.groups < 1:
        raise UserError(f"data.reference_pattern={pattern!r} needs a group, as in '####\\s*(.+)'")

    def find(text: str, where: str) -> str:
        match = compiled.search(text)
        reference = (match[1] or "").strip() if match else ""
        if not reference:
            raise UserError(f"{where}: data.reference_pattern={pattern!r} finds nothing in {text[-80:]!r}")
        return reference

    return find
