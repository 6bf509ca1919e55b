"""A first configuration for a model and a data file: every key with the reason for its value, in a line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from chord_megatron.config import Config
from chord_megatron.inspection.guess import ExpertGuess, PromptGuess
from chord_megatron.inspection.visible import beginning
from chord_megatron.planning.gpus import GPUS, Assumptions, Cluster
from chord_megatron.planning.plan import make_plan
from chord_megatron.planning.proposals import search
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted
from chord_megatron.system.yaml_text import read_yaml, write_yaml
from chord_megatron.weights.architecture import ModelArchitecture

_GPU = GPUS["h100"]
_NUM_GENERATIONS = 8
_PROMPTS_PER_STEP, _EPOCHS = 32, 2
_COMPLETION = 1024  # tokens, without experts to go by
_FEWEST, _LONGEST_COMPLETION = 256, 8192  # with them
_WIDTH = 100  # a comment that goes beyond stands above its key
_ROUND = 64  # lengths are multiples of so many tokens


class Key(NamedTuple):
    """A key of a group."""

    name: str
    value: Any
    why: str


Groups = dict[str, list[Key]]


@dataclass(frozen=True)
class Recipe:
    """A configuration that `validate` accepts on so many processes."""

    text: str
    found: tuple[str, ...]  # what it follows from, in sentences


@dataclass(frozen=True)
class Material:
    """What there is to train with."""

    model_dir: str
    arch: ModelArchitecture
    has_template: bool
    prompts: PromptGuess
    experts: ExpertGuess | None
    processes: int  # GPUs of a node

    @property
    def draws(self) -> bool:
        """Whether completions can be rewarded."""
        return self.prompts.reference_column is not None


def make_recipe(material: Material, output_dir: str) -> Recipe:
    """Raises UserError where there is nothing to learn from, or the model cannot be laid out."""
    if not material.draws and material.experts is None:
        raise UserError(
            f"{material.prompts.path} has neither references to compare completions with (a column 'answer' or the "
            "like) nor worked answers; add one of them, or give --experts"
        )
    groups = _groups(material, output_dir)
    layout = _layout(material, groups)
    groups["parallel"] = layout.keys
    for key in layout.changed:
        group, name = key.name.split(".")
        groups[group] = [each for each in groups[group] if each.name != name] + [key._replace(name=name)]
    text = _written(material, groups, layout.remark)
    config = Config.model_validate(read_yaml(text))
    make_plan(config, material.arch, material.processes)
    return Recipe(text, tuple(_found(material)))


def _groups(material: Material, output_dir: str) -> Groups:
    """All but the layout."""
    prompts, experts, arch = material.prompts, material.experts, material.arch
    prompt_length = _rounded(prompts.longest)
    answer = experts.longest_answer if experts else 0
    completion = max(_FEWEST, min(_rounded(2 * answer), _LONGEST_COMPLETION)) if answer else _COMPLETION
    room = arch.max_position_embeddings
    if prompt_length + completion > room:
        completion = min(completion, max(1, room // 2))
        prompt_length = min(prompt_length, room - completion)
    prompts_per_step = min(_PROMPTS_PER_STEP, prompts.rows)
    steps = max(2, math.ceil(_EPOCHS * prompts.rows / prompts_per_step))
    groups: Groups = {
        "model": [
            Key("path", material.model_dir, f"{arch.family}, {arch.num_layers} layers, reads {room} tokens"),
            Key("dtype", "bfloat16", "optimizer state and gradient sums are float32 even so"),
        ],
        "parallel": [],
        "data": _data(material, prompt_length),
    }
    if material.draws:
        groups["rewards"] = [Key("reward_funcs", ["accuracy"], "math-verify; or path.py:function of your own")]
        if prompts.asked:
            groups["rewards"].append(
                Key("answer_format", prompts.asked, "as the system prompt asks; a number elsewhere earns nothing")
            )
        groups["rollout"] = [
            Key("num_generations", _NUM_GENERATIONS, "completions of each prompt, which are compared"),
            Key("temperature", 1.0, "as drawn, so trained"),
            Key(
                "max_completion_length",
                completion,
                f"the longest worked answer has {answer} tokens; a model on its way there needs more"
                if answer
                else "no worked answers to go by; raise it for models that think",
            ),
        ]
    groups["chord"] = _chord(material, prompts_per_step, steps)
    groups["optimizer"] = [
        Key("lr", 1e-6, "of full fine-tuning with rewards; 5e-6 to 1e-5 for supervised training alone"),
        Key("lr_warmup_iters", min(10, steps - 1), "from 0"),
    ]
    groups["train"] = [
        Key("output_dir", output_dir, "a directory of its own; the same command again resumes there"),
        Key(
            "global_batch_size",
            prompts_per_step * _NUM_GENERATIONS,
            f"completions of a step: {prompts_per_step} prompts",
        ),
        Key("micro_batch_size", 1, "rows at a time: raise it while memory lasts; the loss is the same"),
        Key("train_iters", steps, f"{_EPOCHS} epochs of {prompts.rows} rows, {prompts_per_step} a step"),
        Key("save_steps", max(1, steps // 5), "checkpoint and export; also after the last step"),
        Key("save_total_limit", 2, "older ones are removed"),
    ]
    return groups


def _data(material: Material, prompt_length: int) -> list[Key]:
    prompts = material.prompts
    keys = []
    if material.draws:
        keys.append(Key("dataset", prompts.path, f"{prompts.rows} rows: {prompts.kind}"))
        if prompts.prompt_column is not None:
            keys.append(Key("prompt_column", prompts.prompt_column, "the question"))
        mark = f", marked as {prompts.mark}" if prompts.mark else ""
        keys.append(Key("reference_column", prompts.reference_column, f"what accuracy compares with{mark}"))
    if not material.has_template:
        keys.append(Key("prompt_format", "text", "the tokenizer has no chat template"))
    if prompts.system_prompt:
        keys.append(
            Key("system_prompt", prompts.system_prompt, "no row has one; accuracy finds an answer that is marked")
        )
    keys.append(Key("max_prompt_length", prompt_length, f"the longest prompt has {prompts.longest} tokens"))
    unusable = prompts.unusable + (material.experts.unusable if material.experts else 0)
    if unusable:
        keys.append(Key("on_bad_row", "skip", f"{counted(unusable, 'row')} cannot be used: `data show` says why"))
    return keys


def _chord(material: Material, prompts_per_step: int, steps: int) -> list[Key]:
    experts = material.experts
    if experts is None:
        why = "no worked answers: GRPO alone"
        return [Key("chord_mu_peak", 0.0, why), Key("chord_mu_valley", 0.0, why)]
    keys = [Key("chord_sft_dataset", experts.path, f"{experts.rows} rows of worked answers")]
    if experts.prompt_column is not None:
        keys.append(Key("chord_sft_prompt_column", experts.prompt_column, "the question"))
    if experts.answer_column is not None:
        keys.append(Key("chord_sft_answer_column", experts.answer_column, "the worked answer"))
    length = min(_rounded(experts.longest), material.arch.max_position_embeddings)
    keys += [
        Key("chord_sft_max_length", length, f"the longest prompt and answer have {experts.longest} tokens"),
        Key("chord_sft_global_batch_size", min(prompts_per_step, experts.rows), "expert rows of a step"),
    ]
    if not material.draws:
        why = "no references: supervised training alone"
        return [*keys, Key("chord_mu_peak", 1.0, why), Key("chord_mu_valley", 1.0, why)]
    return [
        *keys,
        Key("chord_mu_peak", 0.9, "mu of L = (1 - mu) L_GRPO + mu L_SFT: it begins with the experts"),
        Key("chord_mu_valley", 0.05, "and ends with the model's own completions"),
        Key("chord_mu_decay_steps", max(1, 2 * steps // 3), "after two thirds of the steps"),
    ]


class _Layout(NamedTuple):
    keys: list[Key]
    changed: list[Key]  # of other groups, with their names
    remark: str


def _layout(material: Material, groups: Groups) -> _Layout:
    """What the planner proposes for GPUs of the usual size; where none fits, what `validate` accepts."""
    processes = material.processes
    groups = {**groups, "parallel": []}
    before = Config.model_validate({name: {key.name: key.value for key in keys} for name, keys in groups.items()})
    try:
        best = search(before, material.arch, Cluster(_GPU, processes, processes), Assumptions()).best
    except UserError as error:
        return _fallback(material, before, beginning(str(error), 300))
    config, parallel = best.layout.config, best.layout.config.parallel
    peak = f"{best.layout.fullest.peak / 1e9:.1f} of {_GPU.memory_gb:g} GB"
    why = f"of {counted(processes, 'GPU')}; computed: {peak}, and the fastest of those that fit"
    keys = [Key("tensor_model_parallel_size", parallel.tensor_model_parallel_size, why)]
    for name, reason in (
        ("pipeline_model_parallel_size", "stages of layers"),
        ("virtual_pipeline_model_parallel_size", "chunks of a stage"),
        ("pipeline_layout", "layers by what they cost"),
        ("context_parallel_size", "ranks that share a sequence"),
        ("expert_model_parallel_size", "ranks that share the experts"),
        ("sequence_parallel", "splits norms, too, over TP"),
    ):
        if getattr(parallel, name) != getattr(before.parallel, name):
            keys.append(Key(name, getattr(parallel, name), reason))
    changed = []
    for group, name, reason in (
        ("model", "recompute", "activations are computed again, which saves memory"),
        ("optimizer", "use_distributed_optimizer", "its state is split over data-parallel ranks"),
        ("train", "global_batch_size", "completions of a step; a multiple of what the layout needs"),
        ("train", "micro_batch_size", "as the layout needs"),
    ):
        value = getattr(getattr(config, group), name)
        if value != getattr(getattr(before, group), name):
            changed.append(Key(f"{group}.{name}", value, reason))
    return _Layout(keys, changed, "")


def _fallback(material: Material, before: Config, error: str) -> _Layout:
    """TP as far as the heads allow."""
    arch, processes = material.arch, material.processes
    tp = math.gcd(processes, arch.num_query_groups)
    share = math.lcm(_NUM_GENERATIONS, processes // tp)
    completions = before.train.global_batch_size or share
    rows = -(-completions // share) * share
    keys = [
        Key("tensor_model_parallel_size", tp, "as far as the heads allow; the memory does not suffice, see above"),
        Key("sequence_parallel", tp > 1, "splits norms, too, over TP"),
    ]
    changed = [] if rows == completions else [Key("train.global_batch_size", rows, "of a step")]
    return _Layout(keys, changed, f"On {processes} x {_GPU.name}: {error}")


def _rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


def _found(material: Material) -> list[str]:
    prompts, experts, arch = material.prompts, material.experts, material.arch
    reference = f"column {prompts.reference_column!r}" if prompts.reference_column else "none"
    mark = f", marked as {prompts.mark}" if prompts.mark else ""
    lines = [
        f"model: {arch.family}, {arch.num_layers} layers, vocabulary of {arch.vocab_size}, reads "
        f"{arch.max_position_embeddings} tokens" + ("" if material.has_template else ", no chat template"),
        f"prompts: {prompts.rows} rows, {prompts.kind}; the longest of {prompts.examined} has {prompts.longest} tokens",
        f"reference: {reference}{mark}",
    ]
    if experts is None:
        return [*lines, "experts: none; GRPO alone"]
    answer = f"column {experts.answer_column!r}" if experts.answer_column else "the assistant's last message"
    return [
        *lines,
        f"experts: {experts.rows} rows of {experts.path}, {answer}; the longest has {experts.longest} tokens",
    ]


def _written(material: Material, groups: Groups, remark: str) -> str:
    """YAML."""
    head = [
        "A first recipe: look at the data, then at what a step does, then train.",
        *_found(material),
        *([remark] if remark else []),
    ]
    lines = [f"# {beginning(line, 400)}" for line in head]
    for group, keys in groups.items():
        lines += ["", f"{group}:"]
        lines += [line for key in keys for line in _lines(key)]
        if group == "data" and material.draws:
            lines.append("  # eval_dataset: heldout.jsonl # prompts that are not trained on; with train.eval_steps: 25")
    return "\n".join([*lines, ""])


def _lines(key: Key) -> list[str]:
    setting, comment = _yaml(key.name, key.value), f"# {beginning(key.why, 200)}"
    line = f"  {setting} {comment}"
    return [line] if len(line) <= _WIDTH else [f"  {comment}", f"  {setting}"]


def _yaml(name: str, value: Any) -> str:
    """One line."""
    text = write_yaml({name: value}).strip()
    return text if "\n" not in text else f"{name}: {json.dumps(value, ensure_ascii=False)}"


def free_name(parent: Path, name: str) -> str:
    """A folder that is not there yet, as text."""
    names: Sequence[str] = [name, *(f"{name}-{number}" for number in range(2, 1000))]
    return str(next(parent / each for each in names if not (parent / each).exists()))
