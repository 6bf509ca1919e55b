r"""The seam between prompt and answer: what the model reads, how far its turn is written already, and what ends it.

Everything about a chat template is taken from what it renders: the conversation up to the model's turn, and the same
with an answer in it. So a turn that the template opens with `<think>\n` is not opened twice, an answer ends with the
token that the template writes behind answers, and that token stops rollouts, whatever the tokenizer calls its eos.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from chord_megatron.config import PromptFormat
from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.conversations import Conversation
from chord_megatron.data.messages import Message
from chord_megatron.data.token_lengths import characters_per_token
from chord_megatron.data.tool_calls import forms, is_written_twice, with_empty_content
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import one_line, shown

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNREAD = -1  # in place of each token of a text that is too long to be read

_PROBE = "ChordAnswerProbe"  # stands for an answer; letters only, so that templates leave it as it is
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # of a message, beside its content
_THINKING = re.compile(r"<think>\s*(?:</think>\s*)?\Z")


@dataclass(frozen=True)
class Turn:
    """The model's turn, opened."""

    text: str  # what the model reads
    tokens: tuple[int, ...]
    prefill: str  # the part of `text` that belongs to the model's turn
    ending: str  # what the template writes behind an answer
    end_token_id: int


class Answer(NamedTuple):
    """An answer behind a turn."""

    tokens: tuple[int, ...]  # with the one that ends it
    text: str  # that they were made of; the last one may be beyond it
    content: str  # of the answer alone, without end tokens behind it


class Turns(Protocol):
    """How conversations become tokens."""

    def open(self, conversation: Conversation, most_tokens: int) -> Turn:
        """Up to where the model goes on; UNREAD tokens where they are more than `most_tokens` for certain.

        Raises BadRow.
        """
        ...

    def answer(self, conversation: Conversation, turn: Turn, answer: Message) -> Answer:
        """An answer behind `turn`. Raises BadRow."""
        ...

    def earlier(self, conversation: Conversation, turn: Turn, index: int) -> range:
        """Where in the turn's tokens message `index` of the question is, an assistant's, with the token that ends it.

        Raises BadRow where the template writes it otherwise than it was said.
        """
        ...


def build_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompt_format: PromptFormat,
    system_prompt: str | None,
    template_kwargs: dict[str, Any],
) -> Turns:
    """Of data.prompt_format. Raises UserError."""
    if prompt_format == "text":
        return TextTurns(tokenizer, system_prompt)
    return ChatTurns(tokenizer, system_prompt, template_kwargs)


