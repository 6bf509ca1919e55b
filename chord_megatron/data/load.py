"""The data of a run: tokenizer, prompts, held-out prompts and expert answers, read and tokenized at start-up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.experts import load_experts
from chord_megatron.data.prompts import load_prompts
from chord_megatron.data.sources import load_rows
from chord_megatron.types import ExpertSample, Prompt


@dataclass(frozen=True)
class RunData:
    """Everything a run reads, and what was left out of it."""

    prompts: Sequence[Prompt]
    eval_prompts: Sequence[Prompt]  # empty without data.eval_dataset
    experts: Sequence[ExpertSample]  # empty without chord.chord_sft_dataset
    notes: tuple[str, ...]  # one line for each data set that lost rows to a length limit


def stop_token_ids(model_dir: Path, tokenizer: Any, configured: Sequence[int] | None) -> tuple[int, ...]:
    """The tokens that end a completion: those configured, or the tokenizer's and the generation config's."""
    if configured is not None:
        return tuple(configured)
    ids = {tokenizer.eos_token_id}
    if (model_dir / "generation_config.json").is_file():
        eos = GenerationConfig.from_pretrained(model_dir).eos_token_id
        ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
    return tuple(sorted(ids))


def load_run_data(data: DataConfig, chord: ChordConfig, tokenizer: Any) -> RunData:
    """Read and tokenize all data sets. Raises UserError naming file, row and column."""
    notes: list[str] = []

    def prompts_of(source: str, split: str, limit: int | None = None) -> list[Prompt]:
        rows = load_rows(source, split)
        prompts, dropped = load_prompts(
            [rows[i] for i in range(min(limit, len(rows)))] if limit else rows,
            tokenizer,
            source=source,
            prompt_column=data.prompt_column,
            reference_column=data.reference_column,
            reference_pattern=data.reference_pattern,
            prompt_format=data.prompt_format,
            system_prompt=data.system_prompt,
            max_prompt_length=data.max_prompt_length,
        )
        if dropped:
            notes.append(f"{source}: dropped {dropped} prompts above data.max_prompt_length={data.max_prompt_length}")
        return prompts

    experts: list[ExpertSample] = []
    if chord.chord_sft_dataset is not None:
        experts, dropped = load_experts(
            load_rows(chord.chord_sft_dataset, chord.chord_sft_dataset_split),
            tokenizer,
            source=chord.chord_sft_dataset,
            prompt_column=chord.chord_sft_prompt_column,
            answer_column=chord.chord_sft_answer_column,
            prompt_format=data.prompt_format,
            system_prompt=data.system_prompt,
            end_token_id=tokenizer.eos_token_id,
            max_length=chord.chord_sft_max_length,
        )
        if dropped:
            notes.append(
                f"{chord.chord_sft_dataset}: dropped {dropped} expert rows above "
                f"chord.chord_sft_max_length={chord.chord_sft_max_length}"
            )
    prompts = prompts_of(data.dataset, data.dataset_split)
    eval_prompts = (
        prompts_of(data.eval_dataset, data.eval_dataset_split, data.num_eval_prompts) if data.eval_dataset else []
    )
    return RunData(prompts, eval_prompts, experts, tuple(notes))
