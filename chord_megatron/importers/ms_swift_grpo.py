"""ms-swift's flags of vLLM, GRPO, CHORD and RLHF, one row each.

Of ms-swift 4.6.0.dev0 (commit 3602360): docs/source_en/Instruction/Command-line-parameters.md, and the fields of
GRPOArgumentsMixin in swift/rlhf_trainers/args_mixin.py.
"""

from __future__ import annotations

from chord_megatron.importers import huggingface as hf
from chord_megatron.importers.flags import boolean, integer, number
from chord_megatron.importers.ms_swift_training import OFF
from chord_megatron.importers.rows import Table, choice, hardware, lacks, part_of, silent, to

_MULTI_TURN = lacks("rollouts have one turn here", unless=OFF)
_TEACHER = lacks("there is no teacher here", unless=OFF)
_IMAGES = lacks("models here read text", unless=OFF)
_REWARD_MODEL = lacks("a reward model is a function of yours here, path.py:function (docs/coming-from.md)", unless=OFF)
_OTHER_REWARD = lacks("there is no such reward; write it as path.py:function (docs/coming-from.md)", unless=OFF)
_OTHER_ALGORITHM = silent("it belongs to another algorithm than GRPO")
_VLLM = hardware("vLLM's own default is used", unless=OFF)

