"""Everything there is to see of the data of a configuration, as plain values; text.py and page.py show it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from chord_megatron.config import Config
from chord_megatron.data.conversations import Conversation
from chord_megatron.data.prompts import reference_text
from chord_megatron.data.turns import build_turns
from chord_megatron.inspection.duplicates import Duplicates, find_duplicates, find_repeats, question_text
from chord_megatron.inspection.expert_rewards import ExpertRewards, score_experts
from chord_megatron.inspection.lengths import Lengths, measure_lengths
from chord_megatron.inspection.reading import ReadSet, SampledRow, all_sources, read_set
from chord_megatron.inspection.references import cut_short
from chord_megatron.inspection.spans import Span, make_spans
from chord_megatron.inspection.visible import beginning, ending
from chord_megatron.planning.rewards import scores_completions
from chord_megatron.rewards import check_reward_functions
from chord_megatron.rewards.answers import final_answer
from chord_megatron.types import ExpertSample, Prompt

_MOST_PLACES = 3  # of rows of a kind
_LONGEST_REFERENCE = 500  # characters that are shown


@dataclass(frozen=True)
class ShownRow:
    """A row, token by token."""

    place: str
    spans: tuple[Span, ...]
    tokens: int
    trained: int  # of them, those whose weight is not 0
    reference: str | None  # of a prompt
    read_as: str | None  # the final answer that `accuracy` takes of the reference, where it is a part of it


@dataclass(frozen=True)
class LeftOut:
    """Rows of a kind that no run reads, or that stop it, or that are suspicious."""

    reason: str
    count: int
    places: tuple[str, ...]  # of the first
    example: str


@dataclass(frozen=True)
class DataSet:
    """What was found in one."""

    name: str
    path: str
    rows: int  # that a run reads
    compared: int  # rows whose questions were read
    sample: int  # rows that became tokens
    usable: int  # of the sample
    forms: tuple[str, ...]  # what the sample was taken for
    bad: tuple[LeftOut, ...]
    too_long: LeftOut | None
    cut_references: tuple[LeftOut, ...]
    lengths: tuple[Lengths, ...]
    shown: tuple[ShownRow, ...]


@dataclass(frozen=True)
class DuplicateExample:
    place: str
    other_place: str
    exact: bool
    question: str


@dataclass(frozen=True)
class FoundDuplicates:
    """With examples that can be shown."""

    counts: Duplicates
    examples: tuple[DuplicateExample, ...]


@dataclass(frozen=True)
class Inspection:
    """Of all data sets of a configuration."""

    model: str
    on_bad_row: str
    data_sets: tuple[DataSet, ...]
    duplicates: tuple[FoundDuplicates, ...]
    expert_rewards: ExpertRewards | None  # None: without experts, or where a run scores nothing


def inspect_data(
    config: Config, tokenizer: Any, *, model_length: int, expert_max_length: int, sample: int, show: int
) -> Inspection:
    """Read the data sets of a configuration, `sample` rows of each in tokens, `show` of them to be shown.

    model_length: tokens that the model reads; lengths are measured up to there. Raises UserError.
    """
    check_reward_functions(config.rewards.reward_funcs, config.rewards.reward_weights)
    data = config.data
    turns = build_turns(tokenizer, data.prompt_format, data.system_prompt, data.chat_template_kwargs)
    sources = all_sources(config, turns, tokenizer, expert_max_length)
    found = [read_set(source, turns, sample, model_length) for source in sources]
    rewards = None
    if scores_completions(config) and any(read.source.kind == "experts" for read in found):
        rewards = score_experts(config, turns, tokenizer, found)
    return Inspection(
        model=config.model.path,
        on_bad_row=data.on_bad_row,
        data_sets=tuple(_data_set(read, config, tokenizer, show) for read in found),
        duplicates=tuple(_duplicates(found)),
        expert_rewards=rewards,
    )


def _data_set(read: ReadSet, config: Config, tokenizer: Any, show: int) -> DataSet:
    key, limit = read.source.limit
    too_long = read.too_long
    system = config.data.system_prompt
    return DataSet(
        name=read.source.name,
        path=read.source.path,
        rows=read.total,
        compared=read.compared,
        sample=read.wanted,
        usable=len(read.sampled),
        forms=tuple(f"{form}: {count}" for form, count in read.forms.most_common()),
        bad=_bad_rows(read),
        too_long=LeftOut(
            f"longer than {key}={limit}",
            len(too_long),
            tuple(read.bad.place(row.index) for row in too_long[:_MOST_PLACES]),
            f"{max(row.length for row in too_long)} tokens",
        )
        if too_long
        else None,
        cut_references=_cut_references(read, config),
        lengths=tuple(_lengths(read)),
        shown=tuple(_shown(row, read, tokenizer, system) for row in read.kept[:show]),
    )


def _bad_rows(read: ReadSet) -> tuple[LeftOut, ...]:
    return tuple(
        LeftOut(reason, count, (first,), beginning(read.bad.examples[reason], 300))
        for reason, (count, first) in read.bad.found.items()
    )


def _cut_references(read: ReadSet, config: Config) -> tuple[LeftOut, ...]:
    """Of prompts."""
    places: dict[str, list[str]] = {}
    examples: dict[str, str] = {}
    for row in read.sampled:
        if isinstance(row.sample, Prompt):
            text = reference_text(row.row, row.conversation)
            if cut := cut_short(row.sample.reference, text, config.data.reference_pattern):
                places.setdefault(cut[0], []).append(read.bad.place(row.index))
                examples.setdefault(cut[0], ending(cut[1]))
    return tuple(
        LeftOut(kind, len(found), tuple(found[:_MOST_PLACES]), examples[kind]) for kind, found in places.items()
    )


def _lengths(read: ReadSet) -> list[Lengths]:
    """Of all usable rows, also of those that are too long."""
    lengths: list[tuple[str, Sequence[int], tuple[str, int] | None]]
    experts = [row.sample for row in read.sampled if isinstance(row.sample, ExpertSample)]
    if experts:
        whole = [len(sample.tokens) for sample in experts]
        answers = [len(sample.tokens) - sample.prompt_length for sample in experts]
        lengths = [("prompt and answer", whole, read.source.limit), ("answer", answers, None)]
    else:
        lengths = [("prompt", [row.length for row in read.sampled], read.source.limit)]
    measured = (measure_lengths(*each) for each in lengths)
    return [each for each in measured if each is not None]


def _shown(row: SampledRow, read: ReadSet, tokenizer: Any, system_prompt: str | None) -> ShownRow:
    sample = row.sample
    weights, prompt_length = [0.0] * row.length, row.length
    if isinstance(sample, ExpertSample):
        prompt_length = sample.prompt_length
        weights = [*(sample.token_weights or [1.0] * row.length)]
        weights[:prompt_length] = [0.0] * prompt_length
    spans = make_spans(
        sample.tokens,
        weights,
        prompt_length,
        tokenizer,
        messages=_messages(row.conversation, system_prompt),
        prefill=row.turn.prefill,
    )
    reference = sample.reference if isinstance(sample, Prompt) else None
    read_as = None if reference is None else final_answer(reference)
    return ShownRow(
        place=read.bad.place(row.index),
        spans=spans,
        tokens=row.length,
        trained=sum(weight > 0 for weight in weights),
        reference=None if reference is None else ending(reference, _LONGEST_REFERENCE),
        read_as=None if read_as in (None, reference) else ending(read_as, _LONGEST_REFERENCE),
    )


def _messages(conversation: Conversation, system_prompt: str | None) -> list[tuple[str, str]]:
    """Role and content of all that comes before the model's turn."""
    question = conversation.question
    messages = [{"role": "user", "content": question}] if isinstance(question, str) else question
    said = [(str(message["role"]), str(message.get("content") or "")) for message in messages]
    if conversation.begun:
        said.pop()
    system = conversation.system or system_prompt
    has_own = bool(said) and said[0][0] == "system"
    return said if system is None or has_own else [("system", system), *said]


def _duplicates(found: list[ReadSet]) -> list[FoundDuplicates]:
    """Within each, of several sources in one another, and of held-out prompts in what is trained on.

    Experts answer prompts, which is their purpose.
    """
    pairs = [(read, read) for read in found]
    for other, read in combinations(found, 2):
        kinds = {other.source.kind, read.source.kind}
        if len(kinds) == 1 or "held-out" in kinds:
            pairs.append((other, read) if other.source.kind == "held-out" else (read, other))
    return [_duplicates_of(read, other) for read, other in pairs]


def _duplicates_of(read: ReadSet, other: ReadSet) -> FoundDuplicates:
    name, questions = read.source.name, read.questions
    is_one = read is other
    counts = (
        find_repeats(name, questions)
        if is_one
        else find_duplicates(name, questions, other.source.name, other.questions)
    )
    examples = (
        DuplicateExample(
            read.bad.place(repeated.row),
            other.bad.place(repeated.other_row),
            repeated.exact,
            beginning(question_text(read.conversation(repeated.row))),
        )
        for repeated in counts.examples
    )
    return FoundDuplicates(counts, tuple(examples))
