"""TRL's GRPOConfig as a configuration: its fields as YAML, JSON or arguments, with those of `trl grpo` beside them.

Of TRL 1.10.0.dev0 (commit f2cd577): trl/trainer/grpo_config.py, trl/trainer/base_config.py, trl/scripts/utils.py,
trl/trainer/model_config.py; the other fields are those of transformers' TrainingArguments.
"""

from __future__ import annotations

import json

from chord_megatron.importers import huggingface as hf
from chord_megatron.importers.flags import Flags, boolean, integer, number, numbers, text
from chord_megatron.importers.recipe import Recipe, drop_unread, known_trackers, one_or_all
from chord_megatron.importers.rows import Table, choice, hardware, lacks, part_of, refuse, silent, to, translate
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown

_OFF = ("false", "0", "0.0", "none", "", "no", "[]", "{}")
_SCALES = {"true": "group", "group": "group", "batch": "batch", "false": "none", "none": "none"}
_MODES = {name: name for name in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")}
_LOSSES = {name: name for name in ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo")}
_LOGGED = silent("each step is logged")
_ADAPTERS = refuse("adapters are not trained here, all weights are; remove it to import the rest", unless=_OFF)
_NO_ADAPTERS = silent("there are no adapters")
_QUANTISED = refuse("weights are trained in bfloat16 or float32 here; remove it", unless=_OFF)
_REFERENCE = silent("the reference is the model that the run began with")
_ENTROPY = silent("the entropy's coefficient stays as it is")
_HUB = lacks("nothing is uploaded; runs hold hf/step_N, which you can upload", unless=_OFF)
_WRITTEN = silent("completions are written into the run's directory")
_BATCHING = silent("completions are decoded in batches of rollout.max_batch_size")
_MEMORY = silent("rows are in memory")
_PRECISION = silent("model.dtype says it")
_SPLIT = hardware("weights are split by the keys of `parallel`; `chord-megatron plan` proposes a layout", unless=_OFF)
_NOT_COLOCATED = "vLLM is not colocated"

TABLE: Table = {
    # GRPOConfig: model, data, sampling
    "learning_rate": to("optimizer.lr", number, 1e-6),
    "model_init_kwargs": lacks("model.path and model.dtype say what there is to say", unless=_OFF),
    "trust_remote_code": to("model.trust_remote_code", boolean, False),
    "router_aux_loss_coef": silent("models with experts are trained without a loss for their balance"),
    "disable_dropout": silent("there is no dropout"),
    "cast_lm_head_to_fp32": silent("log-probs are computed in float32"),
    "remove_unused_columns": silent("reward functions see every column"),
    "num_generations": to("rollout.num_generations", integer, 8),
    "num_generations_eval": part_of("train.eval_num_generations"),
    "max_completion_length": to("rollout.max_completion_length", integer, 512),
    "max_prompt_length": to("data.max_prompt_length", integer),
    "ds3_gather_for_generation": silent("weights are gathered bucket by bucket"),
    "shuffle_dataset": lacks("rows are shuffled anew in each epoch, by train.seed", unless=("true",)),
    "pad_to_multiple_of": silent("rows are packed, without padding"),
    "generation_batch_size": part_of("grpo.steps_per_generation"),
    "steps_per_generation": part_of("grpo.steps_per_generation"),
    "temperature": to("rollout.temperature", number, 1.0),
    "top_p": to("rollout.top_p", number, 1.0),
    "top_k": to("rollout.top_k", lambda words: max(0, integer(words)), 0),
    "min_p": lacks("there is no min-p; top_p and top_k there are", unless=_OFF),
    "generation_kwargs": lacks("the keys of `rollout` say how completions are sampled", unless=_OFF),
    "chat_template_kwargs": to("data.chat_template_kwargs", lambda words: json.loads(text(words))),
    "repetition_penalty": lacks("samples are the policy's own, without penalties", unless=("1.0", "1", *_OFF)),
    "cache_implementation": silent("there is one KV cache"),
    # vLLM
    "use_vllm": part_of("rollout.engine"),
    "vllm_mode": part_of("rollout.vllm_mode"),
    "vllm_model_impl": hardware("vLLM's own model is used", unless=("vllm", "auto")),
    "vllm_enable_sleep_mode": to(
        "rollout.sleep_level", lambda words: int(boolean(words)), 0, when=hf.is_colocated, otherwise=_NOT_COLOCATED
    ),
    "vllm_structured_outputs_regex": lacks("completions have no grammar", unless=_OFF),
    "vllm_guided_decoding_regex": lacks("completions have no grammar", unless=_OFF),
    "vllm_server_base_url": part_of("rollout.vllm_servers"),
    "vllm_server_host": part_of("rollout.vllm_servers"),
    "vllm_server_port": part_of("rollout.vllm_servers"),
    "vllm_server_timeout": to(
        "rollout.vllm_server_timeout", number, 240.0, when=hf.is_served, otherwise="there is no server"
    ),
    "vllm_group_port": silent("rollout.weight_transfer says how weights travel"),
    "vllm_gpu_memory_utilization": to(
        "rollout.vllm_gpu_memory_utilization", number, 0.3, when=hf.is_colocated, otherwise=_NOT_COLOCATED
    ),
    "vllm_max_model_length": silent("data.max_prompt_length + rollout.max_completion_length"),
    "vllm_tensor_parallel_size": to(
        "rollout.vllm_tensor_parallel_size", integer, 1, when=hf.is_colocated, otherwise=_NOT_COLOCATED
    ),
    # the objective
    "beta": to("grpo.beta", number, 0.0),
    "num_iterations": to("grpo.num_iterations", integer, 1),
    "epsilon": to("grpo.epsilon", number, 0.2),
    "delta": to("grpo.delta", number),
    "epsilon_high": to("grpo.epsilon_high", number),
    "sapo_temperature_neg": to("grpo.tau_neg", number, 1.05),
    "sapo_temperature_pos": to("grpo.tau_pos", number, 1.0),
    "vespo_k_pos": to("grpo.vespo_k_pos", number, 2.0),
    "vespo_lambda_pos": to("grpo.vespo_lambda_pos", number, 3.0),
    "vespo_k_neg": to("grpo.vespo_k_neg", number, 3.0),
    "vespo_lambda_neg": to("grpo.vespo_lambda_neg", number, 2.0),
    "importance_sampling_level": to(
        "grpo.importance_sampling_level", choice({name: name for name in ("token", "sequence", "sequence_token")})
    ),
    "reward_weights": part_of("rewards.reward_weights"),
    "multi_objective_aggregation": part_of("grpo.scale_rewards"),
    "scale_rewards": to("grpo.scale_rewards", choice(_SCALES)),
    "loss_type": to("grpo.loss_type", choice(_LOSSES), "dapo"),
    "mask_truncated_completions": to("grpo.overlong_filter", boolean, False),
    "sync_ref_model": lacks("the reference is the model that the run began with", unless=_OFF),
    "ref_model_mixup_alpha": _REFERENCE,
    "ref_model_sync_steps": _REFERENCE,
    "top_entropy_quantile": to("grpo.top_entropy_quantile", number, 1.0),
    "entropy_coef": to("grpo.entropy_coef", number, 0.0),
    "use_adaptive_entropy": lacks("the entropy's coefficient stays as it is: grpo.entropy_coef", unless=_OFF),
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
    "max_tool_calling_iterations": lacks("rollouts have one turn here", unless=_OFF),
    "vllm_importance_sampling_correction": part_of("grpo.rollout_importance_sampling_mode"),
    "vllm_importance_sampling_mode": part_of("grpo.rollout_importance_sampling_mode"),
    "vllm_importance_sampling_clip_max": part_of("grpo.rollout_importance_sampling_threshold"),
    "vllm_importance_sampling_cap": part_of("grpo.rollout_importance_sampling_threshold"),
    "vllm_importance_sampling_clip_min": lacks("weights have an upper bound alone", unless=_OFF),
    "off_policy_mask_threshold": to("grpo.off_policy_sequence_mask_delta", number),
    "use_bias_correction_kl": lacks("the KL penalty has no weights, or those of chord.semantics", unless=_OFF),
    # what is written
    "log_completions": to("tracking.log_completions", hf.logged_completions),
    "log_multimodal": _WRITTEN,
    "num_completions_to_print": _WRITTEN,
    "log_unique_prompts": _WRITTEN,
    "log_completions_hub_repo": _HUB,
    "use_transformers_continuous_batching": _BATCHING,
    "transformers_continuous_batching_config": _BATCHING,
    "use_transformers_paged": _BATCHING,
    # TrainingArguments
    "output_dir": part_of("train.output_dir"),
    "per_device_train_batch_size": part_of("train.micro_batch_size", "train.global_batch_size"),
    "per_device_eval_batch_size": hardware("rollout.max_batch_size bounds what is decoded at once"),
    "gradient_accumulation_steps": part_of("train.global_batch_size", "grpo.steps_per_generation"),
    "num_train_epochs": part_of("train.num_train_epochs"),
    "max_steps": part_of("train.train_iters"),
    "lr_scheduler_type": part_of("optimizer.lr_decay_style"),
    "lr_scheduler_kwargs": part_of("optimizer.min_lr"),
    "warmup_ratio": part_of("optimizer.lr_warmup_ratio"),
    "warmup_steps": part_of("optimizer.lr_warmup_iters"),
    "weight_decay": to("optimizer.weight_decay", number, 0.0),
    "adam_beta1": to("optimizer.adam_beta1", number, 0.9),
    "adam_beta2": to("optimizer.adam_beta2", number, 0.999),
    "adam_epsilon": to("optimizer.adam_eps", number, 1e-8),
    "max_grad_norm": to("optimizer.clip_grad", number, 1.0),
    "optim": lacks("the optimizer is AdamW", unless=("adamw_torch", "adamw_torch_fused", "adamw_apex_fused")),
    "optim_args": lacks("the optimizer is AdamW, with the keys of `optimizer`", unless=_OFF),
    "seed": to("train.seed", integer, 42),
    "data_seed": silent("the order of rows follows train.seed"),
    "bf16": part_of("model.dtype"),
    "fp16": _PRECISION,
    "tf32": _PRECISION,
    "gradient_checkpointing": to("model.recompute", boolean, True),
    "gradient_checkpointing_kwargs": hardware("model.recompute_method and model.recompute_num_layers say how"),
    "logging_steps": _LOGGED,
    "logging_strategy": _LOGGED,
    "logging_first_step": _LOGGED,
    "logging_dir": silent("TensorBoard's files lie in the run's directory"),
    "save_strategy": part_of("train.save_steps"),
    "save_steps": part_of("train.save_steps"),
    "save_total_limit": to("train.save_total_limit", integer),
    "save_only_model": silent("checkpoints are Megatron's, and Hugging Face's beside them"),
    "save_safetensors": silent("weights are written as safetensors"),
    "eval_strategy": part_of("train.eval_steps"),
    "do_eval": silent("train.eval_steps says it"),
    "eval_steps": part_of("train.eval_steps"),
    "eval_on_start": silent("held-out prompts are answered before the first step"),
    "metric_for_best_model": lacks("train.keep_best goes by eval_reward_mean", unless=_OFF),
    "load_best_model_at_end": lacks("the last weights are the run's; train.keep_best keeps the best, too", unless=_OFF),
    "resume_from_checkpoint": lacks("the same command again resumes a run of this package; of weights name model.path"),
    "report_to": part_of("tracking.report_to"),
    "run_name": to("tracking.run_name", text),
    "dataloader_num_workers": _MEMORY,
    "dataloader_pin_memory": _MEMORY,
    "dataloader_prefetch_factor": _MEMORY,
    "dataloader_persistent_workers": _MEMORY,
    "deepspeed": _SPLIT,
    "fsdp": _SPLIT,
    "fsdp_config": _SPLIT,
    "ddp_timeout": silent("parallel.distributed_timeout_minutes says how long a rank waits"),
    "torch_compile": hardware("kernels are chosen by Megatron-Core", unless=_OFF),
    "torch_empty_cache_steps": silent("there is no such step"),
    "use_liger_kernel": silent("log-probs are computed without the logits of a batch anyway"),
    "auto_find_batch_size": lacks("say train.micro_batch_size", unless=_OFF),
    "neftune_noise_alpha": lacks("nothing is added to embeddings", unless=_OFF),
    "push_to_hub": _HUB,
    "hub_model_id": _HUB,
    "hub_private_repo": _HUB,
    "hub_strategy": _HUB,
    # `trl grpo`: script and model
    "dataset_name": part_of("data.dataset"),
    "dataset_config": part_of("data.dataset"),
    "dataset_train_split": to("data.dataset_split", text, "train"),
    "dataset_test_split": to("data.eval_dataset_split", text, "test"),
    "dataset_streaming": silent("data is read at the start of a run"),
    "ignore_bias_buffers": silent("there are none"),
    "datasets": part_of("data.dataset"),
    "reward_funcs": part_of("rewards.reward_funcs"),
    "reward_model_name_or_path": lacks("a reward model is a function of yours here, path.py:function", unless=_OFF),
    "model_name_or_path": to("model.path", text),
    "model_revision": lacks("download that revision, and name its directory: model.path", unless=("main",)),
    "dtype": to("model.dtype", hf.dtype),
    "torch_dtype": to("model.dtype", hf.dtype),
    "attn_implementation": hardware("kernels are chosen by Megatron-Core; see model.transformer_config", unless=_OFF),
    "use_peft": _ADAPTERS,
    **{f"lora_{name}": _NO_ADAPTERS for name in ("r", "alpha", "dropout", "target_modules", "modules_to_save")},
    **{f"lora_{name}": _NO_ADAPTERS for name in ("target_parameters", "task_type")},
    "use_rslora": _NO_ADAPTERS,
    "use_dora": _NO_ADAPTERS,
    "load_in_8bit": _QUANTISED,
    "load_in_4bit": _QUANTISED,
    "bnb_4bit_quant_type": silent("nothing is quantised"),
    "bnb_4bit_compute_dtype": silent("nothing is quantised"),
    "bnb_4bit_quant_storage": silent("nothing is quantised"),
    "use_bnb_nested_quant": silent("nothing is quantised"),
}

_REWARDS = {
    "accuracy_reward": "accuracy",
    "reasoning_accuracy_reward": "accuracy",
    "get_soft_overlong_punishment": "soft_overlong",
}


def from_trl(flags: Flags, recipe: Recipe) -> None:
    """Fill the recipe. Raises UserError."""
    translate(TABLE, flags, recipe)
    if recipe.nproc_per_node is None:
        recipe.remark("unresolved", "processes", "taken as 1; say how many with --nproc-per-node")
    hf.completions_of_a_step(
        flags,
        recipe,
        per_device=max(1, flags.integer("per_device_train_batch_size", 8)),
        accumulation=max(1, flags.integer("gradient_accumulation_steps", 1)),
        ranks=recipe.world_size,
    )
    hf.length_of_run(flags, recipe)
    hf.schedule_of_learning_rate(flags, recipe, default="linear")
    _data(flags, recipe)
    _rewards(flags, recipe)
    hf.saving_and_evaluation(flags, recipe, evaluates="data.eval_dataset" in recipe.values)
    hf.engine(flags, recipe)
    _correction(flags, recipe)
    _rest(flags, recipe)
    for key in ("chord_mu_peak", "chord_mu_valley"):
        recipe.set(f"chord.{key}", 0.0, "GRPO alone; with experts see docs/coming-from.md")
    drop_unread(recipe)


def _mixture(flags: Flags, recipe: Recipe) -> list[str]:
    """The data sets of `datasets` in a YAML file: a mapping of path, name and more for each."""
    names, elsewhere = [], {"split": "data.dataset_split holds for all", "columns": "name data.prompt_column"}
    for word in flags.get("datasets", []):
        try:
            entry = dict(json.loads(word))
            path = str(entry.pop("path"))
        except (ValueError, TypeError, KeyError):
            recipe.remark("left out", "datasets", f"{shown(word)} is no mapping with a path")
            continue
        subset = entry.pop("name", None)
        names.append(f"{path}:{subset}" if subset else path)
        for key in (key for key, value in entry.items() if value):
            hint = elsewhere.get(key, "name the files in data.dataset")
            recipe.remark("left out", "datasets", f"of {path}, {key} is not taken over; {hint}")
    return names


def _data(flags: Flags, recipe: Recipe) -> None:
    names = _mixture(flags, recipe)
    if name := flags.text("dataset_name", ""):
        subset = flags.text("dataset_config", "")
        names = [f"{name}:{subset}" if subset else name]
    if names:
        recipe.set("data.dataset", one_or_all(names), flags.said("dataset_name") if name else "datasets")
    else:
        recipe.leave_open("data.dataset", "PROMPTS.jsonl", "--dataset_name", "your prompts")
    if flags.text("eval_strategy", "no").lower() != "no" and names:
        recipe.set_held_out(names, flags.said("eval_strategy"))
    recipe.set("data.reference_column", "solution", "the column that TRL's rewards compare with")
    if "max_prompt_length" not in flags:
        text = "prompts of more than 1024 tokens (data.max_prompt_length) are left out here, none there"
        recipe.remark("approximated", "max_prompt_length", text)


def _rewards(flags: Flags, recipe: Recipe) -> None:
    names = flags.get("reward_funcs", [])
    kept = [_REWARDS[name] for name in names if name in _REWARDS]
    for name in names:
        if name not in _REWARDS:
            module, _, function = name.rpartition(".")
            written = f"{module.replace('.', '/')}.py:{function}" if module else f"path.py:{name}"
            text = f"{name} is no reward here; name it as {written} in rewards.reward_funcs"
            recipe.remark("left out", "--reward_funcs", text)
    if not kept:
        recipe.remark("approximated", "--reward_funcs", "accuracy stands there until you name your own function")
    recipe.set("rewards.reward_funcs", kept or ["accuracy"], flags.said("reward_funcs") if names else "not said")
    if "soft_overlong" in kept:  # trl/scripts/grpo.py has these two
        for key, length in (("soft_max_length", 1280), ("soft_cache_length", 256)):
            recipe.set(f"rewards.{key}", length, "get_soft_overlong_punishment of `trl grpo`")
    weights = flags.read("reward_weights", numbers) if "reward_weights" in flags else []
    if weights and kept:
        of = dict(zip(names, weights, strict=False))
        kept_weights = [of.get(name, 1.0) for name in names if name in _REWARDS]
        recipe.set("rewards.reward_weights", kept_weights, flags.said("reward_weights"))


def _correction(flags: Flags, recipe: Recipe) -> None:
    """TRL weighs vLLM's samples unless it is told not to."""
    if not hf.uses_vllm(flags) or not flags.boolean("vllm_importance_sampling_correction", True):
        return
    said = flags.said("vllm_importance_sampling_mode") if "vllm_importance_sampling_mode" in flags else "default there"
    mode = choice(_MODES)(flags.get("vllm_importance_sampling_mode", ["sequence_mask"]))
    recipe.set("grpo.rollout_importance_sampling_mode", mode, said)
    cap = "vllm_importance_sampling_clip_max" if "vllm_importance_sampling_clip_max" in flags else "_cap"
    cap = f"vllm_importance_sampling{cap}" if cap == "_cap" else cap
    recipe.set("grpo.rollout_importance_sampling_threshold", flags.number(cap, 3.0), f"{flags.dash}{cap}")
    if mode.startswith("sequence"):
        text = "a sequence's ratio is the geometric mean of its tokens' here and their product there; 3.0 rarely binds"
        recipe.remark("approximated", said, text)


def _rest(flags: Flags, recipe: Recipe) -> None:
    if "model.path" not in recipe.values:
        recipe.leave_open("model.path", "MODEL", "--model_name_or_path", "the model's directory")
    if "bf16" in flags and not flags.boolean("bf16") and not flags.boolean("fp16"):
        recipe.set("model.dtype", "float32", flags.said("bf16"))
    if flags.text("multi_objective_aggregation", "") == "normalize_then_sum":
        recipe.set("grpo.scale_rewards", "gdpo", flags.said("multi_objective_aggregation"))
    said = flags.said("output_dir") if "output_dir" in flags else "trainer_output, the default there"
    recipe.set("train.output_dir", flags.text("output_dir", "trainer_output"), said)
    if "report_to" in flags:
        said = flags.said("report_to")
        recipe.set("tracking.report_to", hf.trackers(flags["report_to"], recipe, said, known_trackers()), said)
    hf.samples_of_evaluation(flags, recipe, recipe.values.get("rollout.temperature", 1.0))


def refuse_python(name: str) -> None:
    """GRPOConfig in a Python file is not read. Raises UserError."""
    raise UserError(
        f"{name} is Python, which is not run; give GRPOConfig's fields as arguments (--learning_rate 1e-6 ...), or as "
        "YAML or JSON, which json.dump(config.to_dict(), file) writes"
    )
