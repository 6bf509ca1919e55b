"""What ms-swift and TRL share, both being transformers' Trainer: batches, steps, schedules, saving, vLLM.

Their `steps_per_generation` counts micro-batches, `gradient_accumulation_steps` of which make an optimizer step; here
optimizer steps are counted (transformers' Trainer; `__post_init__` of both trainers' GRPO arguments).
"""

from __future__ import annotations

import json
import math

from chord_megatron.importers.flags import Flags, boolean, text
from chord_megatron.importers.recipe import Recipe
from chord_megatron.system.sentences import counted

_SCHEDULES = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
    "cosine_with_min_lr": "cosine",
}


def completions_of_a_step(flags: Flags, recipe: Recipe, *, per_device: int, accumulation: int, ranks: int) -> None:
    """train.global_batch_size and micro_batch_size, and grpo.steps_per_generation.

    ranks: processes that hold different rows. Groups are whole in each optimizer step here; over there in a draw alone.
    """
    generations, in_a_pass = flags.integer("num_generations", 8), per_device * ranks
    size = per_device * ranks * accumulation
    origin = f"per device {per_device} x {accumulation} accumulated x {counted(ranks, 'process', 'processes')}"
    draws = flags.integer("steps_per_generation", accumulation)
    if "generation_batch_size" in flags:
        draws = max(1, flags.integer("generation_batch_size", 0) // in_a_pass)
    steps, rest = divmod(draws, accumulation)
    whole = math.lcm(size, generations)
    if whole != size:
        steps, rest = divmod(draws * in_a_pass, whole)
        recipe.remark(
            "approximated",
            f"{counted(size, 'completion')} a step",
            f"a step has whole groups of {generations} here, so {whole} completions; lower the learning rate's share "
            "or num_generations if that matters",
        )
    recipe.set("train.global_batch_size", whole, origin)
    recipe.set("train.micro_batch_size", per_device, f"{flags.dash}per_device_train_batch_size")
    if rest and steps:
        recipe.remark(
            "approximated",
            f"{draws} micro-batches a draw",
            f"draws end between optimizer steps of {accumulation} micro-batches there; here one has {steps} steps",
        )
    if steps > 1:
        recipe.set("grpo.steps_per_generation", steps, f"{draws} micro-batches of {in_a_pass} completions a draw")
    elif draws < accumulation:
        why = "a step is drawn in parts there and at once here, from the same weights either way"
        recipe.without_effect.append((f"{draws} of {accumulation} micro-batches a draw", why))


def length_of_run(flags: Flags, recipe: Recipe) -> None:
    """train.train_iters or num_train_epochs, and the warm-up."""
    steps, epochs = flags.integer("max_steps", -1), flags.number("num_train_epochs", 3.0)
    if steps > 0:
        recipe.set("train.train_iters", _of_whole_draws(steps, "max_steps", flags, recipe), flags.said("max_steps"))
    else:
        said = flags.said("num_train_epochs") if "num_train_epochs" in flags else "3 epochs, the default there"
        recipe.set("train.num_train_epochs", epochs, said)
    ratio, warmup = flags.number("warmup_ratio", 0.0), flags.number("warmup_steps", 0.0)
    if warmup >= 1:
        recipe.set("optimizer.lr_warmup_iters", flags.integer("warmup_steps", 0), flags.said("warmup_steps"))
    elif warmup or ratio:  # transformers 5 takes a ratio as warmup_steps
        recipe.set(
            "optimizer.lr_warmup_ratio", warmup or ratio, flags.said("warmup_steps" if warmup else "warmup_ratio")
        )


def schedule_of_learning_rate(flags: Flags, recipe: Recipe, *, default: str) -> None:
    """optimizer.lr_decay_style and min_lr."""
    name = flags.text("lr_scheduler_type", default).lower()
    said = flags.said("lr_scheduler_type") if "lr_scheduler_type" in flags else f"{default}, the default there"
    if name not in _SCHEDULES:
        recipe.remark("approximated", said, "the learning rate falls as a cosine here")
    recipe.set("optimizer.lr_decay_style", _SCHEDULES.get(name, "cosine"), said)
    if "lr_scheduler_kwargs" in flags:
        _options_of_schedule(flags, recipe)


def _options_of_schedule(flags: Flags, recipe: Recipe) -> None:
    said = flags.said("lr_scheduler_kwargs")
    try:
        options = json.loads(flags.read("lr_scheduler_kwargs", text))
        lowest = options.pop("min_lr", None)
        ratio = options.pop("min_lr_rate", None)
        if lowest is not None or ratio is not None:
            rate = recipe.values.get("optimizer.lr", 1e-6)
            recipe.set("optimizer.min_lr", float(ratio) * rate if lowest is None else float(lowest), said)
    except (ValueError, TypeError, AttributeError):
        recipe.remark("left out", said, "it is no JSON object of numbers")
        return
    if options:
        recipe.remark("left out", said, f"the schedule has no {', '.join(map(str, options))} here")


def saving_and_evaluation(flags: Flags, recipe: Recipe, *, evaluates: bool) -> None:
    """train.save_steps, eval_steps: both in optimizer steps, as there. The last step is saved in any case."""
    strategy = flags.text("save_strategy", "steps").lower()
    steps = flags.number("save_steps", 500)
    if strategy == "steps" and steps >= 1:
        said = flags.said("save_steps") if "save_steps" in flags else "500, the default there"
        recipe.set("train.save_steps", _of_whole_draws(int(steps), "save_steps", flags, recipe), said)
    elif strategy != "no":
        recipe.remark(
            "approximated",
            flags.said("save_strategy" if strategy != "steps" else "save_steps"),
            "checkpoints are saved every train.save_steps steps here; without that key only after the last step",
        )
    if evaluates and flags.text("eval_strategy", "steps").lower() != "no":
        every = flags.number("eval_steps", steps)
        key = "eval_steps" if "eval_steps" in flags else "save_steps"
        if every >= 1:
            recipe.set("train.eval_steps", int(every), flags.said(key) if key in flags else "500, the default there")


def _of_whole_draws(steps: int, name: str, flags: Flags, recipe: Recipe) -> int:
    """Runs end, and are saved, between generation batches."""
    in_a_draw = recipe.values.get("grpo.steps_per_generation", 1) * recipe.values.get("grpo.num_iterations", 1)
    whole = -(-steps // in_a_draw) * in_a_draw
    if whole != steps:
        said = flags.said(name) if name in flags else f"{name} {steps}"
        recipe.remark("approximated", said, f"{whole} here, a multiple of the {in_a_draw} steps of a draw")
    return whole


def uses_vllm(flags: Flags) -> bool:
    """Whether vLLM samples."""
    return flags.boolean("use_vllm")


def is_colocated(flags: Flags) -> bool:
    """Whether it does so in the trainer's processes."""
    return uses_vllm(flags) and flags.text("vllm_mode", "colocate").lower() == "colocate"


def is_served(flags: Flags) -> bool:
    """Whether it does so in servers."""
    return uses_vllm(flags) and not is_colocated(flags)


def engine(flags: Flags, recipe: Recipe) -> None:
    """rollout.engine, and its servers."""
    if not uses_vllm(flags):
        return
    recipe.set("rollout.engine", "vllm", flags.said("use_vllm"))
    mode = "colocate" if is_colocated(flags) else "server"
    recipe.set("rollout.vllm_mode", mode, flags.said("vllm_mode") if "vllm_mode" in flags else "the default there")
    if mode == "server":
        said, urls = _servers(flags)
        recipe.set("rollout.vllm_servers", urls, said)
        recipe.remark("hardware", said, "start each with `chord-megatron serve` in place of the other trainer's server")


def _servers(flags: Flags) -> tuple[str, list[str]]:
    if urls := flags.get("vllm_server_base_url"):
        return flags.said("vllm_server_base_url"), urls
    hosts = flags.get("vllm_server_host") or ["127.0.0.1"]
    ports = flags.get("vllm_server_port") or ["8000"]
    ports = ports if len(ports) == len(hosts) else ports[:1] * len(hosts)
    hosts = [f"[{host}]" if ":" in host else host.replace("0.0.0.0", "127.0.0.1") for host in hosts]
    said = flags.said("vllm_server_host") if "vllm_server_host" in flags else "the default there"
    return said, [f"http://{host}:{port}" for host, port in zip(hosts, ports, strict=True)]


def trackers(words: list[str], recipe: Recipe, said: str, known: tuple[str, ...]) -> list[str]:
    """tracking.report_to, as far as there are such trackers."""
    wanted = [word.lower() for word in words if word.lower() not in ("none", "console")]
    if wanted == ["all"]:
        wanted = ["tensorboard"]
    if missing := [name for name in wanted if name not in known]:
        recipe.remark("left out", said, f"{', '.join(missing)} cannot be reported to here")
    return [name for name in wanted if name in known]


def dtype(words: list[str]) -> str:
    """model.dtype; float16 is trained in bfloat16."""
    name = " ".join(words).removeprefix("torch.").lower()
    if name not in ("bfloat16", "bf16", "float16", "fp16", "half", "float32", "fp32", "auto"):
        raise ValueError("must be bfloat16 or float32")
    return "float32" if name in ("float32", "fp32") else "bfloat16"


def samples_of_evaluation(flags: Flags, recipe: Recipe, temperature: float) -> None:
    """Held-out prompts are sampled there as in training, and greedily by default here."""
    several = "num_generations_eval"
    if "data.eval_dataset" in recipe.values:
        recipe.set("train.eval_temperature", temperature, "held-out prompts are sampled as in training there")
        if several in flags:
            recipe.set("train.eval_num_generations", flags.integer(several, 1), flags.said(several))
    elif several in flags:
        recipe.without_effect.append((flags.said(several), "there are no held-out prompts"))


def truncated_prompts(flags: Flags, recipe: Recipe, default: str) -> None:
    """Prompts that are too long are left out here; a part of one asks another question."""
    if flags.text("truncation_strategy", default) not in ("delete", "raise"):
        said = flags.said("truncation_strategy") if "truncation_strategy" in flags else flags.said("max_length")
        recipe.remark("approximated", said, "prompts that are longer are left out here and cut there")


def logged_completions(words: list[str]) -> int:
    """tracking.log_completions: how many of a step are written down."""
    return 8 if boolean(words) else 0
