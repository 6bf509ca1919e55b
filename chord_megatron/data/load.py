"""The data of a run: prompts, held-out prompts and expert answers, read and tokenized at start-up, or before."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeAlias

from chord_megatron.config import ChordConfig, DataConfig, OnBadRow
from chord_megatron.config_types import DataSource, sources_of
from chord_megatron.data.bad_rows import BadRow, BadRows
from chord_megatron.data.cache_key import FEWEST_ROWS, cache_folder, content_of
from chord_megatron.data.conversations import Conversation, read_conversation
from chord_megatron.data.experts import make_expert
from chord_megatron.data.formats import Keys, expert_keys, prompt_keys
from chord_megatron.data.mixture import Mixture, Part, names_of, weights_of
from chord_megatron.data.prompts import make_prompt, other_columns, reference_finder
from chord_megatron.data.samples import Sample
from chord_megatron.data.segments import TokenWeights
from chord_megatron.data.sources import Row, Rows, load_rows
from chord_megatron.data.tally import Tally
from chord_megatron.data.tokenizer import generation_end_tokens
from chord_megatron.data.turns import Turn, Turns, build_turns
from chord_megatron.system.errors import UserError
from chord_megatron.system.work import Work
from chord_megatron.types import ExpertSample, Prompt

MakeSample: TypeAlias = Callable[[int, Row, Conversation, Turn], Sample]


# Keys that choose rows, and change no sample of a row.
_WHICH_ROWS = {"dataset", "dataset_split", "max_rows", "eval_dataset", "eval_dataset_split", "num_eval_prompts"}
_WHICH_EXPERTS = {
    "chord_sft_dataset",
    "chord_sft_dataset_split",
    "chord_sft_max_rows",
    "chord_sft_global_batch_size",
    "chord_sft_per_device_train_batch_size",
}


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


def load_run_data(
    data: DataConfig, chord: ChordConfig, tokenizer: Any, *, expert_max_length: int, work: Work | None = None
) -> RunData:
    """Read and tokenize all data sets. Raises UserError naming file, row and column.

    expert_max_length: chord.chord_sft_max_length, or what the model reads, in tokens. work: is told how far it is.
    """
    turns = build_turns(tokenizer, data.prompt_format, data.system_prompt, data.chat_template_kwargs)
    reader = _Reader(turns, tokenizer, data.on_bad_row, work or Work())
    settings = data.model_dump(exclude=_WHICH_ROWS)
    experts: Sequence[ExpertSample] = []
    if chord.chord_sft_dataset is not None:
        of_experts = _Reading(
            ExpertSample,
            partial(make_expert, turns=turns, token_weights=TokenWeights(tokenizer)),
            keys=expert_keys(chord),
            limit=("chord.chord_sft_max_length", expert_max_length),
            settings={**settings, **chord.model_dump(include=set(_expert_keys(chord)))},
            first=chord.chord_sft_max_rows,
        )
        experts = reader.read(sources_of(chord.chord_sft_dataset), chord.chord_sft_dataset_split, of_experts)
    of_prompts = _Reading(
        Prompt,
        partial(make_prompt, find_reference=reference_finder(data.reference_pattern)),
        keys=prompt_keys(data),
        limit=("data.max_prompt_length", data.max_prompt_length),
        settings=settings,
        first=data.max_rows,
    )
    prompts = reader.read(sources_of(data.dataset), data.dataset_split, of_prompts) if data.dataset else []
    eval_prompts: Sequence[Prompt] = []
    if data.eval_dataset:
        of_eval = dataclasses.replace(of_prompts, first=data.num_eval_prompts)
        eval_prompts = reader.read(sources_of(data.eval_dataset), data.eval_dataset_split, of_eval)
    return RunData(prompts, eval_prompts, experts, frozenset(reader.end_token_ids), tuple(reader.notes))


def _expert_keys(chord: ChordConfig) -> list[str]:
    return [key for key in type(chord).model_fields if key.startswith("chord_sft_") and key not in _WHICH_EXPERTS]


@dataclass(frozen=True)
class _Reading(Generic[Sample]):
    """How the rows of a data set become samples."""

    kind: type[Sample]
    make: MakeSample[Sample]
    keys: Keys  # which columns hold what
    limit: tuple[str, int]  # tokens; longer samples are left out
    settings: dict[str, Any]  # what of the configuration the samples of a row depend on
    first: int | None = None  # so many rows of each source; None: all


class _Reader:
    """Reads data sets; `notes` and `end_token_ids` grow with each."""

    def __init__(self, turns: Turns, tokenizer: Any, on_bad_row: OnBadRow, work: Work) -> None:
        self._turns, self._tokenizer, self._on_bad_row, self._work = turns, tokenizer, on_bad_row, work
        self.notes: list[str] = []
        self.end_token_ids: set[int] = set()

    def read(self, sources: Sequence[DataSource], split: str, reading: _Reading[Sample]) -> Sequence[Sample]:
        """The samples of a data set's first rows, without those that are longer than the limit."""
        paths = [source.path for source in sources]
        if len(paths) == 1:
            return self._read_source(paths[0], split, reading, 0, "")[0]
        read, first_id = [], 0
        for path, name in zip(paths, names_of(paths)):
            samples, count = self._read_source(path, split, reading, first_id, name)
            read.append((first_id, samples))
            first_id += count
        weights = weights_of(sources, [len(samples) for _, samples in read])
        mixture = Mixture([Part(path, weight, *each) for path, weight, each in zip(paths, weights, read)])
        self.notes.append(mixture.note)
        return mixture

    def _read_source(
        self, path: str, split: str, reading: _Reading[Sample], first_id: int, name: str
    ) -> tuple[Sequence[Sample], int]:
        """The samples of a source, and its rows. name: that they bear, with `first_id` as the number of its row 0."""
        self._work.begin(path)
        bad_rows = BadRows(path, self._on_bad_row)
        rows = load_rows(path, split, bad_rows)
        count = len(rows) if reading.first is None else min(reading.first, len(rows))
        content = None if count < FEWEST_ROWS else content_of(rows)
        self._work.begin(f"rows of {path}", count)
        tally = Tally()
        samples: Sequence[Sample]
        if content is None:
            short, tally = self._make(reading, rows, range(count), bad_rows)
            samples = [_placed(sample, first_id, name) for sample in short]
        else:
            from chord_megatron.data.stored import stored_samples  # with pyarrow, which other runs need not import

            depends_on = [reading.kind.__name__, reading.limit, count, reading.settings, bad_rows.files]
            samples, tallies = stored_samples(
                cache_folder(content, self._tokenizer, depends_on),
                count,
                reading.kind,
                partial(self._make_apart, reading, rows, bad_rows),
                partial(_build, reading, rows, path, first_id, name),
                self._work,
            )
            for each in tallies:
                tally.add(each)
                bad_rows.add(each.bad_rows)
        _refuse_none(path, bad_rows, tally.usable, samples, reading.limit)
        self.end_token_ids |= tally.end_token_ids
        self._note(path, bad_rows, tally, tally.usable - len(samples), reading)
        return samples, len(rows)

    def _make(
        self, reading: _Reading[Sample], rows: Rows, indices: range, bad_rows: BadRows
    ) -> tuple[list[Sample], Tally]:
        """The samples of some rows that are short enough, and what the rows were taken for."""
        longest = reading.limit[1]
        tally, short = Tally(), []
        for index in indices:
            with bad_rows.at_row(index):
                row = rows[index]
                conversation = read_conversation(row, reading.keys)
                turn = self._turns.open(conversation, longest)
                sample = reading.make(index, row, conversation, turn)
                tally.count(conversation, turn.end_token_id)
                if len(sample.tokens) <= longest:
                    short.append(sample)
            self._work.done += 1
        return short, tally

    def _make_apart(
        self, reading: _Reading[Sample], rows: Rows, bad_rows: BadRows, indices: range
    ) -> tuple[list[Sample], Tally]:
        """The same, with the bad rows among them in the tally alone."""
        before = bad_rows.taken()
        samples, tally = self._make(reading, rows, indices, bad_rows)
        tally.bad_rows = bad_rows.taken()
        bad_rows.add(before)
        return samples, tally

    def _note(self, path: str, bad_rows: BadRows, tally: Tally, dropped: int, reading: _Reading[Sample]) -> None:
        self.notes.append(f"{path}: {tally}")
        if bad_rows.count:
            self.notes.append(f"{path}: skipped {bad_rows.count} unusable rows: {bad_rows}")
        if dropped:
            self.notes.append(f"{path}: dropped {dropped} rows above {reading.limit[0]}={reading.limit[1]}")


