"""verl's `python -m verl.trainer.main_ppo key=value ...` with GRPO as a configuration.

verl counts steps in draws: one step draws data.train_batch_size prompts and makes train_batch_size /
actor.ppo_mini_batch_size x ppo_epochs optimizer steps of them, which are what is counted here. Both sizes are prompts
(verl/workers/fsdp_workers.py multiplies them by rollout.n).
"""

from __future__ import annotations

import json
import math
from typing import Any

from chord_megatron.importers import huggingface as hf
from chord_megatron.importers.flags import Flags, boolean, number, numbers
from chord_megatron.importers.recipe import Recipe, drop_unread, known_trackers, one_or_all
from chord_megatron.importers.rows import choice, translate
from chord_megatron.importers.verl_keys import KL_ESTIMATES, LEVELS, OFF, TABLE
from chord_megatron.system.errors import UserError

_MODEL, _ACTOR, _ROLLOUT = (f"actor_rollout_ref.{group}" for group in ("model", "actor", "rollout"))
_OVERRIDE = f"{_ACTOR}.megatron.override_transformer_config"
_LOSS_OF_MEAN = {"token-mean": "dapo", "seq-mean-token-mean": "grpo", "seq-mean-token-sum-norm": "dr_grpo"}
_LOSS_OF_MODE = {"gpg": "gpg", "geo_mean": "gmpo", "cispo": "cispo", "sapo": "sapo"}
_LONGEST_WAIT = 1e5  # minutes


def from_verl(keys: Flags, recipe: Recipe) -> None:
    """Fill the recipe. Raises UserError."""
    if keys.text("algorithm.adv_estimator", "gae") == "gae":
        raise UserError("algorithm.adv_estimator=gae (verl's default) trains a critic, of which there is none here")
    recipe.nproc_per_node = recipe.nproc_per_node or keys.integer("trainer.n_gpus_per_node", 8)
    recipe.nnodes = max(recipe.nnodes, keys.integer("trainer.nnodes", 1))
    translate(TABLE, keys, recipe)
    _layout(keys, recipe)
    in_a_draw = _batches(keys, recipe)
    _length_of_run(keys, recipe, in_a_draw)
    _learning_rate(keys, recipe)
    _data(keys, recipe)
    _losses(keys, recipe)
    _penalty(keys, recipe)
    _sampler(keys, recipe)
    _rewards(keys, recipe)
    _outputs(keys, recipe)
    for key in ("chord_mu_peak", "chord_mu_valley"):
        recipe.set(f"chord.{key}", 0.0, "GRPO alone; with experts see docs/coming-from.md")
    drop_unread(recipe)


def _layout(keys: Flags, recipe: Recipe) -> None:
    if "model.path" not in recipe.values:
        recipe.leave_open("model.path", "MODEL", f"{_MODEL}.path", "the model's directory")
    recipe.set("optimizer.use_distributed_optimizer", True, "FSDP or Megatron's distributed optimizer there")
    if recipe.values.get("parallel.tensor_model_parallel_size", 1) > 1:
        recipe.values.setdefault("parallel.sequence_parallel", True)
        recipe.origins.setdefault("parallel.sequence_parallel", "the default of actor.megatron there")
    else:
        recipe.values.pop("parallel.sequence_parallel", None)
    if f"{_ACTOR}.megatron.tensor_model_parallel_size" not in keys:
        recipe.remark("hardware", "", "weights are whole on each GPU; `chord-megatron plan` proposes how to split them")
    granularity = keys.text(f"{_OVERRIDE}.recompute_granularity", "none")
    if granularity == "full":
        recipe.set("model.recompute", True, keys.said(f"{_OVERRIDE}.recompute_granularity"))
        for name in ("recompute_method", "recompute_num_layers"):
            key = f"{_OVERRIDE}.{name}"
            if key in keys:
                value = keys.text(key, "") if name.endswith("method") else keys.integer(key, 1)
                recipe.set(f"model.{name}", value, keys.said(key))
    elif granularity == "selective":
        modules = keys.get(f"{_OVERRIDE}.recompute_modules", ["core_attn"])
        recipe.set("model.recompute", modules, keys.said(f"{_OVERRIDE}.recompute_granularity"))
    if "actor_rollout_ref.nccl_timeout" in keys:
        minutes = min(_LONGEST_WAIT, max(0.1, keys.number("actor_rollout_ref.nccl_timeout", 600) / 60))
        recipe.set("parallel.distributed_timeout_minutes", minutes, keys.said("actor_rollout_ref.nccl_timeout"))


