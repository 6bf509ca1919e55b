"""What may change when a run resumes: every key of the configuration is in one of two sets."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from chord_megatron.config import Config
from chord_megatron.system.errors import UserError


def _keys(**groups: str) -> frozenset[str]:
    return frozenset(f"{group}.{key}" for group, keys in groups.items() for key in keys.split())


# Refused where it differs: the model, the rows that a checkpoint's cursors count, and what it cannot be loaded with.
STAYS = _keys(
    model="path dtype",
    data="dataset dataset_split format max_rows prompt_column reference_column reference_pattern prompt_format "
    "system_prompt chat_template_kwargs max_prompt_length",
    chord="semantics chord_sft_dataset chord_sft_dataset_split chord_sft_prompt_column chord_sft_answer_column "
    "chord_sft_max_length chord_sft_format chord_sft_max_rows",
    optimizer="use_distributed_optimizer",
    train="seed",
)
# Said where it differs: how the steps to come are taken, checked and written down.
MAY_CHANGE = _keys(
    model="recompute recompute_method recompute_num_layers transformer_config export_bucket_megabytes "
    "trust_remote_code",
    parallel="tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size "
    "pipeline_layout num_layers_in_first_pipeline_stage num_layers_in_last_pipeline_stage "
    "sequence_parallel context_parallel_size expert_model_parallel_size distributed_timeout_minutes",
    data="eval_dataset eval_dataset_split num_eval_prompts on_bad_row",
    rewards="reward_funcs reward_weights timeout_seconds memory_limit_gb environment soft_max_length soft_cache_length "
    "answer_format on_error",
    rollout="engine num_generations temperature top_p top_k max_completion_length stop_token_ids max_batch_size "
    "record_to replay_from vllm_mode vllm_tensor_parallel_size vllm_gpu_memory_utilization vllm_enforce_eager "
    "sleep_level offload_optimizer offload_model vllm_servers vllm_server_timeout weight_transfer weight_transfer_dir "
    "weight_transfer_address max_staleness consistency_threshold consistency_action router_replay",
    grpo="loss_type policy_loss importance_sampling_level epsilon epsilon_high delta tau_pos tau_neg vespo_k_pos "
    "vespo_lambda_pos vespo_k_neg vespo_lambda_neg off_policy_sequence_mask_delta entropy_coef top_entropy_quantile "
    "beta kl_estimator kl_in_reward advantage_estimator scale_rewards overlong_filter filtered_count "
    "old_log_probs steps_per_generation num_iterations "
    "rollout_importance_sampling_mode rollout_importance_sampling_threshold",
    chord="chord_sft_global_batch_size chord_sft_per_device_train_batch_size chord_mu_peak chord_mu_valley "
    "chord_mu_warmup_steps chord_mu_decay_steps mu_schedule mu_target mu_start mu_smoothing mu_update_steps "
    "chord_enable_phi_function expert_weight expert_weight_cutoff luffy_gamma",
    optimizer="lr min_lr lr_decay_style lr_warmup_iters lr_warmup_ratio weight_decay adam_beta1 adam_beta2 adam_eps "
    "clip_grad overlap_grad_reduce use_precision_aware_optimizer main_grads_dtype main_params_dtype exp_avg_dtype "
    "exp_avg_sq_dtype optimizer_cpu_offload optimizer_offload_fraction",
    train="output_dir micro_batch_size max_tokens_per_micro_batch global_batch_size packing_order skip_idle_rows "
    "share_prompts train_iters num_train_epochs max_loss_tokens eval_steps eval_temperature eval_num_generations "
    "early_stopping_patience save_steps save_total_limit keep_best async_save save_on_signal max_skipped_steps",
    tracking="report_to project run_name group tags entity uri prometheus_port prometheus_host log_completions "
    "diagnose_steps",
)


def changes(before: Mapping[str, Any], config: Config, run_dir: object) -> list[str]:
    """What differs from a run's earlier settings (by dotted key), as "KEY OLD -> NEW". UserError where it may not.

    Keys that are not in `before` are left out: a release may not have had them.
    """
    now = {f"{group}.{key}": value for group, keys in config.model_dump().items() for key, value in keys.items()}
    changed = [key for key, value in now.items() if key in before and before[key] != value]
    for key in changed:
        if key in STAYS:
            raise UserError(
                f"{run_dir} holds a run with {key}={_shown(before[key])}, but this one has {_shown(now[key])}; "
                "restore it, or choose another train.output_dir"
            )
    changed = [key for key in changed if key != "train.output_dir"]  # a run that was moved is the same
    return [f"{key} {_shown(before[key])} -> {_shown(now[key])}" for key in changed]


def _shown(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 200 else f"{text[:200]}..."
