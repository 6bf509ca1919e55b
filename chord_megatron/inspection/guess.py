"""What a data file seems to hold: where its questions, references and worked answers are, and how long they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import median

from chord_megatron.data.bad_rows import BadRow, BadRows
from chord_megatron.data.columns import read_text
from chord_megatron.data.conversations import Conversation, read_conversation
from chord_megatron.data.experts import make_expert
from chord_megatron.data.formats import Keys
from chord_megatron.data.segments import TokenWeights
from chord_megatron.data.sources import Row, load_rows
from chord_megatron.data.turns import Turns
from chord_megatron.rewards.answers import AnswerFormat, final_answer, without_thoughts
from chord_megatron.system.errors import UserError

# As systems call them; the first that most rows have is taken.
_QUESTIONS = (
    "prompt", "messages", "question", "problem", "query", "instruction", "input", "conversations", "conversation"
)  # fmt: skip
_REFERENCES = ("answer", "reward_model.ground_truth", "ground_truth", "solution", "reference", "label", "final_answer")
_ANSWERS = ("answer", "solution", "response", "completion", "output", "chosen", "generation", "expert")
_ANY = ""  # the name of a column that each row is given here
_MOST_ROWS = 500  # of a file, its first
_USABLE = 0.9  # of the rows: a column that fewer have is another's
_WORKED = 3  # an answer that is so many times as long as its final answer, is worked out
_HOW_TO_ANSWER: dict[AnswerFormat, str] = {
    "hash": 'Reason step by step. End with a line that holds "#### " and the final answer.',
    "boxed": r"Reason step by step, and put the final answer within \boxed{}.",
    "tag": "Reason step by step, and put the final answer between <answer> and </answer>.",
}
_MARKS: dict[str, AnswerFormat] = {"####": "hash", r"\boxed": "boxed", "<answer>": "tag"}


@dataclass(frozen=True)
class PromptGuess:
    """Of a file of prompts."""

    path: str
    rows: int
    examined: int
    unusable: int  # of those
    prompt_column: str | None  # None: that of the format
    kind: str  # how it was read
    reference_column: str | None  # None: no column looks like one
    mark: AnswerFormat | None  # of the final answer in most references
    asked: AnswerFormat | None  # the mark that a system prompt asks for, where no row has a system message
    longest: int  # tokens of a prompt

    @property
    def system_prompt(self) -> str | None:
        return _HOW_TO_ANSWER[self.asked] if self.asked else None


@dataclass(frozen=True)
class ExpertGuess:
    """Of a file of worked answers."""

    path: str
    rows: int
    unusable: int
    prompt_column: str | None  # None: that of the format
    answer_column: str | None  # None: that of the format, such as the last message
    mark: AnswerFormat | None  # of the final answer in most of them
    longest: int  # tokens of prompt and answer
    longest_answer: int


def guess_prompts(
    path: str, build: Callable[[str | None], Turns], experts: ExpertGuess | None, *, has_template: bool, room: int
) -> PromptGuess:
    """build: how conversations become tokens under a system prompt. Raises UserError where nothing is a question.

    Completions are asked to mark their answer as experts do; where these do not, nothing is asked, nor where asking
    leaves a model that reads `room` tokens less than half of them.
    """
    rows, examined, unreadable = _rows(path)
    column, named = _question_column(path, examined)
    read = [*_read(examined, named)]
    reference = _reference_column([row for row, _ in read], column)
    mark = _mark([read_text(row, reference) for row, _ in read if _has_text(row, reference)]) if reference else None
    needs_system = has_template and reference and not any(_has_system(conversation) for _, conversation in read)
    usual = experts.mark if experts else (mark or "boxed")
    asked = usual if needs_system else None
    lengths = _prompt_lengths(read, build(_HOW_TO_ANSWER[asked] if asked else None))
    if asked and lengths and max(lengths) > room // 2:
        asked, lengths = None, _prompt_lengths(read, build(None))
    if not lengths:
        raise UserError(f"{path}: no prompt can be made of its column {column!r}; look at its rows")
    return PromptGuess(
        path=path,
        rows=rows,
        examined=len(examined) + unreadable,
        unusable=len(examined) + unreadable - len(lengths),
        prompt_column=named,
        kind=Counter(f"{each.format}: {each.column} ({each.kind})" for _, each in read).most_common(1)[0][0],
        reference_column=reference,
        mark=mark,
        asked=asked,
        longest=max(lengths),
    )


def guess_experts(path: str, turns: Turns, token_weights: TokenWeights, *, must: bool = True) -> ExpertGuess | None:
    """None, or UserError where there `must` be worked answers, where the file has none."""
    rows, examined, unreadable = _rows(path)
    column, named = _question_column(path, examined)
    read = [*_read(examined, named)]
    is_chat = sum(each.answer is not None for _, each in read) >= _USABLE * len(read)
    answer = None if is_chat else next(iter(_worked_beside(examined, column)), None)
    if answer is None and not is_chat and must:
        answer = _first_column(_ANSWERS, [row for row, _ in read], taken=(column,))
    if answer is None and not is_chat:
        if must:
            raise UserError(
                f"{path}: no column is an answer ({_names(examined)}); name one of {', '.join(_ANSWERS)}, or end its "
                "messages with the assistant's"
            )
        return None
    samples, texts = [], []
    for index, (row, _) in enumerate(read):
        try:
            conversation = read_conversation(row, _keys(named, answer))
            turn = turns.open(conversation, 10**6)
            samples.append(make_expert(index, row, conversation, turn, turns, token_weights))
            texts.append(str((conversation.answer or {}).get("content")) if is_chat else read_text(row, answer or ""))
        except (BadRow, RecursionError):
            continue
    if not samples:
        raise UserError(f"{path}: no expert sample can be made of its rows; look at them")
    return ExpertGuess(
        path=path,
        rows=rows,
        unusable=len(examined) + unreadable - len(samples),
        prompt_column=named,
        answer_column=answer,
        mark=_mark(texts),
        longest=max(len(sample.tokens) for sample in samples),
        longest_answer=max(len(sample.tokens) - sample.prompt_length for sample in samples),
    )


def _rows(path: str) -> tuple[int, list[Row], int]:
    """How many there are, the first of them, and how many lines are none."""
    bad = BadRows(path, "skip")
    rows = load_rows(path, "train", bad)
    examined = []
    for index in range(min(_MOST_ROWS, len(rows))):
        with bad.at_row(index):  # a large file is parsed row by row
            examined.append(rows[index])
    if not examined:
        raise UserError(f"{path}: none of its {bad.count} rows can be read: {bad}; mend them")
    return len(rows), examined, bad.count


def _question_column(path: str, rows: Sequence[Row]) -> tuple[str, str | None]:
    """And the name that a configuration has to say: None where the rows are recognised without."""
    for column in _QUESTIONS:
        named = [*_read(rows, column)]
        if len(named) >= _USABLE * len(rows):
            recognised = [read for _, read in _read(rows, None) if read.column == column]
            return column, None if len(recognised) >= len(named) else column
    raise UserError(
        f"{path}: no column looks like a question ({_names(rows)}); rename one to 'prompt', or write the "
        "configuration with data.prompt_column"
    )


def _read(rows: Sequence[Row], column: str | None) -> Iterator[tuple[Row, Conversation]]:
    """The rows whose question can be read, whatever answers it."""
    for row in rows:
        try:
            conversation = read_conversation({**row, _ANY: None}, _keys(column, _ANY))
        except (BadRow, RecursionError):
            continue
        yield row, conversation


def _keys(column: str | None, answer: str | None) -> Keys:
    return Keys(("data.format", "auto"), ("data.prompt_column", column), ("--experts", answer), is_expert=True)


def _reference_column(rows: Sequence[Row], question: str) -> str | None:
    """A worked answer is a reference only where there is no other."""
    worked = _worked_beside(rows, question)
    return _first_column(_REFERENCES, rows, (question, *worked)) or _first_column(_REFERENCES, rows, (question,))


def _first_column(names: Iterable[str], rows: Sequence[Row], taken: Sequence[str]) -> str | None:
    return next(
        (
            name
            for name in names
            if name not in taken and rows and sum(_has_text(row, name) for row in rows) >= _USABLE * len(rows)
        ),
        None,
    )


def _worked_beside(rows: Sequence[Row], question: str) -> list[str]:
    """Columns of answers that are worked out: much longer than the final answer that they, or others, hold."""
    columns = [name for name in _ANSWERS if _first_column([name], rows, taken=(question,))]
    lengths = {name: median(len(read_text(row, name)) for row in rows if _has_text(row, name)) for name in columns}
    finals = [
        len(final)
        for name in columns
        for row in rows
        if _has_text(row, name) and (final := final_answer(without_thoughts(read_text(row, name))))
    ]
    shortest = min([*lengths.values(), *([median(finals)] if finals else [])], default=0)
    return [name for name in columns if lengths[name] >= _WORKED * max(1, shortest)]


def _has_text(row: Row, column: str) -> bool:
    try:
        return bool(read_text(row, column))
    except BadRow:
        return False


def _prompt_lengths(read: Iterable[tuple[Row, Conversation]], turns: Turns) -> list[int]:
    """In tokens, of those that the template takes."""
    lengths = []
    for _, conversation in read:
        with suppress(BadRow, RecursionError):
            lengths.append(len(turns.open(conversation, 10**6).tokens))
    return lengths


def _mark(texts: Sequence[str]) -> AnswerFormat | None:
    """The mark that most of them have."""
    counts = Counter(name for text in texts for mark, name in _MARKS.items() if mark in text)
    common = counts.most_common(1)
    return common[0][0] if common and 2 * common[0][1] > len(texts) else None


def _has_system(conversation: Conversation) -> bool:
    question = conversation.question
    return bool(conversation.system) or (isinstance(question, list) and question[0]["role"] == "system")


def _names(rows: Sequence[Row]) -> str:
    return "its columns are " + ", ".join(map(repr, list(rows[0])[:20])) if rows and rows[0] else "it has none"