class TextTurns:
    """Plain text: the tokenizer's own special tokens in front, a system prompt and a blank line before the question."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None) -> None:
        self._tokenizer, self._system_prompt = tokenizer, system_prompt
        self._characters_per_token = characters_per_token(tokenizer)

    def open(self, conversation: Conversation, most_tokens: int) -> Turn:
        question = conversation.question
        if not isinstance(question, str):
            raise BadRow(f"column {conversation.column!r} holds chat messages", ", which need data.prompt_format: chat")
        if conversation.tools:
            raise BadRow("column 'tools' needs data.prompt_format: chat")
        system = conversation.system or self._system_prompt
        text = question if system is None or not question else f"{system}\n\n{question}"
        tokens = _unread(text, most_tokens, self._characters_per_token) or self._encode(text)
        return Turn(text, tokens, "", "", int(self._tokenizer.eos_token_id))

    def answer(self, conversation: Conversation, turn: Turn, answer: Message) -> Answer:
        content = _without_ends(answer.get("content") or "", {self._tokenizer.eos_token})
        tokens = _behind_prompt(turn, content, self._encode)
        if tokens is None:
            tokens = tuple(self._tokenizer.encode(content, add_special_tokens=False))
        return Answer((*tokens, turn.end_token_id), content, content)

    def earlier(self, conversation: Conversation, turn: Turn, index: int) -> range:
        raise BadRow("answers of earlier turns need data.prompt_format: chat")

    def _encode(self, text: str) -> tuple[int, ...]:
        """Without what a tokenizer puts behind a text, which ends it: the model goes on there."""
        whole = tuple(self._tokenizer.encode(text))
        bare = tuple(self._tokenizer.encode(text, add_special_tokens=False))
        starts = range(len(whole) - len(bare) + 1)
        start = next((start for start in starts if whole[start : start + len(bare)] == bare), None)
        return whole if start is None else whole[: start + len(bare)]


class ChatTurns:
    """The tokenizer's chat template, which writes the special tokens."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, system_prompt: str | None, template_kwargs: dict[str, Any]
    ) -> None:
        """template_kwargs: further variables of the template. Raises UserError."""
        if not tokenizer.chat_template:
            raise UserError("the tokenizer has no chat template; set data.prompt_format: text")
        arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        if ours := [name for name in template_kwargs if name in arguments]:
            raise UserError(f"data.chat_template_kwargs: {ours[0]!r} is set for each row; remove it")
        self._tokenizer, self._system_prompt, self._template_kwargs = tokenizer, system_prompt, template_kwargs
        self._markers = set(tokenizer.added_tokens_decoder)
        self._end_tokens: dict[str, int] = {}  # by what follows an answer
        self._characters_per_token = characters_per_token(tokenizer)

    def open(self, conversation: Conversation, most_tokens: int) -> Turn:
        if not conversation.question:
            raise BadRow(f"column {conversation.column!r} is a text of its own, which needs data.prompt_format: text")
        messages, begun = self._messages(conversation), conversation.begun
        text = self._render(messages, conversation, add_generation_prompt=True)
        self._refuse_unwritten(messages, conversation, text)
        header, found, ending = self._closed(messages, conversation)
        prefill = _opened_by_template(text, header if found else text)
        ending = ending if found else ""
        if begun:
            continued, found, _ = self._closed(messages, conversation, begun)
            text = continued if found and _holds(continued, begun) else text + _behind(prefill, begun)
        end = self._end_token(ending, messages, conversation)
        tokens = _unread(text, most_tokens, self._characters_per_token) or self._encode(text)
        return Turn(text, tokens, begun or prefill, ending, end)

    def answer(self, conversation: Conversation, turn: Turn, answer: Message) -> Answer:
        ends = {str(self._tokenizer.convert_ids_to_tokens(turn.end_token_id)), self._tokenizer.eos_token}
        content = _without_ends(answer.get("content") or "", ends)
        text = None
        if not conversation.begun:
            rendered = self._render([*self._messages(conversation), {**answer, "content": content}], conversation)
            _refuse_unwritten_thoughts(answer, rendered)
            text = _difference(rendered, turn.text, content)
        if text is None:
            if answer.get("tool_calls"):
                raise BadRow("the chat template does not write the final message's tool calls behind the prompt")
            text = _behind(turn.prefill, content) + turn.ending
        tokens = self._encode_behind(turn, text)
        if turn.end_token_id in tokens:
            return Answer(tokens[: tokens.index(turn.end_token_id) + 1], text, content)
        text = text.removesuffix(turn.ending)
        return Answer((*self._encode_behind(turn, text), turn.end_token_id), text, content)

    def earlier(self, conversation: Conversation, turn: Turn, index: int) -> range:
        messages = self._messages(conversation)
        place = index + (messages[0] is not conversation.question[0])  # behind a system prompt
        begins = self._begins(messages, place, conversation, turn)
        ends = self._up_to(messages, place + 1, conversation)
        start = next((text for text in begins if text and turn.text.startswith(text)), None)
        if start is None or not ends.startswith(start) or not turn.text.startswith(ends):
            raise _rewritten(index)
        if not _is_written(messages[place], ends[len(start) :]):
            raise _rewritten(index)
        first, limit = len(self._encode(start)), len(self._encode(ends))
        tokens = turn.tokens[first:limit]
        if turn.tokens[:first] != self._encode(start) or turn.end_token_id not in tokens:
            raise _rewritten(index)
        return range(first, first + tokens.index(turn.end_token_id) + 1)

    def _begins(self, messages: list[Message], place: int, conversation: Conversation, turn: Turn) -> Iterator[str]:
        """The text before the assistant's message `place`: as it is read before the answer, or in a longer one."""
        yield self._render(messages[:place], conversation, add_generation_prompt=True)
        header, _, _ = self._closed(messages, conversation)
        space = header[len(turn.text) :] if header.startswith(turn.text) else ""
        yield self._up_to(messages, place, conversation).removesuffix(space)  # before an answer, it belongs to that

    def _up_to(self, messages: list[Message], place: int, conversation: Conversation) -> str:
        """The text before the content of message `place`; "" where it is not written."""
        if place >= len(messages):
            return ""
        other = [*messages[:place], {**messages[place], "content": _PROBE}, *messages[place + 1 :]]
        text, found, _ = self._render(other, conversation, add_generation_prompt=True).partition(_PROBE)
        return text if found else ""

    def _messages(self, conversation: Conversation) -> list[Message]:
        """The messages before the model's turn."""
        question = conversation.question
        messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
        if messages[-1]["role"] == "assistant":
            if not conversation.begun.strip():
                raise BadRow("the prompt ends with an assistant's message that has no text to go on from")
            messages = messages[:-1]
        system = conversation.system or self._system_prompt
        if system is not None and not (messages and messages[0]["role"] == "system"):
            messages = [{"role": "system", "content": system}, *messages]
        return messages

    def _render(self, messages: list[Message], conversation: Conversation, **how: Any) -> str:
        kwargs = self._template_kwargs | conversation.template_kwargs | {"tools": conversation.tools} | how
        reason = ""
        for form in forms(messages):
            try:
                text = str(self._tokenizer.apply_chat_template(form, tokenize=False, **kwargs))
                if "None" in text and any(message.get("content", "") is None for message in form):
                    empty = with_empty_content(form)  # a template that writes the word in place of nothing
                    without = str(self._tokenizer.apply_chat_template(empty, tokenize=False, **kwargs))
                    text = without if without.replace("None", "") == text.replace("None", "") else text
            except Exception as error:  # a template is a program: it may raise anything
                reason = reason or one_line(error)
            else:
                if not is_written_twice(form, text):
                    return text
        raise BadRow("the chat template refuses the messages", f": {reason}")

    def _closed(self, messages: list[Message], conversation: Conversation, begun: str = "") -> tuple[str, str, str]:
        """What is written before an answer that has `begun`, the mark that it is there, and what is written behind."""
        return self._render([*messages, _assistant(begun + _PROBE)], conversation).rpartition(_PROBE)

    def _refuse_unwritten(self, messages: list[Message], conversation: Conversation, text: str) -> None:
        """Raise BadRow where the prompt lacks tools or what anyone but the model has said."""
        for index, message in enumerate(messages):
            content = message.get("content") or ""
            if message["role"] == "assistant" or content.strip() in text:
                continue
            other = [*messages[:index], {**message, "content": _PROBE}, *messages[index + 1 :]]
            if self._render(other, conversation, add_generation_prompt=True) == text:
                raise BadRow(f"the chat template does not write the {message['role']}'s message", f": {shown(content)}")
        if conversation.tools:
            without = replace(conversation, tools=None)
            if self._render(messages, without, add_generation_prompt=True) == text:
                raise BadRow(
                    "the chat template writes no tools", "; remove the column 'tools', or take another template"
                )

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer.encode(text, add_special_tokens=False))  # the template has written them

    def _encode_behind(self, turn: Turn, text: str) -> tuple[int, ...]:
        """The tokens of a text that follows the prompt; apart from it, where the two would merge at the seam."""
        behind = _behind_prompt(turn, text, self._encode)
        return self._encode(text) if behind is None else behind

    def _end_token(self, ending: str, messages: list[Message], conversation: Conversation) -> int:
        """The first marker behind an answer, or of the turn after it; the tokenizer's eos where there is none."""
        if ending not in self._end_tokens:
            following = [ending, self._following(messages, conversation)]
            markers = (token for text in following for token in self._encode(text) if token in self._markers)
            eos = int(self._tokenizer.eos_token_id)
            self._end_tokens[ending] = next((token for token in markers if token != self._tokenizer.bos_token_id), eos)
        return self._end_tokens[ending]

    def _following(self, messages: list[Message], conversation: Conversation) -> str:
        """What the template writes between an answer and the next question."""
        turns = [_assistant(_PROBE), {"role": "user", "content": _PROBE}]
        try:
            parts = self._render([*messages, *turns], conversation).split(_PROBE)
        except BadRow:  # a template may have reasons against another turn
            return ""
        return parts[-2] if len(parts) > 2 else ""


