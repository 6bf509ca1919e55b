"""A data set as a run reads it: all questions, as far as there are not too many, and a sample of its rows in tokens."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeAlias

from chord_megatron.config import Config
from chord_megatron.config_types import DataSet, sources_of
from chord_megatron.data.bad_rows import BadRows
from chord_megatron.data.conversations import Conversation, read_conversation
from chord_megatron.data.experts import make_expert
from chord_megatron.data.formats import Keys, expert_keys, prompt_keys
from chord_megatron.data.prompts import make_prompt, reference_finder
from chord_megatron.data.segments import TokenWeights
from chord_megatron.data.sources import Row, Rows, load_rows
from chord_megatron.data.turns import Turn, Turns
from chord_megatron.inspection.duplicates import Question, question_of
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample, Prompt

MakeSample: TypeAlias = Callable[[int, Row, Conversation, Turn], Prompt | ExpertSample]

_MOST_QUESTIONS = 200_000  # of a data set that are compared with others: some ten seconds and a hundred megabytes
_SEED = 0  # the same rows each time


@dataclass(frozen=True)
class Source:
    """A data set that a configuration names, or one of several that it mixes."""

    kind: str  # prompts, held-out or experts
    name: str  # the kind, and which one where there are several
    path: str
    split: str
    keys: Keys  # which columns hold what
    first: int | None  # as data.num_eval_prompts and data.max_rows
    limit: tuple[str, int]  # the key that bounds its rows, and its value in tokens
    make: MakeSample


@dataclass(frozen=True)
class SampledRow:
    """A row that a run could use, if it is not too long."""

    index: int
    row: Row
    conversation: Conversation
    turn: Turn
    sample: Prompt | ExpertSample

    @property
    def length(self) -> int:
        return len(self.sample.tokens)


@dataclass
class ReadSet:
    """What was found in a data set."""

    source: Source
    rows: Rows
    total: int  # rows that a run would read
    bad: BadRows
    compared: int = 0  # rows whose question was read
    wanted: int = 0  # rows of the sample
    questions: list[Question] = field(default_factory=list)
    sampled: list[SampledRow] = field(default_factory=list)  # the usable ones
    forms: Counter[str] = field(default_factory=Counter)  # what the sample was taken for

    @property
    def kept(self) -> list[SampledRow]:
        return [sampled for sampled in self.sampled if sampled.length <= self.source.limit[1]]

    @property
    def too_long(self) -> list[SampledRow]:
        return [sampled for sampled in self.sampled if sampled.length > self.source.limit[1]]

    def conversation(self, index: int) -> Conversation:
        """Of a row whose question was read."""
        return read_conversation(self.rows[index], self.source.keys)


def prompts_as(config: Config, kind: str, path: str, split: str, first: int | None = None) -> Source:
    """A data set of prompts, as data/load.py reads it."""
    data = config.data
    to_prompt = partial(make_prompt, find_reference=reference_finder(data.reference_pattern))
    limit = ("data.max_prompt_length", data.max_prompt_length)
    return Source(kind, kind, path, split, prompt_keys(data), first, limit, to_prompt)


def experts_as(config: Config, path: str, turns: Turns, tokenizer: Any, max_length: int) -> Source:
    """A data set of expert answers, as data/load.py reads it."""
    chord = config.chord
    to_expert = partial(make_expert, turns=turns, token_weights=TokenWeights(tokenizer))
    limit = ("chord.chord_sft_max_length", max_length)
    split, first = chord.chord_sft_dataset_split, chord.chord_sft_max_rows
    return Source("experts", "experts", path, split, expert_keys(chord), first, limit, to_expert)


def all_sources(config: Config, turns: Turns, tokenizer: Any, expert_max_length: int) -> list[Source]:
    """Those of a configuration. Raises UserError where it names none."""
    data, chord = config.data, config.chord
    sources: list[Source] = []
    if data.dataset:
        split, most = data.dataset_split, data.max_rows
        sources += [prompts_as(config, "prompts", path, split, most) for path in _paths(data.dataset)]
    if data.eval_dataset:
        first = data.num_eval_prompts
        sources += [
            prompts_as(config, "held-out", path, data.eval_dataset_split, first) for path in _paths(data.eval_dataset)
        ]
    if chord.chord_sft_dataset:
        paths = _paths(chord.chord_sft_dataset)
        sources += [experts_as(config, path, turns, tokenizer, expert_max_length) for path in paths]
    if not sources:
        raise UserError(
            "the configuration names no data; set data.dataset, data.eval_dataset or chord.chord_sft_dataset"
        )
    counts = Counter(source.kind for source in sources)
    numbers = {kind: iter(range(1, count + 1)) for kind, count in counts.items()}
    return [
        source if counts[source.kind] == 1 else replace(source, name=f"{source.kind} {next(numbers[source.kind])}")
        for source in sources
    ]


def _paths(data_set: DataSet) -> list[str]:
    return [source.path for source in sources_of(data_set)]


def read_set(source: Source, turns: Turns, sample: int, most_tokens: int) -> ReadSet:
    """Read a data set; `sample` rows of it, drawn the same way each time, become tokens, of up to `most_tokens`.

    Raises UserError where the source cannot be read.
    """
    bad = BadRows(source.path, "skip")
    rows = load_rows(source.path, source.split, bad)
    total = len(rows) if source.first is None else min(source.first, len(rows))
    chosen = range(total) if total <= sample else sorted(random.Random(_SEED).sample(range(total), sample))
    wanted = set(chosen)
    found = ReadSet(source, rows, total, bad, compared=min(total, _MOST_QUESTIONS), wanted=len(wanted))
    for index in sorted({*range(found.compared), *wanted}):
        with bad.at_row(index):
            row = rows[index]
            conversation = read_conversation(row, source.keys)
            if index < found.compared:
                found.questions.append(question_of(index, conversation))
            if index in wanted:
                turn = turns.open(conversation, max(most_tokens, source.limit[1]))
                sample_of_row = source.make(index, row, conversation, turn)
                found.sampled.append(SampledRow(index, row, conversation, turn, sample_of_row))
                found.forms.update(_forms(conversation))
    return found


def _forms(conversation: Conversation) -> list[str]:
    return [f"read as {conversation.read_as}", *(f"beside it: {column}" for column in conversation.columns)]
