"""Recorded rollouts: writing them, and an engine that plays them back for debugging and exactness tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from chord_megatron.rollout.protocol import WeightSource
from chord_megatron.rollout.recorded_routing import RoutingForm, encode
from chord_megatron.rollout.recording import ROWS, read_recording
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import JsonLines, filter_json_lines
from chord_megatron.types import RolloutRequest, RolloutSample


class RolloutRecorder:
    """Appends every rollout of a run to a jsonl file, one completion a line; used by rank 0."""

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        """`resume_step`: keep what was recorded before that step; None starts a new file. Raises UserError."""
        if path.is_dir():
            raise UserError(
                f"rollout.record_to: {path} is a directory; name a file in it, such as {path / 'rollouts.jsonl'}"
            )
        if resume_step is None and path.exists() and path.stat().st_size:
            raise UserError(
                f"rollout.record_to: {path} holds the rollouts of another run; remove it or name another file"
            )
        try:
            if resume_step is not None:
                filter_json_lines(path, lambda record: record["step"] < resume_step)
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lines = JsonLines(path)
        except OSError as error:
            raise UserError(
                f"rollout.record_to: {path} cannot be written ({error.strerror}); name another file"
            ) from None

    def write(self, step: int, samples: Sequence[RolloutSample]) -> None:
        """Record the completions generated at `step`. Log-probs that are not finite become null."""
        for sample in samples:
            values = {name: getattr(sample, name) for name in sample.__dataclass_fields__}
            rows = {name: values[name].tolist() for name in ROWS}
            routing = values.pop("routing")
            routed = {} if routing is None else {"routing": encode(routing)}
            self._lines.write({"step": step, **values, **rows, **routed})

    def close(self) -> None:
        """Close the file."""
        self._lines.close()


class ReplayRollout:
    """Returns what was recorded at each step; the prompts must be those of the recording."""

    generation_seconds: float | None = None

    def __init__(self, path: Path, *, vocab_size: int, routing: RoutingForm | None = None) -> None:
        """Both of the model that is to be trained; routing: None = of no use. Raises UserError naming file and line."""
        self._path = path
        self._steps = read_recording(path, vocab_size, routing)
        self.weights_version: int | None = None

    def generate(self, request: RolloutRequest) -> list[RolloutSample]:
        """See RolloutEngine. Raises UserError where the recording does not fit the run."""
        recorded = self._steps.get(request.step, {})
        repeated = request.repeated
        if len(recorded) != len(repeated):
            raise UserError(
                f"{self._path} holds {len(recorded)} completions for step {request.step}, but the run asks for "
                f"{len(repeated)}; use the batch sizes of the run that recorded it"
            )
        samples = []
        for index, prompt in enumerate(repeated):
            if index not in recorded:
                raise UserError(
                    f"{self._path} holds no completion {index} of step {request.step}; record it again with "
                    "rollout.record_to"
                )
            line, sample = recorded[index]
            where = f"{self._path}:{line}: completion {index} of step {request.step}"
            length = len(sample.response_tokens)
            asked = tuple(sample.tokens[: len(sample.tokens) - length].tolist())
            if sample.prompt_id != prompt.id or asked != prompt.tokens:
                raise UserError(
                    f"{where} answers prompt {sample.prompt_id}, but this run asks prompt {prompt.id}; use the data, "
                    "tokenizer and seed of the run that recorded it"
                )
            if length > (limit := request.params.max_completion_length):
                raise UserError(f"{where} has {length} tokens, above rollout.max_completion_length={limit}; raise it")
            samples.append(sample)
        return samples

    def update_weights(self, weights: WeightSource, policy_version: int) -> None:
        """Nothing to do: the completions are there already."""
        self.weights_version = policy_version

    def close(self) -> None:
        """Nothing to do."""
