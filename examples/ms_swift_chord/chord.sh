# The flags and values of ms-swift's examples/train/grpo/internal/chord.sh (August 2026), in an order of its own and
# with another system prompt. For `chord-megatron import`: chord_8gpu.yaml beside this file is what it makes of it.
CHORD_SYSTEM_PROMPT="Solve the problem. Reason first, between <think> and </think>.\nThen give the final answer in \\boxed{}."

CUDA_VISIBLE_DEVICES=0,1,2,3,4,5,6,7 NPROC_PER_NODE=8 swift rlhf --rlhf_type grpo --tuner_type full \
    --model Qwen/Qwen2.5-7B-Instruct --torch_dtype bfloat16 \
    --dataset AI-MO/NuminaMath-TIR --load_from_cache_file true --dataloader_num_workers 4 \
    --system "$CHORD_SYSTEM_PROMPT" --reward_funcs accuracy \
    --num_generations 8 --max_completion_length 4096 --overlong_filter true --beta 0.0 \
    --chord_sft_dataset AI-MO/NuminaMath-TIR --chord_sft_per_device_train_batch_size 1 \
    --chord_mu_peak 0.9 --chord_mu_valley 0.05 --chord_mu_warmup_steps 0 --chord_mu_decay_steps 200 \
    --chord_enable_phi_function false \
    --use_vllm true --vllm_mode colocate --vllm_gpu_memory_utilization 0.4 --vllm_max_model_len 8192 \
    --sleep_level 1 --offload_optimizer true --offload_model true --deepspeed zero3 \
    --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --num_train_epochs 1 \
    --learning_rate 1e-6 --warmup_ratio 0.05 --save_steps 1000 --save_total_limit 2 \
    --logging_steps 1 --log_completions true --report_to tensorboard swanlab
