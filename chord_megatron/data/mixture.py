"""Several data sets as one: end to end, and drawn in the ratio of their weights."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate, chain
from typing import Generic, NamedTuple

from chord_megatron.config_types import DataSource
from chord_megatron.data.cursor import Cursor, MixedCursor, ShuffledCursor
from chord_megatron.data.fingerprint import fingerprint, fingerprint_of_parts
from chord_megatron.data.samples import Sample, Samples, columns_of, holds_token_beyond, lengths_of


class Part(NamedTuple, Generic[Sample]):
    """A source in a mixture."""

    path: str
    weight: float
    first_id: int  # the number that its row 0 has
    samples: Sequence[Sample]


class Mixture(Samples[Sample]):
    """The samples of one part behind those of another."""

    def __init__(self, parts: Sequence[Part[Sample]]) -> None:
        self.parts: Sequence[Part[Sample]] = parts
        self._starts = [0, *accumulate(len(part.samples) for part in parts)]

    def __len__(self) -> int:
        return self._starts[-1]

    def _at(self, index: int) -> Sample:
        number = bisect_right(self._starts, index) - 1
        return self.parts[number].samples[index - self._starts[number]]

    @property
    def fingerprint(self) -> str:
        return fingerprint_of_parts([fingerprint(part.samples) for part in self.parts])

    @property
    def columns(self) -> frozenset[str]:
        return frozenset(chain(*(columns_of(part.samples) for part in self.parts)))

    def lengths(self) -> Iterator[tuple[int, int]]:
        return chain(*(lengths_of(part.samples) for part in self.parts))

    def holds_token_beyond(self, vocab_size: int) -> bool:
        return any(holds_token_beyond(part.samples, vocab_size) for part in self.parts)

    @property
    def note(self) -> str:
        """In what ratio rows come."""
        total = sum(part.weight for part in self.parts)
        shares = (f"{part.path} {part.weight / total:.1%} of {len(part.samples)}" for part in self.parts)
        return f"rows drawn: {', '.join(shares)}"


def parts_of(samples: Sequence[Sample], path: str) -> Sequence[Part[Sample]]:
    """The parts of a mixture; a data set of one source, `path`, is its only one."""
    return samples.parts if isinstance(samples, Mixture) else [Part(path, 1.0, 0, samples)]


def cursor_over(samples: Sequence[Sample], seed: int) -> Cursor:
    """Draws from one source in a shuffled order, from several by their weights."""
    if isinstance(samples, Mixture):
        return MixedCursor([len(part.samples) for part in samples.parts], [p.weight for p in samples.parts], seed)
    return ShuffledCursor(max(1, len(samples)), seed)


def weights_of(sources: Sequence[DataSource], sizes: Sequence[int]) -> list[float]:
    """One that is not given is 1; where none is, each row comes as often as any other."""
    if all(source.weight is None for source in sources):
        return [float(size) for size in sizes]
    return [1.0 if source.weight is None else source.weight for source in sources]


def names_of(paths: Sequence[str]) -> list[str]:
    """What sources are called in metrics: the last part of the path, or all of it where two have the same."""
    lasts = [path.rstrip("/").rpartition("/")[2] for path in paths]
    return lasts if len(set(lasts)) == len(lasts) else list(paths)
