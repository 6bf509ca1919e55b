"""What is asked of all samples of a data set at once, and data sets that know it without going through them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar, overload

from chord_megatron.types import ExpertSample, Prompt, foreign_tokens

Sample = TypeVar("Sample", Prompt, ExpertSample)


class Samples(Sequence[Sample]):
    """A data set that is no list."""

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """As of `data.fingerprint`."""

    @property
    @abstractmethod
    def columns(self) -> frozenset[str]:
        """Of prompts: the columns that some row has beside it; of experts none."""

    @abstractmethod
    def lengths(self) -> Iterator[tuple[int, int]]:
        """The id of each sample, and its tokens."""

    @abstractmethod
    def holds_token_beyond(self, vocab_size: int) -> bool:
        """Whether some token may be none of `range(vocab_size)`."""

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self._at(index % len(self))

    @abstractmethod
    def _at(self, index: int) -> Sample:
        """Of 0 <= index < len(self)."""


def columns_of(*data_sets: Sequence[Prompt] | Sequence[ExpertSample]) -> list[str]:
    """The columns that every data set has beside some prompt; one without rows does not count, experts have none."""
    names = [
        samples.columns if isinstance(samples, Samples) else {name for each in samples for name in _columns(each)}
        for samples in data_sets
        if samples
    ]
    return sorted(set.intersection(*map(set, names))) if names else []


def _columns(sample: Prompt | ExpertSample) -> Iterable[str]:
    return sample.columns if isinstance(sample, Prompt) else ()


def lengths_of(samples: Sequence[Sample]) -> Iterator[tuple[int, int]]:
    """The id of each sample, and its tokens."""
    return samples.lengths() if isinstance(samples, Samples) else ((each.id, len(each.tokens)) for each in samples)


def holds_token_beyond(samples: Sequence[Sample], vocab_size: int) -> bool:
    """Whether some token may be none of `range(vocab_size)`."""
    if isinstance(samples, Samples):
        return samples.holds_token_beyond(vocab_size)
    return any(foreign_tokens(sample.tokens, vocab_size) for sample in samples)
