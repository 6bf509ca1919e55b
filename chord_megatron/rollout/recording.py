"""The lines of a recording, checked: the file may come from another program, or have been edited by hand."""

from __future__ import annotations

import math
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from chord_megatron.rollout.recorded_routing import RoutingForm, decode
from chord_megatron.system.errors import UserError
from chord_megatron.system.files import read_json_lines
from chord_megatron.system.sentences import shown
from chord_megatron.types import FinishReason, RolloutSample, foreign_tokens


class _Row(NamedTuple):
    """A field with a value for each token."""

    dtype: torch.dtype
    types: tuple[type, ...]  # of a value in JSON
    what: str


ROWS = {
    "tokens": _Row(torch.int32, (int,), "integer"),
    "response_mask": _Row(torch.bool, (bool,), "boolean"),
    "rollout_log_probs": _Row(torch.float32, (float, int, NoneType), "number"),  # null: NaN
}
_COUNTS = ("prompt_id", "sample_index", "policy_version")
_ROUNDING = 1e-3  # engines that subtract a rounded logarithm of the sum may write a little more than 0


class RecordedSample(NamedTuple):
    """A completion and the line that it is on."""

    line: int
    sample: RolloutSample


def read_recording(
    path: Path, vocab_size: int, routing: RoutingForm | None = None
) -> dict[int, dict[int, RecordedSample]]:
    """The completions of each step by their place in its batch. Raises UserError naming file and line.

    routing: what that of each completion must look like; None: it is left out.
    """
    if path.is_dir():
        raise UserError(f"rollout.replay_from: {path} is a directory; name the file in it")
    if not path.exists():
        raise UserError(f"rollout.replay_from: {path} does not exist; record one with rollout.record_to")
    steps: dict[int, dict[int, RecordedSample]] = {}
    for line, record in enumerate(read_json_lines(path), start=1):
        step = record["step"]
        try:
            sample = _as_sample(record, vocab_size, routing)
            first = steps.setdefault(step, {}).setdefault(sample.sample_index, RecordedSample(line, sample))
            if first.line != line:
                place = f"completion {sample.sample_index} of step {step}"
                raise ValueError(f"repeats {place}, which is on line {first.line}")
        except (ValueError, OverflowError) as error:  # OverflowError: an integer that no float holds
            raise UserError(f"{path}:{line}: {error}; record it again with rollout.record_to") from None
    return steps


def _as_sample(record: dict[str, Any], vocab_size: int, routing: RoutingForm | None) -> RolloutSample:
    """Raises ValueError saying what is wrong."""
    needed = [name for name in RolloutSample.__dataclass_fields__ if name != "routing" or routing is not None]
    values = {name: record[name] for name in needed if name in record}
    for name in needed:
        if name not in values:
            purpose = " for rollout.router_replay=sampler" if name == "routing" else ""
            raise ValueError(f"lacks {name!r}{purpose}")
    for name in _COUNTS:
        if type(values[name]) is not int or values[name] < 0:
            raise ValueError(f"{name!r} is {shown(values[name])}, which is no integer from 0 on")
    if values["finish_reason"] not in get_args(FinishReason):
        names = ", ".join(map(repr, get_args(FinishReason)))
        raise ValueError(f"'finish_reason' is {shown(values['finish_reason'])}, not one of {names}")
    for name, row in ROWS.items():
        _check_row(name, values[name], row)
    _check_completion(values["tokens"], values["response_mask"], values["rollout_log_probs"], vocab_size)
    if routing is not None:
        values["routing"] = decode(values["routing"], len(values["tokens"]), routing)
    return RolloutSample(**{**values, **{name: _tensor(values[name], row.dtype) for name, row in ROWS.items()}})


def _check_row(name: str, values: Any, row: _Row) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{name!r} is no list")
    for value in values:
        if type(value) not in row.types:  # not isinstance: a boolean is an int
            raise ValueError(f"{name!r} holds {shown(value)}, which is no {row.what}")


def _check_completion(tokens: list[int], mask: list[bool], log_probs: list[float | None], vocab_size: int) -> None:
    if len({len(tokens), len(mask), len(log_probs)}) > 1:
        raise ValueError("'tokens', 'response_mask' and 'rollout_log_probs' are of different lengths")
    start = len(mask) - sum(mask)
    if start == 0 or any(mask[:start]):
        raise ValueError("'response_mask' is not false on a prompt, then true on its completion")
    if foreign := foreign_tokens(tokens, vocab_size):
        raise ValueError(f"token {foreign[0]} is not one of the model's {vocab_size}")
    for log_prob in log_probs[start:]:
        if log_prob is not None and math.isfinite(log_prob) and log_prob > _ROUNDING:
            raise ValueError(f"log-prob {log_prob} is above 0: these are not logarithms of probabilities")


def _tensor(values: list[Any], dtype: torch.dtype) -> Tensor:
    return torch.tensor([math.nan if value is None else value for value in values], dtype=dtype)
