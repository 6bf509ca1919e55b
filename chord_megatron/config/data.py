"""What is read, and what completions are worth."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from chord_megatron.config.base import Group
from chord_megatron.config_types import (
    DataFormat,
    DataSet,
    Gigabytes,
    Number,
    PathName,
    Pattern,
    Positive,
    Seconds,
    Text,
    is_text,
)

PromptFormat = Literal["chat", "text"]
OnBadRow = Literal["stop", "skip"]


class DataConfig(Group):
    dataset: DataSet | None = None
    """a file, a folder, a glob, or a `datasets` name, with `:subset` where it has subsets ([which](data.md#files)); or
    [several](data-sources.md), `[a.jsonl, {path: b.parquet, weight: 2.0}]`; `null` asks for mu = 1 throughout,
    under `chord.semantics: paper`: no rollout engine is built
    """
    dataset_split: Text = "train"
    """for a `datasets` name, and a folder whose files are named after splits"""
    eval_dataset: PathName | None = None
    """held-out prompts"""
    eval_dataset_split: Text = "test"
    """for a `datasets` name"""
    num_eval_prompts: Positive | None = None
    """the first N; `null` = all"""
    format: DataFormat = "auto"
    """whose rows these are ([formats](data.md#formats)); `auto` recognises each row, and says what it was taken for"""
    max_rows: Positive | None = None
    """of each source of `data.dataset` the first N; `null` = all"""
    prompt_column: Text | None = None
    """text, or a list of chat messages (also as JSON text); `null` = what the format says: `prompt`, `messages`, ..."""
    reference_column: Text | None = None
    """the reference answer, which reward functions compare with; `reward_model.ground_truth` leads into an object;
    `null` = what the format says: `answer`, `solution`, ...
    """
    reference_pattern: Pattern | None = None
    """a regular expression whose group 1 is the reference, where `accuracy` should not find it by itself: `Answer:
    (.+)`
    """
    prompt_format: PromptFormat = "chat"
    """the tokenizer's chat template; or `text`"""
    system_prompt: Annotated[str, AfterValidator(is_text)] | None = None
    """put before every prompt that has no system message or column of its own"""
    chat_template_kwargs: dict[str, Any] = {}
    """variables of the chat template, such as `{enable_thinking: false}`; a row's column of that name wins"""
    max_prompt_length: Positive = 1024
    """tokens; longer prompts are dropped and counted"""
    on_bad_row: OnBadRow = "stop"
    """an unusable row of any data set ends the run with its sentence; `skip` leaves such rows out and counts them by
    reason
    """


class RewardsConfig(Group):
    reward_funcs: list[Text] = Field(default=["accuracy"], min_length=1)
    """`accuracy` (math-verify), `format` (think and answer tags), `soft_overlong` (DAPO's punishment of length), or
    `path.py:function`
    """
    reward_weights: list[Number] | None = None
    """one number per function; `null` = 1 for each"""
    timeout_seconds: Seconds = 60.0
    """of each call of your own function, which runs in a process of its own"""
    memory_limit_gb: Gigabytes | None = None
    """address space of each process of your own functions, which is more than they fill (CUDA reserves far more); 0.1
    or more
    """
    environment: list[Text] = []
    """names of further environment variables that your own functions see, such as the key of a judge"""
    soft_max_length: Positive | None = None
    """for `soft_overlong`: tokens at which it is -1; `null` = `rollout.max_completion_length`"""
    soft_cache_length: Positive | None = None
    """for `soft_overlong`: tokens before the longest over which it falls from 0 to -1"""
    answer_format: Literal["boxed", "hash", "tag", "any"] = "any"
    r"""the mark that `accuracy` wants in a completion: `boxed` (`\boxed{}`), `hash` (a `####` line), `tag`
    (`<answer>`); without it 0. `any` = any of them, or what is found in the text: then noise with the right number
    in it is paid
    """
    on_error: Literal["stop", "leave_out"] = "stop"
    """where a function returns `null` or NaN: `stop` ends the run with a sentence, `leave_out` [leaves the completion
    out](#rewards-that-are-missing)
    """