def _unread(text: str, most_tokens: int, characters_per_token: int | None) -> tuple[int, ...]:
    """One more than `most_tokens` in place of more tokens than that; none where a text may be shorter."""
    is_too_long = characters_per_token is not None and len(text) > most_tokens * characters_per_token
    return (UNREAD,) * (most_tokens + 1) if is_too_long else ()


def _behind_prompt(turn: Turn, text: str, encode: Callable[[str], tuple[int, ...]]) -> tuple[int, ...] | None:
    """The tokens of a text that follows the prompt; None where the two merge at the seam, or the prompt is unread."""
    if UNREAD in turn.tokens[:1]:
        return None
    whole, length = encode(turn.text + text), len(turn.tokens)
    return whole[length:] if whole[:length] == turn.tokens else None


def _assistant(content: str) -> Message:
    return {"role": "assistant", "content": content}


def _without_ends(content: str, ends: set[str]) -> str:
    """Answers often carry an end token already; the model could write nothing behind it. Raises BadRow."""
    while any(content.rstrip().endswith(end) for end in ends):
        content = next(content.rstrip().removesuffix(end) for end in ends if content.rstrip().endswith(end))
    for end in sorted(ends):
        if end in content:
            raise BadRow("the answer holds its end token in its middle", f": {end!r}")
    return content


