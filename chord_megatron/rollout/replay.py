"""Recorded rollouts: writing them, and an engine that plays them back for debugging and exactness tests."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import JsonLines, filter_json_lines, read_json_lines
from chord_megatron.types import RolloutRequest, RolloutSample, foreign_tokens

_DTYPES = {"tokens": torch.int32, "response_mask": torch.bool, "rollout_log_probs": torch.float32}


class RolloutRecorder:
    """Appends every rollout of a run to a jsonl file, one completion a line; used by rank 0."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """`resume_step`: keep what was recorded before that step; None starts a new file. Raises UserError."""
        if resume_step is None and path.exists() and path.stat().st_size:
            raise UserError(
                f"rollout.record_to: {path} holds the rollouts of another run; remove it or name another file"
            )
        if resume_step is not None:
            filter_json_lines(path, lambda record: record["step"] < resume_step)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lines = JsonLines(path)

    def write(self, step: int, samples: Sequence[RolloutSample]) -> None:
        """Record the completions generated at `step`."""
        for sample in samples:
            values = {name: getattr(sample, name) for name in sample.__dataclass_fields__}
            rows = {name: values[name].tolist() for name in _DTYPES}
            self._lines.write({"step": step, **values, **rows})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class ReplayRollout:
    """Returns what was recorded at each step; the prompts must be those of the recording."""

    generation_seconds: float | None = None

    def __init__(self, path: Path, vocab_size: int) -> None:
        """Raises UserError where the file is no recording, or has tokens that the model has no row for."""
        self._path = path
        self._samples: dict[int, list[RolloutSample]] = {}
        self.weights_version: int | None = None
        for number, (step, sample) in enumerate(_read_recording(path), start=1):
            if foreign := foreign_tokens(sample.tokens.tolist(), vocab_size):
                raise UserError(
                    f"{path}:{number} has token {foreign[0]}, of which a model of vocab_size {vocab_size} has no row; "
                    "replay what was recorded with this model"
                )
            self._samples.setdefault(step, []).append(sample)

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """See RolloutEngine. Raises UserError where the recording does not fit the run."""
        samples = sorted(self._samples.get(request.step, []), key=lambda sample: sample.sample_index)
        repeated = request.repeated
        if len(samples) != len(repeated):
            raise UserError(
                f"{self._path} holds {len(samples)} completions for step {request.step}, but the run asks for "
                f"{len(repeated)}; use the batch sizes of the run that recorded it"
            )
        for index, (sample, prompt) in enumerate(zip(samples, repeated)):
            answered = tuple(sample.tokens[: len(prompt.tokens)].tolist())
            if sample.prompt_id != prompt.id or answered != prompt.tokens:
                raise UserError(
                    f"{self._path}: completion {index} of step {request.step} answers prompt {sample.prompt_id}, but "
                    f"this run asks prompt {prompt.id}; use the data, tokenizer and seed of the run that recorded it"
                )
        return samples

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """Nothing to do: the completions are there already."""
        self.weights_version = policy_version

    def close(self) -> None:
        """Nothing to do."""


def _read_recording(path: Path) -> Iterator[tuple[int, RolloutSample]]:
    if not path.is_file():
        raise UserError(f"rollout.replay_from: {path} does not exist; record one with rollout.record_to")
    for number, record in enumerate(read_json_lines(path), start=1):
        try:
            yield record["step"], _as_sample(record)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise UserError(f"{path}:{number} is not a recorded rollout ({error!r})") from None


def _as_sample(record: dict[str, Any]) -> RolloutSample:
    values = {name: record[name] for name in RolloutSample.__dataclass_fields__}
    rows = {name: torch.tensor(values[name], dtype=dtype) for name, dtype in _DTYPES.items()}
    if len({len(row) for row in rows.values()}) > 1:
        raise ValueError(f"{', '.join(rows)} are of different lengths")
    return RolloutSample(**{**values, **rows})