def _ranks(recipe: Recipe) -> int:
    """Data-parallel ranks."""
    names = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    return max(1, recipe.world_size // math.prod(recipe.values.get(f"parallel.{name}", 1) for name in names))


def _batches(keys: Flags, recipe: Recipe) -> int:
    """The sizes of a step; returns the optimizer steps of one of verl's."""
    drawn, mini = keys.integer("data.train_batch_size", 1024), keys.integer(f"{_ACTOR}.ppo_mini_batch_size", 256)
    generations = recipe.values.get("rollout.num_generations", 8)
    steps, rest = divmod(drawn, max(1, mini))
    if rest or not steps:
        text = f"draws of {drawn} prompts are not a multiple of steps of {mini}; one has {max(1, steps)} steps here"
        recipe.remark("approximated", "data.train_batch_size", text)
    said = f"actor.ppo_mini_batch_size={mini} prompts x {generations} completions"
    recipe.set("train.global_batch_size", mini * generations, said)
    recipe.set_default("grpo.steps_per_generation", max(1, steps), f"{drawn} prompts a draw / {mini} a step")
    _micro_batches(keys, recipe, mini * generations)
    return max(1, steps) * recipe.values.get("grpo.num_iterations", 1)


def _micro_batches(keys: Flags, recipe: Recipe, size: int) -> None:
    if keys.boolean(f"{_ACTOR}.use_dynamic_bsz"):
        tokens = keys.integer(f"{_ACTOR}.ppo_max_token_len_per_gpu", 16384)
        row = sum(recipe.values.get(key, 512) for key in ("data.max_prompt_length", "rollout.max_completion_length"))
        said = f"ppo_max_token_len_per_gpu={tokens}"
        recipe.set("train.max_tokens_per_micro_batch", max(tokens, row), said)
        if tokens < row:
            recipe.remark("approximated", said, f"{row} tokens here, which the longest row may have")
        return
    name = next(
        (f"{_ACTOR}.{n}" for n in ("ppo_micro_batch_size_per_gpu", "ppo_micro_batch_size") if f"{_ACTOR}.{n}" in keys),
        "",
    )
    rows, ranks = keys.integer(name, 1) if name else 1, _ranks(recipe)
    if name.endswith("micro_batch_size"):
        rows = max(1, rows // ranks)
    fitting = math.gcd(rows, max(1, size // ranks))
    recipe.set("train.micro_batch_size", fitting, keys.said(name) if name else "not said")
    if fitting != rows:
        text = f"{fitting} here, which divides the {size // ranks} completions of a rank"
        recipe.remark("approximated", keys.said(name), text)


def _length_of_run(keys: Flags, recipe: Recipe, in_a_draw: int) -> None:
    steps = keys.integer("trainer.total_training_steps", 0)
    if steps > 0:
        said = f"{steps} draws of {in_a_draw} steps"
        recipe.set("train.train_iters", steps * in_a_draw, said)
    else:
        said = keys.said("trainer.total_epochs") if "trainer.total_epochs" in keys else "30, the default there"
        recipe.set("train.num_train_epochs", keys.number("trainer.total_epochs", 30), said)
    for name, key in (("trainer.save_freq", "train.save_steps"), ("trainer.test_freq", "train.eval_steps")):
        every = keys.integer(name, -1)
        if every > 0 and (key == "train.save_steps" or "data.val_files" in keys):
            recipe.set(key, every * in_a_draw, f"{name}={every} draws of {in_a_draw} steps")


def _learning_rate(keys: Flags, recipe: Recipe) -> None:
    optim = f"{_ACTOR}.optim"
    steps, ratio = keys.integer(f"{optim}.lr_warmup_steps", -1), keys.number(f"{optim}.lr_warmup_steps_ratio", 0.0)
    if steps > 0:
        recipe.set("optimizer.lr_warmup_iters", steps, keys.said(f"{optim}.lr_warmup_steps"))
    elif ratio > 0 and steps < 0:
        recipe.set("optimizer.lr_warmup_ratio", ratio, keys.said(f"{optim}.lr_warmup_steps_ratio"))
    for name in ("lr_decay_style", "lr_scheduler_type", "warmup_style"):
        if f"{optim}.{name}" in keys:
            style = keys.read(f"{optim}.{name}", choice({name: name for name in ("constant", "linear", "cosine")}))
            recipe.set("optimizer.lr_decay_style", style, keys.said(f"{optim}.{name}"))
    if f"{optim}.min_lr_ratio" in keys:
        lowest = keys.number(f"{optim}.min_lr_ratio", 0) * recipe.values.get("optimizer.lr", 1e-6)
        recipe.set("optimizer.min_lr", lowest, keys.said(f"{optim}.min_lr_ratio"))
    first, second = keys.read(f"{optim}.betas", numbers) if f"{optim}.betas" in keys else (0.9, 0.999)
    recipe.set_default("optimizer.adam_beta1", first, f"{optim}.betas there")
    recipe.set_default("optimizer.adam_beta2", second, f"{optim}.betas there")
    fraction = f"{optim}.override_optimizer_config.optimizer_offload_fraction"
    if fraction in keys and recipe.values.get("optimizer.optimizer_cpu_offload"):
        recipe.set("optimizer.optimizer_offload_fraction", keys.number(fraction, 1.0), keys.said(fraction))


def _data(keys: Flags, recipe: Recipe) -> None:
    if names := keys.get("data.train_files"):
        recipe.set("data.dataset", one_or_all(names), keys.said("data.train_files"))
    else:
        recipe.leave_open("data.dataset", "PROMPTS.jsonl", "data.train_files", "your prompts")
    if names := keys.get("data.val_files"):
        recipe.set_held_out(names, keys.said("data.val_files"))
    limit, source = keys.integer("data.train_max_samples", -1), recipe.values["data.dataset"]
    if limit > 0 and isinstance(source, str):
        recipe.set("data.dataset", f"{source}#{limit}", keys.said("data.train_max_samples"))
    elif limit > 0:
        text = "it is of all files together there; data.max_rows is of each"
        recipe.remark("left out", keys.said("data.train_max_samples"), text)
    recipe.set("data.reference_column", "reward_model.ground_truth", "the column that verl's rewards compare with")
    prefix = "data.apply_chat_template_kwargs."
    if options := {key.removeprefix(prefix): keys[key] for key in keys if key.startswith(prefix)}:
        recipe.set("data.chat_template_kwargs", {k: _yaml(v) for k, v in options.items()}, f"{prefix}*")


def _yaml(words: list[str]) -> Any:
    """A value of a template: true, false, a number or text."""
    for read in (lambda: boolean(words) if words[0].lower() in ("true", "false") else number(words), lambda: words[0]):
        try:
            return read()
        except (ValueError, IndexError):
            continue
    return json.dumps(words)


def _losses(keys: Flags, recipe: Recipe) -> None:
    mode = keys.text(f"{_ACTOR}.policy_loss.loss_mode", "vanilla")
    mean = keys.text(f"{_ACTOR}.loss_agg_mode", "token-mean")
    if mode not in LEVELS:
        raise UserError(f"actor.policy_loss.loss_mode={mode} has no counterpart here; there are {', '.join(LEVELS)}")
    loss = _LOSS_OF_MODE.get(mode) or ("grpo" if mode == "gspo" else _LOSS_OF_MEAN.get(mean))
    if loss is None:
        recipe.remark("approximated", f"actor.loss_agg_mode={mean}", "the mean is over tokens here (dapo)")
    elif mode in _LOSS_OF_MODE and f"{_ACTOR}.loss_agg_mode" in keys:
        recipe.remark("approximated", keys.said(f"{_ACTOR}.loss_agg_mode"), f"the loss {loss} has its own mean here")
    recipe.set("grpo.loss_type", loss or "dapo", f"actor.loss_agg_mode={mean}, policy_loss.loss_mode={mode}")
    if LEVELS[mode] != "token":
        recipe.set("grpo.importance_sampling_level", LEVELS[mode], f"actor.policy_loss.loss_mode={mode}")
    _clip(keys, recipe, loss or "dapo")


def _clip(keys: Flags, recipe: Recipe, loss: str) -> None:
    """verl clips at 1 - low and 1 + high, and bounds the loss of negative advantages at clip_ratio_c."""
    ratio = keys.number(f"{_ACTOR}.clip_ratio", 0.2)
    low = keys.number(f"{_ACTOR}.clip_ratio_low", ratio)
    high = keys.number(f"{_ACTOR}.clip_ratio_high", ratio)
    recipe.set("grpo.epsilon", low, f"actor.clip_ratio_low={low:g}")
    if loss == "cispo":  # here the cap itself
        recipe.set("grpo.epsilon_high", 1 + high, f"actor.clip_ratio_high={high:g}, as the cap of the ratio itself")
    elif high != low:
        recipe.set("grpo.epsilon_high", high, f"actor.clip_ratio_high={high:g}")
    bound = keys.number(f"{_ACTOR}.clip_ratio_c", 3.0)
    if bound > 1 + high:
        recipe.set("grpo.delta", bound, f"actor.clip_ratio_c={bound:g}, of negative advantages")


def _penalty(keys: Flags, recipe: Recipe) -> None:
    in_loss, in_reward = keys.boolean(f"{_ACTOR}.use_kl_loss"), keys.boolean("algorithm.use_kl_in_reward")
    if in_reward:
        recipe.set("grpo.beta", keys.number("algorithm.kl_ctrl.kl_coef", 0.001), "algorithm.kl_ctrl.kl_coef")
        recipe.set("grpo.kl_in_reward", True, "algorithm.use_kl_in_reward=True")
        if in_loss:
            text = "the penalty is in the reward alone here, and there in the loss, too"
            recipe.remark("left out", keys.said(f"{_ACTOR}.use_kl_loss"), text)
    elif in_loss:
        recipe.set("grpo.beta", keys.number(f"{_ACTOR}.kl_loss_coef", 0.001), f"{_ACTOR}.kl_loss_coef")
        name = f"{_ACTOR}.kl_loss_type"
        if name in keys:
            estimate = KL_ESTIMATES.get(keys.text(name, ""))
            if estimate is None:
                recipe.remark("approximated", keys.said(name), "k3 here; there are k1, k2 and k3")
            recipe.set("grpo.kl_estimator", estimate or "k3", keys.said(name))


def _sampler(keys: Flags, recipe: Recipe) -> None:
    name = keys.text(f"{_ROLLOUT}.name", "vllm")
    said = keys.said(f"{_ROLLOUT}.name") if f"{_ROLLOUT}.name" in keys else "not said"
    recipe.set("rollout.engine", "vllm", said)
    recipe.set("rollout.vllm_mode", "colocate", "trainer and sampler share the GPUs there")
    if name != "vllm":
        recipe.remark("hardware", said, "vLLM samples here")
    size = keys.integer(f"{_ROLLOUT}.tensor_model_parallel_size", 2)
    recipe.set_default("rollout.vllm_tensor_parallel_size", size, f"rollout.tensor_model_parallel_size={size}")
    share = keys.number(f"{_ROLLOUT}.gpu_memory_utilization", 0.5)
    recipe.set("rollout.vllm_gpu_memory_utilization", share, f"rollout.gpu_memory_utilization={share:g}")
    recipe.set_default("rollout.vllm_enforce_eager", keys.boolean(f"{_ROLLOUT}.enforce_eager"), "rollout.enforce_eager")
    if keys.boolean(f"{_ROLLOUT}.free_cache_engine", True):
        recipe.set("rollout.sleep_level", 1, "rollout.free_cache_engine=True")
    mode = keys.text("algorithm.rollout_correction.rollout_is", "none")
    if mode not in OFF:
        value = {"token": "token_truncate", "sequence": "sequence_truncate"}.get(mode, "token_truncate")
        recipe.set("grpo.rollout_importance_sampling_mode", value, "algorithm.rollout_correction.rollout_is")


def _rewards(keys: Flags, recipe: Recipe) -> None:
    functions, weights = ["accuracy"], [1.0]
    if "custom_reward_function.path" in keys:
        name = keys.text("custom_reward_function.name", "compute_score")
        path = keys.text("custom_reward_function.path", "")
        text = (
            f"its arguments are others here; when {name} takes (prompts, completions, references) write "
            f"{path}:{name} into rewards.reward_funcs (docs/coming-from.md); accuracy stands there until then"
        )
        recipe.remark("left out", "custom_reward_function", text)
    else:
        text = "verl chooses a function for each data_source; accuracy compares final answers of all of them here"
        recipe.remark("approximated", "rewards", text)
    buffer = "reward_model.reward_kwargs.overlong_buffer_cfg"
    if keys.boolean(f"{buffer}.enable"):
        functions, weights = [*functions, "soft_overlong"], [1.0, keys.number(f"{buffer}.penalty_factor", 1.0)]
        recipe.set("rewards.soft_cache_length", keys.integer(f"{buffer}.len", 512), f"{buffer}.len")
        recipe.set("rewards.reward_weights", weights, f"{buffer}.penalty_factor")
        longest = "reward_model.reward_kwargs.max_resp_len"
        if longest in keys:
            recipe.set("rewards.soft_max_length", keys.integer(longest, 512), keys.said(longest))
    recipe.set("rewards.reward_funcs", functions, "verl's scores by data_source")


def _outputs(keys: Flags, recipe: Recipe) -> None:
    project = keys.text("trainer.project_name", "verl_examples")
    default = f"checkpoints/{project}/{keys.text('trainer.experiment_name', 'gsm8k')}"
    said = (
        "trainer.default_local_dir" if "trainer.default_local_dir" in keys else "trainer.project_name, experiment_name"
    )
    recipe.set("train.output_dir", keys.text("trainer.default_local_dir", default), said)
    for name, key in (("trainer.project_name", "project"), ("trainer.experiment_name", "run_name")):
        if keys.get(name):
            recipe.set(f"tracking.{key}", keys.text(name, ""), keys.said(name))
    words = keys.get("trainer.logger", ["console", "wandb"])
    said = keys.said("trainer.logger") if "trainer.logger" in keys else "the default there"
    recipe.set("tracking.report_to", hf.trackers(words, recipe, said, known_trackers()), said)
    if "data.eval_dataset" in recipe.values:
        samples = keys.boolean(f"{_ROLLOUT}.val_kwargs.do_sample")
        temperature = keys.number(f"{_ROLLOUT}.val_kwargs.temperature", 0.0) if samples else 0.0
        recipe.set_default("train.eval_temperature", temperature, "rollout.val_kwargs.temperature")
        completions = keys.integer(f"{_ROLLOUT}.val_kwargs.n", 1)
        if completions > 1 and not temperature:
            text = "each answer at temperature 0 is the same"
            recipe.without_effect.append((keys.said(f"{_ROLLOUT}.val_kwargs.n"), text))
        else:
            recipe.set_default("train.eval_num_generations", completions, f"rollout.val_kwargs.n={completions}")