def _refuse_unwritten_thoughts(answer: Message, rendered: str) -> None:
    for key in _THOUGHTS:
        if isinstance(thought := answer.get(key), str) and _squeezed(thought) not in _squeezed(rendered):
            raise BadRow(
                f"the chat template does not write the {key!r} of the answer",
                "; put it in front of the content, between <think> and </think>",
            )


def _is_written(message: Message, text: str) -> bool:
    """Whether a text has what an assistant said, thought and called."""
    said = [message.get("content") or "", *(message[key] for key in _THOUGHTS if isinstance(message.get(key), str))]
    calls = (call.get("function", call) for call in message.get("tool_calls") or () if isinstance(call, dict))
    names = [str(call.get("name", "")) for call in calls if isinstance(call, dict)]
    return all(_squeezed(part) in _squeezed(text) for part in (*said, *names))


def _rewritten(index: int) -> BadRow:
    return BadRow(
        "the chat template writes an answer of an earlier turn otherwise than it was said",
        f": message {index}; make it a row of its own, which ends there",
    )


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _holds(continued: str, begun: str) -> bool:
    """Whether a rendered turn ends with `begun`, without a thought of the template's before one of its own."""
    header, found, _ = _squeezed(continued).rpartition(_squeezed(begun))
    return bool(found) and not ("<think>" in begun and header.endswith("</think>"))


def _opened_by_template(text: str, header: str) -> str:
    """What a template wrote of the model's turn: more than stands before an answer, or a thought that it opened."""
    if text.startswith(header) and text[len(header) :].strip():
        return text[len(header) :]
    thinking = _THINKING.search(text)
    return thinking[0] if thinking else ""


def _difference(rendered: str, prompt: str, content: str) -> str | None:
    """What follows the prompt in the rendered conversation; None where something of the answer is not in it."""
    behind = rendered[len(prompt) :]
    is_whole = rendered.startswith(prompt) and _squeezed(content) in _squeezed(behind)
    return behind if is_whole else None


def _behind(prefill: str, answer: str) -> str:
    """An answer without what of it the prompt holds already. Raises BadRow where the two do not fit."""
    opened = prefill.strip()
    if opened and answer.lstrip().startswith(opened):
        return answer.lstrip().removeprefix(opened).removeprefix(prefill[len(prefill.rstrip()) :])
    if "<think>" in opened:
        is_open = "</think>" not in opened
        if "<think>" in answer or (is_open and "</think>" not in answer):
            raise BadRow(
                "the answer does not fit the thought that the chat template opens",
                f": it opens the model's turn with {prefill!r}, and the answer neither begins with it nor "
                + ("ends that thought with '</think>'" if is_open else "goes without a thought"),
            )
    return answer
