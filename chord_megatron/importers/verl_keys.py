"""verl's keys of `verl.trainer.main_ppo` with GRPO and its kin, one row each.

Of verl 0.8.0.dev (commit b178a3c): the keys of the scripts in examples/grpo_trainer, and what
verl/trainer/config/_generated_ppo_trainer.yaml and _generated_ppo_megatron_trainer.yaml have beside them for the
objective. `step` below is verl's: one draw of data.train_batch_size prompts.
"""

from __future__ import annotations

from chord_megatron.importers.flags import boolean, integer, number, text
from chord_megatron.importers.rows import Row, Table, choice, hardware, lacks, part_of, refuse, silent, to

OFF = ("false", "0", "0.0", "none", "null", "", "no", "[]", "{}")
LEVELS = {
    "vanilla": "token",
    "gspo": "sequence",
    "gpg": "token",
    "geo_mean": "token",
    "cispo": "token",
    "sapo": "token",
}
ESTIMATORS = {
    "grpo": "grpo",
    "rloo": "rloo",
    "rloo_vectorized": "rloo",
    "reinforce_plus_plus_baseline": "reinforce_plus_plus",
    "opo": "opo",
    "grpo_passk": "pass_at_k",
    "grpo_vectorized": "grpo",
    "gpg": "grpo",
}
KL_ESTIMATES = {"low_var_kl": "k3", "k3": "k3", "kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2"}
_MODEL, _ACTOR, _ROLLOUT, _REF = (f"actor_rollout_ref.{group}" for group in ("model", "actor", "rollout", "ref"))
_MEGATRON, _FSDP, _OPTIM = f"{_ACTOR}.megatron", f"{_ACTOR}.fsdp_config", f"{_ACTOR}.optim"
_OVERRIDE = f"{_MEGATRON}.override_transformer_config"
_REFERENCE = silent("the reference is computed with the policy's layout")
_PROFILER = silent("it is for verl's profilers")
_KERNEL = hardware("kernels are chosen by Megatron-Core; see model.transformer_config", unless=OFF)
_VLLM = hardware("vLLM's own default is used", unless=OFF)
_SCORING = hardware("log-probs are computed in the micro-batches of training")
_OFFLOAD = hardware("rollout.offload_optimizer and rollout.offload_model move them while vLLM generates", unless=OFF)
_IMAGES = lacks("models here read text", unless=OFF)
_ADAPTERS = refuse("adapters are not trained here, all weights are; remove it to import the rest", unless=OFF)
_NO_ADAPTERS = silent("there are no adapters")
_REWARD_MODEL = lacks("a reward model is a function of yours here, path.py:function", unless=OFF)
_LOGGED = silent("runs write metrics, completions and a report into train.output_dir")
_PRECISION = silent("model.dtype says it")
_CLASSES = lacks("rows are read from files and names of data sets", unless=OFF)
_BRIDGE = silent("weights are read from Hugging Face directories, or converted ones")


def _overrides() -> dict[str, Row]:
    """Fields of TransformerConfig that are passed through, and those that follow from other keys here."""
    passed: tuple[str, ...] = (
        "moe_token_dispatcher_type",
        "moe_permute_fusion",
        "moe_enable_deepep",
        "apply_rope_fusion",
    )
    passed += ("masked_softmax_fusion", "bias_dropout_fusion", "bias_activation_fusion", "moe_shared_expert_overlap")
    own: tuple[str, ...] = (
        "moe_router_dtype",
        "gradient_accumulation_fusion",
        "persist_layer_norm",
        "moe_grouped_gemm",
    )
    own += ("deallocate_pipeline_outputs", "account_for_loss_in_pipeline_split", "attention_backend")
    own += ("account_for_embedding_in_pipeline_split", "moe_aux_loss_coeff", "moe_z_loss_coeff")
    rows = {f"{_OVERRIDE}.{name}": hardware(f"set model.transformer_config.{name} where it helps") for name in passed}
    rows |= {f"{_OVERRIDE}.{name}": silent("the backend sets it, or it is not the user's here") for name in own}
    for name in ("first", "last"):
        key = f"num_layers_in_{name}_pipeline_stage"
        rows[f"{_OVERRIDE}.{key}"] = to(f"parallel.{key}", integer)
    return rows