GRPO: Table = {
    # vLLM
    "use_vllm": part_of("rollout.engine"),
    "vllm_mode": part_of("rollout.vllm_mode"),
    "vllm_gpu_memory_utilization": to(
        "rollout.vllm_gpu_memory_utilization", number, 0.9, when=hf.is_colocated, otherwise="vLLM is not colocated"
    ),
    "vllm_tensor_parallel_size": to(
        "rollout.vllm_tensor_parallel_size", integer, 1, when=hf.is_colocated, otherwise="vLLM is not colocated"
    ),
    "vllm_pipeline_parallel_size": _VLLM,
    "vllm_data_parallel_size": hardware("name each server: rollout.vllm_servers", unless=("1",)),
    "vllm_enable_expert_parallel": _VLLM,
    "vllm_max_num_seqs": hardware("rollout.max_batch_size bounds what is decoded at once"),
    "vllm_max_model_len": part_of("data.max_prompt_length"),
    "vllm_disable_custom_all_reduce": silent("vLLM's own default is used"),
    "vllm_enforce_eager": to(
        "rollout.vllm_enforce_eager", boolean, False, when=hf.is_colocated, otherwise="vLLM is not colocated"
    ),
    "vllm_mm_processor_cache_gb": _IMAGES,
    "vllm_limit_mm_per_prompt": _IMAGES,
    "vllm_speculative_config": _VLLM,
    "vllm_disable_cascade_attn": _VLLM,
    "vllm_enable_lora": silent("there are no adapters"),
    "vllm_max_lora_rank": silent("there are no adapters"),
    "vllm_quantization": lacks("the sampler has the trainer's weights as they are", unless=OFF),
    "vllm_enable_prefix_caching": silent("the completions of a prompt share it"),
    "vllm_use_async_engine": silent("rollout.vllm_mode says how vLLM runs"),
    "vllm_reasoning_parser": silent("completions are text as sampled"),
    "vllm_engine_kwargs": _VLLM,
    "vllm_server_host": part_of("rollout.vllm_servers"),
    "vllm_server_port": part_of("rollout.vllm_servers"),
    "vllm_server_base_url": part_of("rollout.vllm_servers"),
    "vllm_server_timeout": to(
        "rollout.vllm_server_timeout", number, 240.0, when=hf.is_served, otherwise="there is no server"
    ),
    "vllm_server_pass_dataset": _MULTI_TURN,
    "vllm_server_group_port": silent("rollout.weight_transfer says how weights travel"),
    "async_generate": to(
        "rollout.max_staleness", lambda words: int(boolean(words)), 0, when=hf.is_served, otherwise="there is no server"
    ),
    "enable_flattened_weight_sync": silent("model.export_bucket_megabytes says how much travels at a time"),
    "sleep_level": to("rollout.sleep_level", integer, 0, when=hf.is_colocated, otherwise="vLLM is not colocated"),
    "offload_optimizer": to(
        "rollout.offload_optimizer", boolean, False, when=hf.is_colocated, otherwise="vLLM is not colocated"
    ),
    "offload_model": to(
        "rollout.offload_model", boolean, False, when=hf.is_colocated, otherwise="vLLM is not colocated"
    ),
    "move_model_batches": silent("model.export_bucket_megabytes says how much is moved at a time"),
    "ds3_gather_for_generation": silent("weights are gathered bucket by bucket"),
    # GRPO
    "beta": to("grpo.beta", number, 0.04),
    "steps_per_generation": part_of("grpo.steps_per_generation"),
    "generation_batch_size": part_of("grpo.steps_per_generation"),
    "num_generations": to("rollout.num_generations", integer, 8),
    "num_generations_eval": part_of("train.eval_num_generations"),
    "reward_funcs": part_of("rewards.reward_funcs"),
    "reward_weights": part_of("rewards.reward_weights"),
    "reward_model": _REWARD_MODEL,
    "reward_adapters": _REWARD_MODEL,
    "reward_model_type": _REWARD_MODEL,
    "reward_model_revision": _REWARD_MODEL,
    "reward_model_plugin": _REWARD_MODEL,
    "reward_template": _REWARD_MODEL,
    "loss_type": to(
        "grpo.loss_type",
        choice({name: name for name in ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")}),
        "grpo",
    ),
    "loss_weights": _OTHER_ALGORITHM,
    "real_tau": silent("it belongs to a loss that is not here"),
    "fipo_decay_rate": silent("it belongs to a loss that is not here"),
    "fipo_clip_range": silent("it belongs to a loss that is not here"),
    "fipo_clip_high_only": silent("it belongs to a loss that is not here"),
    "fipo_safety_threshold": silent("it belongs to a loss that is not here"),
    "log_completions": to("tracking.log_completions", hf.logged_completions),
    "completion_length_limit_scope": silent("rollouts have one turn"),
    "num_iterations": to("grpo.num_iterations", integer, 1),
    "epsilon": to("grpo.epsilon", number, 0.2),
    "epsilon_high": to("grpo.epsilon_high", number),
    "tau_pos": to("grpo.tau_pos", number, 1.0),
    "tau_neg": to("grpo.tau_neg", number, 1.05),
    "dynamic_sample": lacks("groups whose rewards are all alike train nothing and are not drawn anew", unless=OFF),
    "max_resample_times": silent("groups are not drawn anew"),
    "overlong_filter": to("grpo.overlong_filter", boolean, False),
    "delta": to("grpo.delta", number),
    "importance_sampling_level": to(
        "grpo.importance_sampling_level", choice({name: name for name in ("token", "sequence", "sequence_token")})
    ),
    "advantage_estimator": part_of("grpo.advantage_estimator"),
    "kl_in_reward": part_of("grpo.kl_in_reward"),
    "scale_rewards": to("grpo.scale_rewards", choice({name: name for name in ("group", "batch", "none", "gdpo")})),
    "teacher_kl_coef": _OTHER_ALGORITHM,
    "advantage_reweight": lacks("advantages are the same over a completion", unless=OFF),
    "rlsd_lambda": _OTHER_ALGORITHM,
    "rlsd_reweight_clip_range": _OTHER_ALGORITHM,
    "rlsd_lambda_warmup_steps": _OTHER_ALGORITHM,
    "rlsd_lambda_decay_steps": _OTHER_ALGORITHM,
    "rlsd_negative_only": _OTHER_ALGORITHM,
    "sdar_loss_coef": _TEACHER,
    "sdar_gate_beta": _OTHER_ALGORITHM,
    "sync_ref_model": lacks("the reference is the model that the run began with", unless=OFF),
    "ref_model_mixup_alpha": silent("the reference is the model that the run began with"),
    "ref_model_sync_steps": silent("the reference is the model that the run began with"),
    "multi_turn_scheduler": _MULTI_TURN,
    "max_turns": _MULTI_TURN,
    "gym_env": _MULTI_TURN,
    "use_gym_env": _MULTI_TURN,
    "top_entropy_quantile": to("grpo.top_entropy_quantile", number, 1.0),
    "log_entropy": silent("entropy is a metric of each step"),
    "rollout_importance_sampling_mode": to(
        "grpo.rollout_importance_sampling_mode",
        choice({name: name for name in ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")}),
    ),
    "rollout_importance_sampling_threshold": to("grpo.rollout_importance_sampling_threshold", number, 2.0),
    "log_rollout_offpolicy_metrics": silent("they are metrics of each step"),
    "off_policy_sequence_mask_delta": to("grpo.off_policy_sequence_mask_delta", number),
    "cosine_min_len_value_wrong": _OTHER_REWARD,
    "cosine_max_len_value_wrong": _OTHER_REWARD,
    "cosine_min_len_value_correct": _OTHER_REWARD,
    "cosine_max_len_value_correct": _OTHER_REWARD,
    "cosine_max_len": _OTHER_REWARD,
    "repetition_n_grams": _OTHER_REWARD,
    "repetition_max_penalty": _OTHER_REWARD,
    "soft_max_length": to("rewards.soft_max_length", integer),
    "soft_cache_length": to("rewards.soft_cache_length", integer),
    # CHORD
    "chord_sft_dataset": part_of("chord.chord_sft_dataset", "chord.chord_sft_answer_column"),
    "chord_sft_per_device_train_batch_size": part_of("chord.chord_sft_global_batch_size"),
    "chord_enable_phi_function": to("chord.chord_enable_phi_function", boolean, False),
    "chord_mu_warmup_steps": to("chord.chord_mu_warmup_steps", integer),
    "chord_mu_decay_steps": to("chord.chord_mu_decay_steps", integer),
    "chord_mu_peak": to("chord.chord_mu_peak", number),
    "chord_mu_valley": to("chord.chord_mu_valley", number),
    # RLHF
    "ref_model": lacks("the reference is the model that the run begins with", unless=OFF),
    "ref_adapters": lacks("the reference is the model that the run begins with", unless=OFF),
    "ref_model_type": silent("the reference is the model that the run begins with"),
    **dict.fromkeys(
        ("label_smoothing", "rpo_alpha", "ld_alpha", "discopop_tau", "cpo_alpha", "simpo_gamma"), _OTHER_ALGORITHM
    ),
    "desirable_weight": _OTHER_ALGORITHM,
    "undesirable_weight": _OTHER_ALGORITHM,
    "center_rewards_coefficient": _OTHER_ALGORITHM,
    "ref_model_revision": silent("the reference is the model that the run begins with"),
    "teacher_model": _TEACHER,
    "teacher_adapters": _TEACHER,
    "teacher_model_type": _TEACHER,
    "teacher_model_revision": _TEACHER,
    "teacher_model_server": _TEACHER,
    "teacher_tag_key": _OTHER_ALGORITHM,
    "teacher_deepspeed": _OTHER_ALGORITHM,
    "offload_teacher_model": _OTHER_ALGORITHM,
}
