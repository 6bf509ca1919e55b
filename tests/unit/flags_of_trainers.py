"""The flags of other trainers, as their documentation and sources list them: what an importer must know."""

from __future__ import annotations

# ms-swift 4.6.0.dev0, commit 3602360: docs/source_en/Instruction/Command-line-parameters.md by section, and the fields
# of GRPOArgumentsMixin in swift/rlhf_trainers/args_mixin.py.
MS_SWIFT = {
    "Base Arguments": """
        tuner_backend tuner_type adapters external_plugins seed model_kwargs enable_npu_model_patch load_args
        load_data_args use_hf hub_token ddp_timeout ddp_backend ignore_args_error
    """,
    "Model Arguments": """
        model model_type model_revision task_type torch_dtype attn_impl experts_impl new_special_tokens num_labels
        problem_type rope_scaling max_model_len device_map max_memory local_repo_path init_strategy
    """,
    "Data Arguments": """
        dataset val_dataset cached_dataset cached_val_dataset split_dataset_ratio data_seed dataset_num_proc
        load_from_cache_file dataset_shuffle val_dataset_shuffle streaming interleave_prob stopping_strategy
        shuffle_buffer_size download_mode columns strict remove_unused_columns disable_auto_column_mapping model_name
        model_author custom_dataset_info
    """,
    "Template Arguments": """
        template system max_length truncation_strategy max_pixels agent_template norm_bbox use_chat_template
        padding_side padding_free loss_scale disable_ignore_empty_think is_binary_loss_scale sequence_parallel_size
        template_backend response_prefix enable_thinking preserve_thinking add_non_thinking_prefix
    """,
    "Generation Arguments": """
        max_new_tokens temperature top_k top_p repetition_penalty num_beams stream stop_words logprobs top_logprobs
        structured_outputs_regex
    """,
    "Quantization Arguments": """
        quant_method quant_bits hqq_axis bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant
        bnb_4bit_quant_storage
    """,
    "RAY Arguments": """
        use_ray ray_exp_name device_groups
    """,
    "Seq2SeqTrainer Arguments": """
        output_dir gradient_checkpointing vit_gradient_checkpointing deepspeed zero_hpz_partition_size
        deepspeed_autotp_size fsdp per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps
        weight_decay adam_beta1 adam_beta2 adam_epsilon learning_rate vit_lr aligner_lr lr_scheduler_type
        lr_scheduler_kwargs gradient_checkpointing_kwargs full_determinism report_to logging_first_step logging_steps
        router_aux_loss_coef enable_dft_loss enable_channel_loss safe_serialization max_shard_size logging_dir
        predict_with_generate metric_for_best_model greater_is_better max_epochs num_train_epochs save_strategy
        save_steps eval_strategy eval_steps eval_on_start save_total_limit max_steps warmup_ratio save_on_each_node
        save_only_model resume_from_checkpoint resume_only_model ignore_data_skip ddp_find_unused_parameters
        dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
        train_dataloader_shuffle optim optim_args group_by_length neftune_noise_alpha use_liger_kernel
        average_tokens_across_devices max_grad_norm push_to_hub hub_model_id hub_private_repo
    """,
    "vLLM Arguments": """
        vllm_gpu_memory_utilization vllm_tensor_parallel_size vllm_pipeline_parallel_size vllm_data_parallel_size
        vllm_enable_expert_parallel vllm_max_num_seqs vllm_max_model_len vllm_disable_custom_all_reduce
        vllm_enforce_eager vllm_mm_processor_cache_gb vllm_speculative_config vllm_disable_cascade_attn
        vllm_limit_mm_per_prompt vllm_max_lora_rank vllm_quantization vllm_enable_prefix_caching vllm_use_async_engine
        vllm_reasoning_parser vllm_engine_kwargs
    """,
    "Training Arguments": """
        add_version check_model create_checkpoint_symlink packing packing_length packing_num_proc packing_strategy
        lazy_tokenize use_logits_to_keep acc_strategy max_new_tokens temperature optimizer loss_type mrl_dims
        eval_metric callbacks early_stop_interval eval_use_evalscope eval_dataset eval_dataset_args eval_limit
        eval_generation_config use_flash_ckpt
    """,
    "SWANLAB": """
        swanlab_token swanlab_project swanlab_workspace swanlab_exp_name swanlab_notification_method
        swanlab_webhook_url swanlab_secret swanlab_mode
    """,
    "RLHF Arguments": """
        rlhf_type ref_model ref_adapters ref_model_type ref_model_revision beta label_smoothing max_completion_length
        rpo_alpha ld_alpha discopop_tau loss_type loss_weights cpo_alpha simpo_gamma desirable_weight
        undesirable_weight center_rewards_coefficient loss_scale temperature top_k top_p min_p
    """,
    "Reward/Teacher Model Parameters": """
        reward_model reward_adapters reward_model_type reward_model_revision teacher_model teacher_adapters
        teacher_model_type teacher_model_revision teacher_model_server teacher_tag_key teacher_deepspeed
        offload_teacher_model
    """,
    "GRPO Arguments": """
        beta per_device_train_batch_size per_device_eval_batch_size steps_per_generation generation_batch_size
        num_generations num_generations_eval ds3_gather_for_generation reward_funcs reward_weights reward_model_plugin
        dataset_shuffle truncation_strategy loss_type fipo_decay_rate fipo_clip_range fipo_clip_high_only
        fipo_safety_threshold log_completions use_vllm vllm_mode vllm_server_host vllm_server_port
        vllm_server_base_url vllm_server_timeout vllm_server_pass_dataset vllm_server_group_port async_generate
        enable_flattened_weight_sync vllm_gpu_memory_utilization vllm_max_model_len vllm_enforce_eager
        vllm_limit_mm_per_prompt vllm_enable_prefix_caching vllm_tensor_parallel_size vllm_enable_lora sleep_level
        offload_optimizer offload_model completion_length_limit_scope num_iterations epsilon epsilon_high tau_pos
        tau_neg dynamic_sample max_resample_times overlong_filter delta importance_sampling_level advantage_estimator
        kl_in_reward scale_rewards teacher_kl_coef advantage_reweight rlsd_lambda rlsd_reweight_clip_range
        rlsd_lambda_warmup_steps rlsd_lambda_decay_steps rlsd_negative_only sdar_loss_coef sdar_gate_beta
        sync_ref_model ref_model_mixup_alpha ref_model_sync_steps move_model_batches multi_turn_scheduler max_turns
        gym_env use_gym_env top_entropy_quantile log_entropy rollout_importance_sampling_mode
        rollout_importance_sampling_threshold log_rollout_offpolicy_metrics off_policy_sequence_mask_delta
    """,
    "Reward function parameters": """
        soft_max_length soft_cache_length
    """,
    "Tuner Arguments": """
        freeze_llm freeze_vit freeze_aligner target_modules target_regex target_parameters init_weights
        modules_to_save freeze_parameters freeze_parameters_regex freeze_parameters_ratio trainable_parameters
        trainable_parameters_regex lora_rank lora_alpha lora_dropout lora_bias lora_dtype use_dora use_rslora
        lorap_lr_ratio
    """,
    "GRPOArgumentsMixin": """
        epsilon epsilon_high delta cosine_min_len_value_wrong cosine_max_len_value_wrong cosine_min_len_value_correct
        cosine_max_len_value_correct cosine_max_len repetition_n_grams repetition_max_penalty reward_model
        reward_model_plugin chord_sft_dataset chord_sft_per_device_train_batch_size chord_enable_phi_function
        chord_mu_warmup_steps chord_mu_decay_steps chord_mu_peak chord_mu_valley sync_ref_model ref_model_sync_steps
        ref_model_mixup_alpha multi_turn_scheduler max_turns completion_length_limit_scope vllm_server_pass_dataset
        use_gym_env gym_env dynamic_sample max_resample_times overlong_filter soft_max_length soft_cache_length
        scale_rewards log_entropy top_entropy_quantile importance_sampling_level tau_pos tau_neg advantage_estimator
        kl_in_reward teacher_kl_coef advantage_reweight rlsd_lambda rlsd_reweight_clip_range rlsd_lambda_warmup_steps
        rlsd_lambda_decay_steps rlsd_negative_only sdar_loss_coef sdar_gate_beta real_tau fipo_decay_rate
        fipo_clip_range fipo_clip_high_only fipo_safety_threshold num_generations_eval dataset_shuffle
        rollout_importance_sampling_mode rollout_importance_sampling_threshold log_rollout_offpolicy_metrics
        off_policy_sequence_mask_delta
    """,
}

