"""Kinds of values that keys of the configuration have, with their bounds."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PlainValidator,
    Tag,
    ValidationError,
    WrapValidator,
    model_validator,
)

from chord_megatron.system.sentences import did_you_mean, one_line, shown

LARGEST_INTEGER = 2**31 - 1  # PyTorch, NumPy and Megatron-Core take it anywhere; also 2 x seed + 1 as a seed
LARGEST_NUMBER = 1e30  # float32 holds it, and what it is multiplied with
_LONGEST_WAIT = 1e6  # seconds; poll() takes 2^31 milliseconds
_LONGEST_NAME = 255  # bytes of one part of a path
# Below, vLLM samples at 0.01 instead (_MAX_TEMP in sampling_params.py), and logits / temperature overflow at last.
_COLDEST, _HOTTEST = 0.01, 100.0


def is_text(value: str) -> str:
    """The same. Raises ValueError where it cannot be written."""
    try:
        value.encode()
    except UnicodeEncodeError:
        value = "\0"
    if "\0" in value:
        raise ValueError("must be text without NUL and halves of characters")
    return value


def _path(value: str) -> str:
    if max(len(os.fsencode(part)) for part in value.split("/")) > _LONGEST_NAME:
        raise ValueError(f"must be a path whose parts have at most {_LONGEST_NAME} bytes")
    return value


def _pattern(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"must be a regular expression ({one_line(error)})") from None
    if groups < 1:
        raise ValueError(r"must have a group, as in '####\s*(.+)'")
    return value


def _greedy_or_above(temperature: float) -> float:
    if 0 < temperature < _COLDEST:
        raise ValueError(f"must be 0 (greedy) or at least {_COLDEST}")
    return temperature


def _pipeline_layout(value: Any, validate: Callable[[Any], Any]) -> Any:
    """In place of a mistake for each of the forms, one."""
    try:
        return validate(value)
    except ValidationError:
        raise ValueError("must be auto or the layers of each stage, such as [3, 4, 4, 2]") from None


def _recompute(value: Any) -> Any:
    if isinstance(value, bool) or value == "full":
        return value
    if not isinstance(value, list) or not value or not all(isinstance(module, str) for module in value):
        raise ValueError("must be true, false, full, or a list of modules such as [core_attn, mlp]")
    for module in value:
        if module not in RECOMPUTE_MODULES:
            known = did_you_mean(module, RECOMPUTE_MODULES) or f"; choose among {', '.join(RECOMPUTE_MODULES)}"
            raise ValueError(f"{shown(module)} is no module{known}")
    return value


# Megatron-Core's names of parts of a layer (TransformerConfig.recompute_modules), as far as models here have them.
RECOMPUTE_MODULES = ("core_attn", "mlp", "layernorm", "mla_up_proj", "moe", "moe_act", "shared_experts")

Positive = Annotated[int, Field(gt=0, le=LARGEST_INTEGER)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST_INTEGER)]
Port = Annotated[int, Field(ge=1, le=65535)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Number = Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]
NonNegativeNumber = Annotated[float, Field(ge=0.0, le=LARGEST_NUMBER)]
PositiveNumber = Annotated[float, Field(gt=0.0, le=LARGEST_NUMBER)]
Minutes = Annotated[float, Field(ge=0.1, le=1e5)]
Sharpness = Annotated[float, Field(ge=1e-3, le=1e3)]
Gigabytes = Annotated[float, Field(ge=0.1, le=1e6)]  # a Python with NumPy takes a tenth of one
Seconds = Annotated[float, Field(gt=0.0, le=_LONGEST_WAIT)]
Temperature = Annotated[float, Field(ge=_COLDEST, le=_HOTTEST)]
TemperatureOrGreedy = Annotated[float, Field(ge=0.0, le=_HOTTEST), AfterValidator(_greedy_or_above)]
Text = Annotated[str, Field(min_length=1), AfterValidator(is_text)]
Pattern = Annotated[Text, AfterValidator(_pattern)]
PathName = Annotated[Text, AfterValidator(_path)]

PipelineLayout = Annotated[Literal["auto"] | list[NonNegative] | None, WrapValidator(_pipeline_layout)]
Recompute = Annotated[bool | str | list[str], PlainValidator(_recompute)]
# The keys of data/formats.py, FORMATS: "auto", shapes of rows, and systems by their names.
DataFormat = Literal[
    "auto", "verl", "verl_sft", "roll", "sharegpt", "alpaca", "query", "slime", "trinity", "completion", "text",
    "input_output", "plain", "messages", "ms_swift", "trl", "nemo_rl", "prime_rl", "areal",
]  # fmt: skip


class DataSource(BaseModel):
    """One of several data sets."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    path: PathName
    # Rows come in the ratio of the weights. None: 1; where no source has one, as many as it has rows.
    weight: Annotated[float, Field(ge=1e-6, le=1e6)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unknown(cls, value: Any) -> Any:
        for name in value if isinstance(value, dict) else ():
            if name not in cls.model_fields:
                raise ValueError(f"unknown key {shown(name)}; a source has {' and '.join(cls.model_fields)}")
        return value


def _kind_of_source(value: Any) -> str:
    return "<source>" if isinstance(value, dict | DataSource) else "<path>"


def _kind_of_data(value: Any) -> str:
    return "<list>" if isinstance(value, list) else "<path>"


def _no_group(value: Any) -> Any:
    if isinstance(value, dict | DataSource):
        raise ValueError("one source is its path alone, several are a list")
    return value


def _once_each(sources: list[str | DataSource]) -> list[str | DataSource]:
    paths = [source.path for source in sources_of(sources)]
    for path in paths:
        if paths.count(path) > 1:
            raise ValueError(f"names {shown(path)} twice; name it once, with the weight of both")
    return sources


_Path = Annotated[PathName, Tag("<path>")]
_Sources = list[Annotated[_Path | Annotated[DataSource, Tag("<source>")], Discriminator(_kind_of_source)]]
_One = Annotated[PathName, BeforeValidator(_no_group), Tag("<path>")]
_OneOrSeveral: TypeAlias = _One | Annotated[_Sources, Field(min_length=1), AfterValidator(_once_each), Tag("<list>")]
DataSet = Annotated[_OneOrSeveral, Discriminator(_kind_of_data)]


def sources_of(data_set: str | list[str | DataSource]) -> list[DataSource]:
    """The sources of a data set, in their order."""
    sources = data_set if isinstance(data_set, list) else [data_set]
    return [source if isinstance(source, DataSource) else DataSource(path=source) for source in sources]
