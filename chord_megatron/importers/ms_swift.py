"""ms-swift's `swift rlhf --rlhf_type grpo` as a configuration, with CHORD's keys where the script has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from chord_megatron.importers import huggingface as hf
from chord_megatron.importers.flags import Flags, number, numbers, read_file
from chord_megatron.importers.ms_swift_grpo import GRPO
from chord_megatron.importers.ms_swift_training import ADAPTERS, OFF, TRAINING
from chord_megatron.importers.recipe import Recipe, drop_unread, known_trackers, one_or_all
from chord_megatron.importers.rows import Table, translate
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import counted

TABLE: Table = {**TRAINING, **GRPO}

# Columns of data sets that ms-swift knows: prompt, answer. Rows with `messages` need neither.
_COLUMNS = {
    "AI-MO/NuminaMath-TIR": ("problem", "solution"),
    "AI-MO/NuminaMath-CoT": ("problem", "solution"),
    "AI-MO/NuminaMath-1.5": ("problem", "solution"),
}
_LONGEST_WAIT = 1e5  # minutes


def from_ms_swift(flags: Flags, recipe: Recipe) -> None:
    """Fill the recipe. Raises UserError."""
    if "tuner_type" not in flags and "train_type" not in flags:
        raise UserError("--tuner_type is not given, and ms-swift trains adapters (lora) then: " + ADAPTERS)
    translate(TABLE, flags, recipe)
    _processes(flags, recipe)
    _batches(flags, recipe)
    hf.length_of_run(flags, recipe)
    hf.schedule_of_learning_rate(flags, recipe, default="cosine")
    _data(flags, recipe)
    hf.saving_and_evaluation(flags, recipe, evaluates="data.eval_dataset" in recipe.values)
    hf.engine(flags, recipe)
    _rewards(flags, recipe)
    _advantages(flags, recipe)
    _chord(flags, recipe)
    _outputs(flags, recipe)
    _semantics(recipe)
    drop_unread(recipe)


def _processes(flags: Flags, recipe: Recipe) -> None:
    """ms-swift starts one process where NPROC_PER_NODE is not set."""
    if recipe.nproc_per_node is None:
        recipe.remark("unresolved", "NPROC_PER_NODE", "taken as 1 process; say how many with --nproc-per-node")
    for name in ("deepspeed", "fsdp"):
        if name in flags:
            recipe.set("optimizer.use_distributed_optimizer", True, flags.said(name))
            text = (
                "optimizer states are spread over all ranks; weights and gradients are split by the keys of "
                "`parallel`, for which `chord-megatron plan` proposes a layout"
            )
            recipe.remark("hardware", flags.said(name), text)
    if "ddp_timeout" in flags:
        minutes = min(_LONGEST_WAIT, max(0.1, flags.number("ddp_timeout", 0) / 60))
        recipe.set("parallel.distributed_timeout_minutes", minutes, flags.said("ddp_timeout"))


def _ranks(flags: Flags, recipe: Recipe) -> int:
    """Processes that hold different rows."""
    share = flags.integer("sequence_parallel_size", 1) * flags.integer("deepspeed_autotp_size", 1)
    return max(1, recipe.world_size // max(1, share))


def _sizes(flags: Flags, recipe: Recipe) -> tuple[int, int, int]:
    """Rows a device, accumulated micro-batches (GRPO's default is 1), and ranks."""
    per_device, accumulation = (
        max(1, flags.integer(name, 1)) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    return per_device, accumulation, _ranks(flags, recipe)


def _batches(flags: Flags, recipe: Recipe) -> None:
    per_device, accumulation, ranks = _sizes(flags, recipe)
    hf.completions_of_a_step(flags, recipe, per_device=per_device, accumulation=accumulation, ranks=ranks)
    if flags.integer("sequence_parallel_size", 1) > 1:
        text = "each sequence is cut in chunks over as many ranks; the ranks of one hold the same rows"
        recipe.remark("hardware", flags.said("sequence_parallel_size"), text)


def _data(flags: Flags, recipe: Recipe) -> None:
    if words := flags.get("dataset"):
        recipe.set("data.dataset", _weighed(_named(words), flags, recipe), flags.said("dataset"))
    else:
        recipe.leave_open("data.dataset", "PROMPTS.jsonl", "--dataset", "your prompts")
    if words := flags.get("val_dataset"):
        recipe.set_held_out(_named(words), flags.said("val_dataset"))
    if "model" not in flags:
        recipe.leave_open("model.path", "MODEL", "--model", "the model's directory")
    prompt, reference = _columns(flags, recipe, "dataset")
    if prompt:
        recipe.set("data.prompt_column", prompt, "the column that ms-swift takes for the query")
    recipe.set("data.reference_column", reference or "solution", "the column that ms-swift's rewards compare with")
    _system(flags, recipe)
    _prompt_length(flags, recipe)
    if "enable_thinking" in flags:
        value = {"enable_thinking": flags.boolean("enable_thinking")}
        recipe.set("data.chat_template_kwargs", value, flags.said("enable_thinking"))


def _named(words: list[str]) -> list[str]:
    """Data sets without the hub they are from; `name#1000` keeps its row limit."""
    return [word.removeprefix("hf::").removeprefix("ms::") for word in words]


def _weighed(names: list[str], flags: Flags, recipe: Recipe) -> Any:
    """data.dataset: without `--interleave_prob` each row comes as often as any other, there and here."""
    if flags.text("interleave_prob", OFF[0]).lower() in OFF:
        return one_or_all(names)
    said, shares = flags.said("interleave_prob"), flags.read("interleave_prob", numbers)
    if len(shares) != len(names) or min(shares) <= 0:
        recipe.remark("left out", said, "must be a share above 0 for each of the data sets; weigh them in data.dataset")
        return one_or_all(names)
    text = "the share of each is kept to the row; drawn by lot there, until --stopping_strategy ends the epoch"
    recipe.remark("approximated", said, text)
    return [{"path": name, "weight": share} for name, share in zip(names, shares, strict=True)]


def _columns(flags: Flags, recipe: Recipe, flag: str) -> tuple[str | None, str | None]:
    """The columns of prompts and answers in the data sets of a flag."""
    known = {_COLUMNS.get(re.split("[:#]", name)[0], (None, None)) for name in _named(flags.get(flag, []))}
    prompt, answer = known.pop() if len(known) == 1 else (None, None)
    if known:
        text = "their columns differ; rename those of one, or see data.prompt_column"
        recipe.remark("approximated", flags.said(flag), text)
    if "columns" in flags:
        try:
            names: dict[str, Any] = json.loads(flags.text("columns", "{}"))
            to = {str(target): str(column) for column, target in names.items()}
        except (ValueError, AttributeError):
            recipe.remark("left out", flags.said("columns"), "it is no JSON object; name data.prompt_column")
            return prompt, answer
        prompt, answer = to.get("query", to.get("messages", prompt)), to.get("solution", to.get("response", answer))
    return prompt, answer


def _system(flags: Flags, recipe: Recipe) -> None:
    """`--system` is text, in which \\n is a line break, or the name of a .txt file."""
    if not flags.get("system"):
        return
    text, said = flags.text("system", ""), flags.said("system")
    if not text.endswith(".txt"):
        recipe.set("data.system_prompt", text.replace("\\n", "\n"), said)
    elif Path(text).is_file():
        recipe.set("data.system_prompt", read_file(Path(text)), said)
    else:
        recipe.remark("unresolved", said, "there is no such file here; put its text into data.system_prompt")


def _prompt_length(flags: Flags, recipe: Recipe) -> None:
    """`--max_length` bounds prompts in GRPO; without it the model does, or what vLLM reads less a completion."""
    completion = recipe.values.get("rollout.max_completion_length", 256)
    if "max_length" in flags:
        recipe.set("data.max_prompt_length", flags.integer("max_length", 0), flags.said("max_length"))
    elif flags.integer("vllm_max_model_len", 0) > completion:
        said = f"{flags.said('vllm_max_model_len')} less --max_completion_length"
        recipe.set("data.max_prompt_length", flags.integer("vllm_max_model_len", 0) - completion, said)
    else:
        text = "prompts of more than 1024 tokens (data.max_prompt_length) are left out here; there the model's length"
        recipe.remark("approximated", "--max_length", text)
    if "max_length" in flags or "truncation_strategy" in flags:
        hf.truncated_prompts(flags, recipe, default="left")


def _rewards(flags: Flags, recipe: Recipe) -> None:
    names, known = flags.get("reward_funcs", []), ("accuracy", "format", "soft_overlong")
    kept = [name for name in names if name in known]
    plugins = flags.get("external_plugins") or flags.get("custom_register_path") or ["path.py"]
    for name in names:
        if name not in known:
            text = f"{name} is no reward here; name its class or function, {plugins[0]}:NAME (docs/coming-from.md)"
            recipe.remark("left out", "--reward_funcs", text)
    if not kept:
        recipe.remark("approximated", "--reward_funcs", "accuracy stands there until you name your own function")
    said = flags.said("reward_funcs") if "reward_funcs" in flags else "not said"
    recipe.set("rewards.reward_funcs", kept or ["accuracy"], said)
    weights = flags.read("reward_weights", numbers) if "reward_weights" in flags else []
    if weights and kept:
        of = dict(zip(names, weights, strict=False))
        recipe.set("rewards.reward_weights", [of.get(name, 1.0) for name in kept], flags.said("reward_weights"))
    if "soft_overlong" not in kept:
        return
    if "rewards.soft_cache_length" not in recipe.values:
        length = recipe.values.get("rollout.max_completion_length", 256) // 4
        recipe.set("rewards.soft_cache_length", max(1, length), "not said: a quarter of a completion")
        recipe.remark("approximated", "--soft_cache_length", "not said, as soft_overlong needs it; taken as a quarter")


def _advantages(flags: Flags, recipe: Recipe) -> None:
    estimator = flags.text("advantage_estimator", "grpo")
    if estimator not in ("grpo", "rloo", "reinforce_plus_plus"):
        recipe.remark("left out", flags.said("advantage_estimator"), "advantages are GRPO's here")
        estimator = "grpo"
    if estimator != "grpo":
        recipe.set("grpo.advantage_estimator", estimator, flags.said("advantage_estimator"))
    in_reward = flags.boolean("kl_in_reward", estimator != "grpo")
    if in_reward and recipe.values.get("grpo.scale_rewards") != "gdpo":
        said = flags.said("kl_in_reward") if "kl_in_reward" in flags else f"the default of {estimator} there"
        recipe.set("grpo.kl_in_reward", True, said)


def _chord(flags: Flags, recipe: Recipe) -> None:
    if not flags.get("chord_sft_dataset"):
        for key in [key for key in recipe.values if key.startswith("chord.")]:
            del recipe.values[key]
        for key in ("chord_mu_peak", "chord_mu_valley"):
            recipe.set(f"chord.{key}", 0.0, "GRPO alone: no --chord_sft_dataset")
        return
    sources = one_or_all(_named(flags["chord_sft_dataset"]))
    recipe.set("chord.chord_sft_dataset", sources, flags.said("chord_sft_dataset"))
    prompt, answer = _columns(flags, recipe, "chord_sft_dataset")
    if prompt:
        recipe.set("chord.chord_sft_prompt_column", prompt, "as of the prompts")
    if answer:
        recipe.set("chord.chord_sft_answer_column", answer, "the column that ms-swift takes for the response")
    rows = flags.integer("chord_sft_per_device_train_batch_size", 1)
    _, accumulation, ranks = _sizes(flags, recipe)
    said = f"{rows} a device x {accumulation} accumulated x {counted(ranks, 'process', 'processes')}"
    recipe.set("chord.chord_sft_global_batch_size", rows * accumulation * ranks, said)


def _outputs(flags: Flags, recipe: Recipe) -> None:
    model = recipe.values["model.path"].rstrip("/").split("/")[-1]
    said = flags.said("output_dir") if "output_dir" in flags else "output/MODEL, the default there"
    recipe.set("train.output_dir", flags.text("output_dir", f"output/{model}"), said)
    if "report_to" in flags:
        said = flags.said("report_to")
        recipe.set("tracking.report_to", hf.trackers(flags["report_to"], recipe, said, known_trackers()), said)
    hf.samples_of_evaluation(flags, recipe, flags.read("temperature", number) if "temperature" in flags else 0.9)


def _semantics(recipe: Recipe) -> None:
    """ms-swift's means over micro-batches, where they can be had."""
    loss, steps = recipe.values.get("grpo.loss_type"), recipe.values.get("grpo.steps_per_generation", 1)
    if loss in ("dapo", "cispo") and steps > 1:
        text = "ms-swift counts the tokens of a whole draw; here those of a step are counted (chord.semantics: paper)"
        recipe.remark("approximated", f"--loss_type {loss} with {steps} steps a draw", text)
        return
    recipe.set(
        "chord.semantics", "ms-swift", "its numbers; `paper` has means that no layout and no micro-batch changes"
    )