# Read beside them by scripts of examples/train/grpo (the older spellings, and fields of TrainingArguments).
MS_SWIFT_IN_SCRIPTS = "train_type warmup_steps bf16 fp16 save_safetensors freeze_parameters load_best_model_at_end"

# TRL 1.10.0.dev0, commit f2cd577: fields of GRPOConfig in trl/trainer/grpo_config.py.
TRL = """
    learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
    remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
    shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
    generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host vllm_server_port
    vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size
    beta num_iterations epsilon delta epsilon_high sapo_temperature_neg sapo_temperature_pos vespo_k_pos
    vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level reward_weights multi_objective_aggregation
    scale_rewards loss_type mask_truncated_completions sync_ref_model ref_model_mixup_alpha ref_model_sync_steps
    top_entropy_quantile entropy_coef use_adaptive_entropy entropy_coef_min entropy_coef_max entropy_coef_delta
    entropy_target max_tool_calling_iterations vllm_importance_sampling_correction vllm_importance_sampling_mode
    vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min off_policy_mask_threshold
    use_bias_correction_kl log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo use_transformers_continuous_batching transformers_continuous_batching_config
    use_transformers_paged vllm_importance_sampling_cap
"""

# Of transformers.TrainingArguments, what scripts for GRPO set.
TRAINING_ARGUMENTS = """
    output_dir per_device_train_batch_size per_device_eval_batch_size gradient_accumulation_steps num_train_epochs
    max_steps lr_scheduler_type lr_scheduler_kwargs warmup_ratio warmup_steps weight_decay adam_beta1 adam_beta2
    adam_epsilon max_grad_norm optim seed data_seed bf16 fp16 tf32 gradient_checkpointing
    gradient_checkpointing_kwargs logging_steps logging_strategy logging_first_step logging_dir save_strategy
    save_steps save_total_limit save_only_model eval_strategy eval_steps eval_on_start do_eval report_to run_name
    dataloader_num_workers deepspeed fsdp ddp_timeout torch_compile use_liger_kernel push_to_hub hub_model_id
    resume_from_checkpoint
"""