def _sizes() -> dict[str, Row]:
    """Parallel sizes of the actor, and the rest of its Megatron group."""
    names: tuple[str, ...] = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size")
    names += ("expert_model_parallel_size", "virtual_pipeline_model_parallel_size")
    rows = {f"{_MEGATRON}.{name}": to(f"parallel.{name}", integer) for name in names}
    for name in (*names, "expert_tensor_parallel_size", "param_offload", "use_dist_checkpointing"):
        rows[f"{_REF}.megatron.{name}"] = _REFERENCE
    for name in ("use_mbridge", "vanilla_mbridge", "use_dist_checkpointing", "dist_checkpointing_path"):
        rows[f"{_MEGATRON}.{name}"] = _BRIDGE
    for name in ("param_offload", "grad_offload", "optimizer_offload"):
        rows[f"{_MEGATRON}.{name}"] = _OFFLOAD
    return rows


TABLE: Table = {
    "algorithm.adv_estimator": to("grpo.advantage_estimator", choice(ESTIMATORS)),
    "algorithm.use_kl_in_reward": part_of("grpo.kl_in_reward", "grpo.beta"),
    "algorithm.kl_ctrl.kl_coef": part_of("grpo.beta"),
    "algorithm.kl_ctrl.type": lacks("the KL penalty has a fixed coefficient", unless=("fixed",)),
    "algorithm.norm_adv_by_std_in_grpo": to("grpo.scale_rewards", lambda words: "group" if boolean(words) else "none"),
    "algorithm.gamma": silent("a completion has one reward, at its end"),
    "algorithm.lam": silent("it is for critics"),
    "algorithm.rollout_correction.rollout_is": part_of("grpo.rollout_importance_sampling_mode"),
    "algorithm.rollout_correction.rollout_is_threshold": to("grpo.rollout_importance_sampling_threshold", number),
    "algorithm.filter_groups.enable": lacks("groups whose rewards are all alike are not drawn anew", unless=OFF),
    # data
    "data.train_files": part_of("data.dataset"),
    "data.val_files": part_of("data.eval_dataset"),
    "data.train_batch_size": part_of("grpo.steps_per_generation"),
    "data.gen_batch_size": silent("a draw has data.train_batch_size prompts"),
    "data.val_batch_size": hardware("rollout.max_batch_size bounds what is decoded at once"),
    "data.max_prompt_length": to("data.max_prompt_length", integer, 512),
    "data.max_response_length": to("rollout.max_completion_length", integer, 512),
    "data.filter_overlong_prompts": silent("prompts that are too long are left out, and counted"),
    "data.filter_overlong_prompts_workers": silent("rows are read as the run has processes"),
    "data.truncation": lacks("prompts that are too long are left out", unless=("error",)),
    "data.prompt_key": to("data.prompt_column", text),
    "data.reward_fn_key": silent("one set of reward functions judges every row"),
    "data.shuffle": lacks("rows are shuffled anew in each epoch, by train.seed", unless=("true",)),
    "data.seed": to("train.seed", integer),
    "data.return_raw_chat": silent("rewards see the rendered prompt"),
    "data.image_key": silent("models here read text"),
    "data.trust_remote_code": to("model.trust_remote_code", boolean),
    "data.custom_cls.path": _CLASSES,
    "data.custom_cls.name": _CLASSES,
    "data.train_max_samples": part_of("data.dataset"),
    "data.val_max_samples": to("data.num_eval_prompts", integer),
    "data.apply_chat_template_kwargs.reasoning_effort": part_of("data.chat_template_kwargs"),
    "data.apply_chat_template_kwargs.enable_thinking": part_of("data.chat_template_kwargs"),
    # the model and its optimizer
    f"{_MODEL}.path": to("model.path", text),
    f"{_MODEL}.use_remove_padding": silent("rows are packed, without padding"),
    f"{_MODEL}.enable_gradient_checkpointing": to("model.recompute", boolean),
    f"{_MODEL}.trust_remote_code": to("model.trust_remote_code", boolean),
    f"{_MODEL}.use_fused_kernels": silent("log-probs are computed without the logits of a batch anyway"),
    f"{_MODEL}.use_shm": silent("a model's files are read where they are"),
    f"{_MODEL}.override_config.model_config.max_position_embeddings": lacks("write it into the model's config.json"),
    **{f"{_MODEL}.{name}": _ADAPTERS for name in ("lora_rank", "lora.rank", "lora_adapter_path")},
    **{f"{_MODEL}.{name}": _NO_ADAPTERS for name in ("lora_alpha", "lora.alpha", "lora.lora_A_init_method")},
    **{f"{_MODEL}.{name}": _NO_ADAPTERS for name in ("target_modules", "exclude_modules")},
    f"{_OPTIM}.lr": to("optimizer.lr", number, 1e-6),
    f"{_OPTIM}.weight_decay": to("optimizer.weight_decay", number, 0.01),
    f"{_OPTIM}.clip_grad": to("optimizer.clip_grad", number, 1.0),
    f"{_ACTOR}.grad_clip": to("optimizer.clip_grad", number),
    f"{_OPTIM}.betas": part_of("optimizer.adam_beta1", "optimizer.adam_beta2"),
    f"{_OPTIM}.lr_warmup_steps": part_of("optimizer.lr_warmup_iters"),
    f"{_OPTIM}.lr_warmup_steps_ratio": part_of("optimizer.lr_warmup_ratio"),
    f"{_OPTIM}.lr_decay_style": part_of("optimizer.lr_decay_style"),
    f"{_OPTIM}.lr_scheduler_type": part_of("optimizer.lr_decay_style"),
    f"{_OPTIM}.warmup_style": part_of("optimizer.lr_decay_style"),
    f"{_OPTIM}.min_lr": to("optimizer.min_lr", number),
    f"{_OPTIM}.min_lr_ratio": part_of("optimizer.min_lr"),
    f"{_OPTIM}.override_optimizer_config.use_precision_aware_optimizer": hardware(
        "optimizer.use_precision_aware_optimizer"
    ),
    f"{_OPTIM}.override_optimizer_config.optimizer_cpu_offload": to("optimizer.optimizer_cpu_offload", boolean),
    f"{_OPTIM}.override_optimizer_config.optimizer_offload_fraction": part_of("optimizer.optimizer_offload_fraction"),
    f"{_OPTIM}.override_optimizer_config.overlap_cpu_optimizer_d2h_h2d": silent("Megatron-Core decides it"),
    # the update
    f"{_ACTOR}.ppo_mini_batch_size": part_of("train.global_batch_size"),
    f"{_ACTOR}.ppo_micro_batch_size": part_of("train.micro_batch_size"),
    f"{_ACTOR}.ppo_micro_batch_size_per_gpu": part_of("train.micro_batch_size"),
    f"{_ACTOR}.use_dynamic_bsz": part_of("train.max_tokens_per_micro_batch"),
    f"{_ACTOR}.ppo_max_token_len_per_gpu": part_of("train.max_tokens_per_micro_batch"),
    f"{_ACTOR}.ppo_epochs": to("grpo.num_iterations", integer, 1),
    f"{_ACTOR}.shuffle": silent("the rows of a draw are packed as they come"),
    f"{_ACTOR}.use_kl_loss": part_of("grpo.beta"),
    f"{_ACTOR}.kl_loss_coef": part_of("grpo.beta"),
    f"{_ACTOR}.kl_loss_type": part_of("grpo.kl_estimator"),
    f"{_ACTOR}.entropy_coeff": to("grpo.entropy_coef", number, 0.0),
    f"{_ACTOR}.clip_ratio": part_of("grpo.epsilon"),
    f"{_ACTOR}.clip_ratio_low": part_of("grpo.epsilon"),
    f"{_ACTOR}.clip_ratio_high": part_of("grpo.epsilon_high"),
    f"{_ACTOR}.clip_ratio_c": part_of("grpo.delta"),
    f"{_ACTOR}.loss_agg_mode": part_of("grpo.loss_type"),
    f"{_ACTOR}.policy_loss.loss_mode": part_of("grpo.loss_type", "grpo.importance_sampling_level"),
    f"{_ACTOR}.tau_pos": to("grpo.tau_pos", number),
    f"{_ACTOR}.tau_neg": to("grpo.tau_neg", number),
    f"{_ACTOR}.strategy": silent("the backend is Megatron-Core"),
    f"{_ACTOR}.use_torch_compile": _KERNEL,
    f"{_ACTOR}.ulysses_sequence_parallel_size": to("parallel.context_parallel_size", integer),
    f"{_ACTOR}.freeze_vision_tower": silent("models here read text"),
    f"{_ACTOR}.entropy_from_logits_with_chunking": silent("entropy is computed in tiles"),
    **{f"{_FSDP}.{name}": _OFFLOAD for name in ("param_offload", "optimizer_offload")},
    **{f"{_FSDP}.{name}": silent("the backend is Megatron-Core") for name in ("use_orig_params", "forward_prefetch")},
    f"{_FSDP}.model_dtype": _PRECISION,
    **{
        f"{_FSDP}.mixed_precision.{n}": silent("model.dtype says it")
        for n in ("param_dtype", "reduce_dtype", "buffer_dtype")
    },
    **_sizes(),
    f"{_MEGATRON}.expert_tensor_parallel_size": lacks("experts are whole", unless=("1", *OFF)),
    f"{_MEGATRON}.sequence_parallel": to("parallel.sequence_parallel", boolean),
    f"{_OVERRIDE}.recompute_granularity": part_of("model.recompute"),
    f"{_OVERRIDE}.recompute_method": part_of("model.recompute_method"),
    f"{_OVERRIDE}.recompute_num_layers": part_of("model.recompute_num_layers"),
    f"{_OVERRIDE}.recompute_modules": part_of("model.recompute"),
    **_overrides(),
    # rollouts
    f"{_ROLLOUT}.name": part_of("rollout.engine"),
    f"{_ROLLOUT}.mode": silent("vLLM runs in the trainer's processes"),
    f"{_ROLLOUT}.n": to("rollout.num_generations", integer, 1),
    f"{_ROLLOUT}.temperature": to("rollout.temperature", number, 1.0),
    f"{_ROLLOUT}.top_p": to("rollout.top_p", number, 1.0),
    f"{_ROLLOUT}.top_k": to("rollout.top_k", lambda words: max(0, integer(words)), 0),
    f"{_ROLLOUT}.tensor_model_parallel_size": part_of("rollout.vllm_tensor_parallel_size"),
    f"{_ROLLOUT}.gpu_memory_utilization": part_of("rollout.vllm_gpu_memory_utilization"),
    f"{_ROLLOUT}.enforce_eager": part_of("rollout.vllm_enforce_eager"),
    f"{_ROLLOUT}.free_cache_engine": part_of("rollout.sleep_level"),
    f"{_ROLLOUT}.calculate_log_probs": silent("the sampler's log-probs are always kept"),
    f"{_ROLLOUT}.val_kwargs.temperature": part_of("train.eval_temperature"),
    f"{_ROLLOUT}.val_kwargs.do_sample": part_of("train.eval_temperature"),
    f"{_ROLLOUT}.val_kwargs.top_p": silent("held-out prompts are sampled out of the whole distribution"),
    f"{_ROLLOUT}.val_kwargs.top_k": silent("held-out prompts are sampled out of the whole distribution"),
    f"{_ROLLOUT}.val_kwargs.n": part_of("train.eval_num_generations"),
    f"{_ROLLOUT}.multi_turn.enable": lacks("rollouts have one turn here", unless=OFF),
    f"{_ROLLOUT}.multi_turn.format": silent("rollouts have one turn here"),
    f"{_ROLLOUT}.checkpoint_engine.update_weights_bucket_megabytes": to("model.export_bucket_megabytes", integer),
    **{
        f"{_ROLLOUT}.{name}": _SCORING
        for name in ("log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu")
    },
    **{
        f"{_ROLLOUT}.{name}": _VLLM
        for name in ("enable_chunked_prefill", "max_num_batched_tokens", "max_num_seqs", "load_format", "dtype")
    },
    **{
        f"{_ROLLOUT}.{name}": _VLLM
        for name in (
            "multi_stage_wake_up",
            "layered_summon",
            "expert_parallel_size",
            "data_parallel_size",
            "max_model_len",
        )
    },
    **{
        f"{_ROLLOUT}.engine_kwargs.{name}": _VLLM
        for name in (
            "vllm.disable_mm_preprocessor_cache",
            "sglang.attention_backend",
            "trtllm.batch_wait_timeout_iters",
            "trtllm.batch_wait_max_tokens_ratio",
        )
    },
    # the reference
    **{
        f"{_REF}.{name}": _SCORING
        for name in ("log_prob_micro_batch_size_per_gpu", "log_prob_use_dynamic_bsz", "log_prob_max_token_len_per_gpu")
    },
    **{
        f"{_REF}.{name}": _REFERENCE
        for name in (
            "fsdp_config.param_offload",
            "fsdp_config.forward_prefetch",
            "use_torch_compile",
            "strategy",
            "ulysses_sequence_parallel_size",
            "entropy_from_logits_with_chunking",
            "megatron.dist_checkpointing_path",
        )
    },
    "actor_rollout_ref.hybrid_engine": silent("trainer and sampler share the GPUs"),
    "actor_rollout_ref.nccl_timeout": part_of("parallel.distributed_timeout_minutes"),
    # rewards
    "custom_reward_function.path": part_of("rewards.reward_funcs"),
    "custom_reward_function.name": part_of("rewards.reward_funcs"),
    "reward_model.enable": _REWARD_MODEL,
    **{
        f"reward_model.{name}": silent("there is no reward model")
        for name in (
            "model.path",
            "num_workers",
            "use_reward_loop",
            "rollout.name",
            "rollout.tensor_model_parallel_size",
            "rollout.gpu_memory_utilization",
            "rollout.prompt_length",
            "rollout.response_length",
        )
    },
    "reward_model.reward_manager": part_of("rewards.reward_funcs"),
    "reward_model.reward_kwargs.overlong_buffer_cfg.enable": part_of("rewards.reward_funcs"),
    "reward_model.reward_kwargs.overlong_buffer_cfg.len": part_of("rewards.soft_cache_length"),
    "reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor": part_of("rewards.reward_weights"),
    "reward_model.reward_kwargs.overlong_buffer_cfg.log": _LOGGED,
    "reward_model.reward_kwargs.max_resp_len": part_of("rewards.soft_max_length"),
    # the trainer
    "trainer.total_epochs": part_of("train.num_train_epochs"),
    "trainer.total_training_steps": part_of("train.train_iters"),
    "trainer.save_freq": part_of("train.save_steps"),
    "trainer.test_freq": part_of("train.eval_steps"),
    "trainer.n_gpus_per_node": part_of(),
    "trainer.nnodes": part_of(),
    "trainer.logger": part_of("tracking.report_to"),
    "trainer.project_name": part_of("tracking.project", "train.output_dir"),
    "trainer.experiment_name": part_of("tracking.run_name", "train.output_dir"),
    "trainer.default_local_dir": part_of("train.output_dir"),
    "trainer.critic_warmup": silent("there is no critic"),
    "trainer.val_before_train": silent("held-out prompts are answered before the first step"),
    "trainer.log_val_generations": _LOGGED,
    "trainer.resume_mode": silent("the same command again resumes"),
    "trainer.resume_from_path": lacks(
        "the same command again resumes a run of this package; of weights name model.path"
    ),
    "trainer.balance_batch": silent("train.max_tokens_per_micro_batch balances rows by their cost"),
    "trainer.max_actor_ckpt_to_keep": to("train.save_total_limit", integer),
    "trainer.use_legacy_worker_impl": silent("it is for verl's workers"),
    **{
        f"global_profiler.{name}": _PROFILER
        for name in (
            "tool",
            "steps",
            "save_path",
            "global_tool_config.torch_memory.trace_alloc_max_entries",
            "global_tool_config.torch_memory.stack_depth",
        )
    },
    **{
        f"{group}.profiler.{name}": _PROFILER
        for group in (_ACTOR, _REF)
        for name in (
            "enable",
            "ranks",
            "all_ranks",
            *(f"tool_config.npu.{key}" for key in ("level", "discrete", "contents", "analysis")),
        )
    },
}
