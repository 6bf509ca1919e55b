"""The data of a run: prompts, held-out prompts and expert answers, read and tokenized at start-up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.bad_rows import BadRows
from chord_megatron.data.conversations import Conversation, read_conversation
from chord_megatron.data.experts import make_expert
from chord_megatron.data.formats import Keys, expert_keys, prompt_keys
from chord_megatron.data.prompts import make_prompt, reference_finder
from chord_megatron.data.segments import TokenWeights
from chord_megatron.data.sources import Row, load_rows
from chord_megatron.data.tokenizer import generation_end_tokens
from chord_megatron.data.turns import Turn, Turns, build_turns
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample, Prompt

Sample = TypeVar("Sample", Prompt, ExpertSample)
MakeSample = Callable[[int, Row, Conversation, Turn], Sample]


@dataclass(frozen=True)
class RunData:
    """Everything a run reads, and what was made of it."""

    prompts: Sequence[Prompt]  # empty without data.dataset
    eval_prompts: Sequence[Prompt]  # empty without data.eval_dataset
    experts: Sequence[ExpertSample]  # empty without chord.chord_sft_dataset
    end_token_ids: frozenset[int]  # what ends the model's turns
    notes: tuple[str, ...]  # what each data set was taken for, and what was left out of it


def stop_token_ids(
    model_dir: Path, tokenizer: Any, configured: Sequence[int] | None, end_token_ids: frozenset[int]
) -> tuple[int, ...]:
    """What ends a completion: the tokens configured, or those of turns, tokenizer and generation config."""
    if configured is not None:
        return tuple(configured)
    return tuple(sorted({tokenizer.eos_token_id, *end_token_ids, *generation_end_tokens(model_dir)}))


def load_run_data(data: DataConfig, chord: ChordConfig, tokenizer: Any, *, expert_max_length: int) -> RunData:
    """Read and tokenize all data sets. Raises UserError naming file, row and column.

    expert_max_length: chord.chord_sft_max_length, or what the model reads, in tokens.
    """
    turns = build_turns(tokenizer, data.prompt_format, data.system_prompt, data.chat_template_kwargs)
    to_prompt = partial(make_prompt, find_reference=reference_finder(data.reference_pattern))
    reader = _Reader(turns, data)
    experts: list[ExpertSample] = []
    if chord.chord_sft_dataset is not None:
        experts = reader.read(
            chord.chord_sft_dataset,
            chord.chord_sft_dataset_split,
            partial(make_expert, turns=turns, token_weights=TokenWeights(tokenizer)),
            keys=expert_keys(chord),
            limit=("chord.chord_sft_max_length", expert_max_length),
            first=chord.chord_sft_max_rows,
        )
    read_prompts = partial(
        reader.read,
        make=to_prompt,
        keys=prompt_keys(data),
        limit=("data.max_prompt_length", data.max_prompt_length),
    )
    prompts = read_prompts(data.dataset, data.dataset_split, first=data.max_rows) if data.dataset else []
    eval_prompts = (
        read_prompts(data.eval_dataset, data.eval_dataset_split, first=data.num_eval_prompts)
        if data.eval_dataset
        else []
    )
    return RunData(prompts, eval_prompts, experts, frozenset(reader.end_token_ids), tuple(reader.notes))


class _Reader:
    """Reads data sets; `notes` and `end_token_ids` grow with each."""

    def __init__(self, turns: Turns, data: DataConfig) -> None:
        self._turns, self._on_bad_row = turns, data.on_bad_row
        self.notes: list[str] = []
        self.end_token_ids: set[int] = set()

    def read(
        self,
        source: str,
        split: str,
        make: MakeSample[Sample],
        *,
        keys: Keys,
        limit: tuple[str, int],
        first: int | None = None,
    ) -> list[Sample]:
        """The samples of a data set's first rows (None: of all), without those that are longer than `limit`."""
        bad_rows = BadRows(source, self._on_bad_row)
        rows = load_rows(source, split, bad_rows)
        count = len(rows) if first is None else min(first, len(rows))
        kinds: Counter[str] = Counter()
        beside: Counter[str] = Counter()
        samples = []
        for index in range(count):
            with bad_rows.at_row(index):
                conversation = read_conversation(rows[index], keys)
                turn = self._turns.open(conversation, limit[1])
                samples.append(make(index, rows[index], conversation, turn))
                self.end_token_ids.add(turn.end_token_id)
                kinds[conversation.read_as] += 1
                beside.update(conversation.columns)
        short = [sample for sample in samples if len(sample.tokens) <= limit[1]]
        _refuse_none(source, bad_rows, samples, short, limit)
        self.notes.append(f"{source}: {_recognised(kinds, beside)}")
        if bad_rows.count:
            self.notes.append(f"{source}: skipped {bad_rows.count} unusable rows: {bad_rows}")
        if len(short) < len(samples):
            self.notes.append(f"{source}: dropped {len(samples) - len(short)} rows above {limit[0]}={limit[1]}")
        return short


def _refuse_none(
    source: str, bad_rows: BadRows, samples: Sequence[Sample], short: Sequence[Sample], limit: tuple[str, int]
) -> None:
    if not samples:
        raise UserError(f"{source}: none of its {bad_rows.count} rows can be used: {bad_rows}; mend them")
    if not short:
        raise UserError(f"all {len(samples)} usable rows of {source} are longer than {limit[0]}={limit[1]}; raise it")


def _recognised(kinds: Counter[str], beside: Counter[str]) -> str:
    """What the rows were taken for, in one line: rows that are read differently than meant are worse than a refusal."""
    line = "; ".join(f"{number:,} row{'s' * (number != 1)} read as {kind}" for kind, number in kinds.items())
    return line + "".join(f"; beside it: {name} ({number:,})" for name, number in beside.items())