def _placed(sample: Sample, first_id: int, name: str) -> Sample:
    """In a data set of several sources."""
    if not name:
        return sample
    of_prompts: dict[str, Any] = {"source": name} if isinstance(sample, Prompt) else {}
    return dataclasses.replace(sample, id=first_id + sample.id, **of_prompts)


def _build(
    reading: _Reading[Sample], rows: Rows, path: str, first_id: int, name: str, fields: dict[str, Any]
) -> Sample:
    """A sample of what is stored of it; the columns of its row are read again."""
    if reading.kind is Prompt:
        fields = {**fields, "columns": _columns(rows, fields["id"], path, reading.keys)}
    return _placed(reading.kind(**fields), first_id, name)


def _columns(rows: Rows, index: int, path: str, keys: Keys) -> dict[str, Any]:
    """For reward functions, of a row that could be read before."""
    try:
        row = rows[index]
        return other_columns(row, read_conversation(row, keys))
    except (BadRow, OSError) as error:
        raise UserError(f"{path} row {index} is not what it was at the start: {error}; restore the file") from None


def _refuse_none(source: str, bad_rows: BadRows, usable: int, short: Sequence[Sample], limit: tuple[str, int]) -> None:
    if not usable:
        raise UserError(f"{source}: none of its {bad_rows.count} rows can be used: {bad_rows}; mend them")
    if not len(short):
        raise UserError(f"all {usable} usable rows of {source} are longer than {limit[0]}={limit[1]}; raise it")