# verl 0.8.0.dev, commit b178a3c: every key of the scripts in examples/grpo_trainer.
VERL = """
    actor_rollout_ref.actor.clip_ratio_c
    actor_rollout_ref.actor.clip_ratio_high
    actor_rollout_ref.actor.clip_ratio_low
    actor_rollout_ref.actor.entropy_coeff
    actor_rollout_ref.actor.entropy_from_logits_with_chunking
    actor_rollout_ref.actor.freeze_vision_tower
    actor_rollout_ref.actor.fsdp_config.forward_prefetch
    actor_rollout_ref.actor.fsdp_config.mixed_precision.buffer_dtype
    actor_rollout_ref.actor.fsdp_config.mixed_precision.param_dtype
    actor_rollout_ref.actor.fsdp_config.mixed_precision.reduce_dtype
    actor_rollout_ref.actor.fsdp_config.model_dtype
    actor_rollout_ref.actor.fsdp_config.optimizer_offload
    actor_rollout_ref.actor.fsdp_config.param_offload
    actor_rollout_ref.actor.fsdp_config.use_orig_params
    actor_rollout_ref.actor.kl_loss_coef
    actor_rollout_ref.actor.kl_loss_type
    actor_rollout_ref.actor.loss_agg_mode
    actor_rollout_ref.actor.megatron.context_parallel_size
    actor_rollout_ref.actor.megatron.dist_checkpointing_path
    actor_rollout_ref.actor.megatron.expert_model_parallel_size
    actor_rollout_ref.actor.megatron.expert_tensor_parallel_size
    actor_rollout_ref.actor.megatron.grad_offload
    actor_rollout_ref.actor.megatron.optimizer_offload
    actor_rollout_ref.actor.megatron.override_transformer_config.account_for_embedding_in_pipeline_split
    actor_rollout_ref.actor.megatron.override_transformer_config.account_for_loss_in_pipeline_split
    actor_rollout_ref.actor.megatron.override_transformer_config.apply_rope_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.attention_backend
    actor_rollout_ref.actor.megatron.override_transformer_config.bias_activation_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.bias_dropout_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.deallocate_pipeline_outputs
    actor_rollout_ref.actor.megatron.override_transformer_config.gradient_accumulation_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.masked_softmax_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_aux_loss_coeff
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_enable_deepep
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_grouped_gemm
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_permute_fusion
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_router_dtype
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_shared_expert_overlap
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_token_dispatcher_type
    actor_rollout_ref.actor.megatron.override_transformer_config.moe_z_loss_coeff
    actor_rollout_ref.actor.megatron.override_transformer_config.num_layers_in_first_pipeline_stage
    actor_rollout_ref.actor.megatron.override_transformer_config.num_layers_in_last_pipeline_stage
    actor_rollout_ref.actor.megatron.override_transformer_config.persist_layer_norm
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_granularity
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_method
    actor_rollout_ref.actor.megatron.override_transformer_config.recompute_num_layers
    actor_rollout_ref.actor.megatron.param_offload
    actor_rollout_ref.actor.megatron.pipeline_model_parallel_size
    actor_rollout_ref.actor.megatron.tensor_model_parallel_size
    actor_rollout_ref.actor.megatron.use_dist_checkpointing
    actor_rollout_ref.actor.megatron.use_mbridge
    actor_rollout_ref.actor.megatron.vanilla_mbridge
    actor_rollout_ref.actor.megatron.virtual_pipeline_model_parallel_size
    actor_rollout_ref.actor.optim.clip_grad
    actor_rollout_ref.actor.optim.lr
    actor_rollout_ref.actor.optim.lr_decay_style
    actor_rollout_ref.actor.optim.lr_warmup_steps
    actor_rollout_ref.actor.optim.override_optimizer_config.optimizer_cpu_offload
    actor_rollout_ref.actor.optim.override_optimizer_config.optimizer_offload_fraction
    actor_rollout_ref.actor.optim.override_optimizer_config.use_precision_aware_optimizer
    actor_rollout_ref.actor.optim.weight_decay
    actor_rollout_ref.actor.ppo_max_token_len_per_gpu
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu
    actor_rollout_ref.actor.ppo_mini_batch_size
    actor_rollout_ref.actor.profiler.all_ranks
    actor_rollout_ref.actor.profiler.enable
    actor_rollout_ref.actor.profiler.ranks
    actor_rollout_ref.actor.profiler.tool_config.npu.analysis
    actor_rollout_ref.actor.profiler.tool_config.npu.contents
    actor_rollout_ref.actor.profiler.tool_config.npu.discrete
    actor_rollout_ref.actor.profiler.tool_config.npu.level
    actor_rollout_ref.actor.strategy
    actor_rollout_ref.actor.ulysses_sequence_parallel_size
    actor_rollout_ref.actor.use_dynamic_bsz
    actor_rollout_ref.actor.use_kl_loss
    actor_rollout_ref.actor.use_torch_compile
    actor_rollout_ref.hybrid_engine
    actor_rollout_ref.model.enable_gradient_checkpointing
    actor_rollout_ref.model.exclude_modules
    actor_rollout_ref.model.lora.alpha
    actor_rollout_ref.model.lora.lora_A_init_method
    actor_rollout_ref.model.lora.rank
    actor_rollout_ref.model.lora_adapter_path
    actor_rollout_ref.model.lora_alpha
    actor_rollout_ref.model.lora_rank
    actor_rollout_ref.model.override_config.model_config.max_position_embeddings
    actor_rollout_ref.model.path
    actor_rollout_ref.model.target_modules
    actor_rollout_ref.model.trust_remote_code
    actor_rollout_ref.model.use_fused_kernels
    actor_rollout_ref.model.use_remove_padding
    actor_rollout_ref.model.use_shm
    actor_rollout_ref.nccl_timeout
    actor_rollout_ref.ref.entropy_from_logits_with_chunking
    actor_rollout_ref.ref.fsdp_config.forward_prefetch
    actor_rollout_ref.ref.fsdp_config.param_offload
    actor_rollout_ref.ref.log_prob_max_token_len_per_gpu
    actor_rollout_ref.ref.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.ref.log_prob_use_dynamic_bsz
    actor_rollout_ref.ref.megatron.context_parallel_size
    actor_rollout_ref.ref.megatron.dist_checkpointing_path
    actor_rollout_ref.ref.megatron.expert_model_parallel_size
    actor_rollout_ref.ref.megatron.expert_tensor_parallel_size
    actor_rollout_ref.ref.megatron.param_offload
    actor_rollout_ref.ref.megatron.pipeline_model_parallel_size
    actor_rollout_ref.ref.megatron.tensor_model_parallel_size
    actor_rollout_ref.ref.megatron.use_dist_checkpointing
    actor_rollout_ref.ref.megatron.virtual_pipeline_model_parallel_size
    actor_rollout_ref.ref.profiler.all_ranks
    actor_rollout_ref.ref.profiler.enable
    actor_rollout_ref.ref.profiler.ranks
    actor_rollout_ref.ref.profiler.tool_config.npu.analysis
    actor_rollout_ref.ref.profiler.tool_config.npu.contents
    actor_rollout_ref.ref.profiler.tool_config.npu.discrete
    actor_rollout_ref.ref.profiler.tool_config.npu.level
    actor_rollout_ref.ref.strategy
    actor_rollout_ref.ref.ulysses_sequence_parallel_size
    actor_rollout_ref.ref.use_torch_compile
    actor_rollout_ref.rollout.calculate_log_probs
    actor_rollout_ref.rollout.checkpoint_engine.update_weights_bucket_megabytes
    actor_rollout_ref.rollout.data_parallel_size
    actor_rollout_ref.rollout.enable_chunked_prefill
    actor_rollout_ref.rollout.enforce_eager
    actor_rollout_ref.rollout.engine_kwargs.sglang.attention_backend
    actor_rollout_ref.rollout.engine_kwargs.trtllm.batch_wait_max_tokens_ratio
    actor_rollout_ref.rollout.engine_kwargs.trtllm.batch_wait_timeout_iters
    actor_rollout_ref.rollout.engine_kwargs.vllm.disable_mm_preprocessor_cache
    actor_rollout_ref.rollout.expert_parallel_size
    actor_rollout_ref.rollout.free_cache_engine
    actor_rollout_ref.rollout.gpu_memory_utilization
    actor_rollout_ref.rollout.layered_summon
    actor_rollout_ref.rollout.load_format
    actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu
    actor_rollout_ref.rollout.log_prob_use_dynamic_bsz
    actor_rollout_ref.rollout.max_num_batched_tokens
    actor_rollout_ref.rollout.max_num_seqs
    actor_rollout_ref.rollout.mode
    actor_rollout_ref.rollout.multi_stage_wake_up
    actor_rollout_ref.rollout.multi_turn.format
    actor_rollout_ref.rollout.n
    actor_rollout_ref.rollout.name
    actor_rollout_ref.rollout.temperature
    actor_rollout_ref.rollout.tensor_model_parallel_size
    actor_rollout_ref.rollout.top_k
    actor_rollout_ref.rollout.top_p
    actor_rollout_ref.rollout.val_kwargs.do_sample
    actor_rollout_ref.rollout.val_kwargs.n
    actor_rollout_ref.rollout.val_kwargs.temperature
    actor_rollout_ref.rollout.val_kwargs.top_k
    actor_rollout_ref.rollout.val_kwargs.top_p
    algorithm.adv_estimator
    algorithm.kl_ctrl.kl_coef
    algorithm.rollout_correction.rollout_is_threshold
    algorithm.use_kl_in_reward
    custom_reward_function.name
    custom_reward_function.path
    data.apply_chat_template_kwargs.reasoning_effort
    data.custom_cls.name
    data.custom_cls.path
    data.filter_overlong_prompts
    data.image_key
    data.max_prompt_length
    data.max_response_length
    data.prompt_key
    data.return_raw_chat
    data.shuffle
    data.train_batch_size
    data.train_files
    data.truncation
    data.trust_remote_code
    data.val_files
    global_profiler.global_tool_config.torch_memory.stack_depth
    global_profiler.global_tool_config.torch_memory.trace_alloc_max_entries
    global_profiler.save_path
    global_profiler.steps
    global_profiler.tool
    reward_model.enable
    reward_model.model.path
    reward_model.num_workers
    reward_model.reward_kwargs.max_resp_len
    reward_model.reward_kwargs.overlong_buffer_cfg.enable
    reward_model.reward_kwargs.overlong_buffer_cfg.len
    reward_model.reward_kwargs.overlong_buffer_cfg.log
    reward_model.reward_kwargs.overlong_buffer_cfg.penalty_factor
    reward_model.reward_manager
    reward_model.rollout.gpu_memory_utilization
    reward_model.rollout.name
    reward_model.rollout.prompt_length
    reward_model.rollout.response_length
    reward_model.rollout.tensor_model_parallel_size
    reward_model.use_reward_loop
    trainer.critic_warmup
    trainer.default_local_dir
    trainer.experiment_name
    trainer.log_val_generations
    trainer.logger
    trainer.n_gpus_per_node
    trainer.nnodes
    trainer.project_name
    trainer.resume_from_path
    trainer.resume_mode
    trainer.save_freq
    trainer.test_freq
    trainer.total_epochs
    trainer.use_legacy_worker_impl
    trainer.val_before_train
"""
