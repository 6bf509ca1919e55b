"""Steps, what becomes of them, and what is written down."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from chord_megatron.config.base import Group
from chord_megatron.config_types import (
    LARGEST_INTEGER,
    NonNegative,
    NonNegativeNumber,
    PathName,
    Port,
    Positive,
    PositiveNumber,
    TemperatureOrGreedy,
    Text,
)

TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow"]
MomentDtype = Literal["float32", "bfloat16", "float16", "fp8"]


class OptimizerConfig(Group):
    lr: PositiveNumber = 1e-6
    """the learning rate behind the warm-up"""
    min_lr: NonNegativeNumber = 0.0
    """where the decay ends"""
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    """or `linear`, `cosine`, towards `min_lr` after the last step"""
    lr_warmup_iters: NonNegative = 0
    """linear, from 0"""
    lr_warmup_ratio: float | None = Field(default=None, ge=0, lt=1)
    """in place of it: a share of the run's steps, rounded up"""
    weight_decay: NonNegativeNumber = 0.0
    """not on norms and biases; below 1 / lr"""
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    """of the moving average of gradients"""
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    """of the moving average of their squares"""
    adam_eps: float = Field(default=1e-8, ge=1e-30, le=1)
    """added to the root of the second; float32 has to hold it"""
    clip_grad: NonNegativeNumber = 1.0
    """global norm; 0 = no clipping"""
    use_distributed_optimizer: bool = False
    """state sharded over the data-parallel (x context-parallel) ranks"""
    use_precision_aware_optimizer: bool = False
    """TransformerEngine's Adam with states in fewer bits; with `use_distributed_optimizer` and `model.dtype: bfloat16`
    """
    main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
    """with `use_precision_aware_optimizer`: gradient sums, also in `bfloat16`"""
    main_params_dtype: Literal["float32", "float16"] = "float32"
    """with it: the copy of the weights, also in `float16`"""
    exp_avg_dtype: MomentDtype = "float32"
    """with it: the first moment, also in `bfloat16`, `float16`, `fp8` ([what each takes](sizing.md#what-a-rank-holds))
    """
    exp_avg_sq_dtype: MomentDtype = "float32"
    """with it: the second moment, alike"""
    optimizer_cpu_offload: bool = False
    """the copy of the weights and the moments on the host, which takes their step (Megatron-Core's
    HybridDeviceOptimizer); with `use_distributed_optimizer`, bfloat16, a GPU and TransformerEngine
    """
    optimizer_offload_fraction: float = Field(default=1.0, gt=0, le=1)
    """the share of the parameters whose states `optimizer_cpu_offload` puts on the host"""
    overlap_grad_reduce: bool | None = None
    """sum gradients over the data-parallel (x context-parallel) ranks while others are still computed; `null` = on
    GPUs; equal to rounding
    """


class TrainConfig(Group):
    output_dir: PathName
    """the run directory; the same command on it resumes"""
    micro_batch_size: Positive = 1
    """sequences packed into a micro-batch"""
    global_batch_size: Positive | None = None
    """completions of an optimizer step, required unless mu is 1 throughout; a multiple of `num_generations` and,
    without a budget of tokens, of micro-batch size x DP
    """
    max_tokens_per_micro_batch: Positive | None = None
    """a budget of tokens in place of `micro_batch_size`: rows are spread over ranks and micro-batches by what they
    cost, as many micro-batches on each rank; the loss is the same. At least the longest row; `micro_batch_size`
    stays what `chord.semantics` and `chord_sft_per_device_train_batch_size` count by
    """
    packing_order: Literal["arrival", "shuffled"] = "arrival"
    """`shuffled` spreads long rows over ranks and micro-batches; the loss is the same"""
    skip_idle_rows: bool = True
    """rows whose loss has no gradient are not run: completions without advantage (equal rewards in a group) and
    filtered ones, unless a KL penalty, an entropy bonus or `grpo.policy_loss` needs them. Denominators stay those
    of all rows; metrics of the policy are then means over the others
    """
    share_prompts: bool = True
    """a prompt that several rows of a micro-batch begin with is read once, and attended to by all of them; not under
    TransformerEngine's attention (the first lines of a run say so)
    """
    train_iters: Positive
    """optimizer steps"""
    num_train_epochs: PositiveNumber | None = None
    """in place of it: passes over the usable prompts (over the experts where mu is 1 throughout), down to whole
    generation batches, at least one. `validate` reads the data and says how many steps that is, as do the first
    lines of a run; its `config.yaml` holds them
    """
    seed: NonNegative = 0
    """of data order and sampling"""
    eval_steps: Positive | None = None
    """evaluate before the first step, every N steps and at the end"""
    eval_temperature: TemperatureOrGreedy = 0.0
    """greedy; or as `rollout.temperature`"""
    eval_num_generations: Positive = 1
    """completions of each held-out prompt, whose mean reward is the better known; above 1 it needs `eval_temperature`
    above 0
    """
    max_loss_tokens: Positive | None = None
    """end the run, with a save, after the generation batch by which so many tokens have had a loss
    (`num_rollout_tokens` and `num_expert_tokens`, summed; completions without an advantage count as well): a budget
    that is the same for methods whose steps are not; learning rates decay towards `train_iters` all the same
    """
    early_stopping_patience: Positive | None = None
    """end the run, with a save, after N evaluations in a row whose `eval_reward_mean` is not above the best before
    them
    """
    save_steps: Positive | None = None
    """checkpoint and Hugging Face export every N steps; always after the last"""
    save_total_limit: Positive | None = None
    """keep the newest N of both"""
    keep_best: bool = False
    """beside those keep the saved step with the best `eval_reward_mean`, which `checkpoints/best` names; `save_steps`
    must be a multiple of `eval_steps`
    """
    async_save: bool = False
    """training goes on while a checkpoint's tensors are written, from a copy on the host ([what it holds up and
    takes](sizing.md#saving))
    """
    save_on_signal: bool = False
    """at SIGTERM or SIGINT finish the step and save a checkpoint before ending; otherwise at once
    ([preemption](failures.md#preemption))
    """
    max_skipped_steps: Positive = 5
    """stop after so many steps in a row with a non-finite loss or gradient norm"""

    @model_validator(mode="before")
    @classmethod
    def _iterations_until_counted(cls, values: Any) -> Any:
        """A run of epochs is as long as any until its data is read."""
        is_open = isinstance(values, dict) and values.get("num_train_epochs") is not None
        return {**values, "train_iters": LARGEST_INTEGER} if is_open and values.get("train_iters") is None else values


class TrackingConfig(Group):
    report_to: list[TrackerName] = ["tensorboard"]
    """beside `metrics.jsonl`: of `tensorboard`, `wandb`, `swanlab`, `mlflow` ([trackers](trackers.md)); `[]` = nothing
    more
    """
    project: Text = "chord_megatron"
    """in trackers; of MLflow the experiment"""
    run_name: Text | None = None
    """in trackers; `null` = the name of `train.output_dir`"""
    group: Text | None = None
    """in trackers: runs that belong together"""
    tags: list[Text] = []
    """in trackers"""
    entity: Text | None = None
    """W&B: team or user; SwanLab: workspace; `null` = as you are logged in"""
    uri: Text | None = None
    """MLflow: server or store, without a password; `null` = `MLFLOW_TRACKING_URI`"""
    prometheus_port: Port | None = None
    """rank 0 answers Prometheus there with the last step's metrics ([Prometheus](trackers.md#prometheus)); `null` = it
    does not listen
    """
    prometheus_host: Text = "127.0.0.1"
    """the address that it listens at"""
    log_completions: NonNegative = 8
    """completions of each step in `completions.jsonl`, and in trackers: 0 keeps prompts out of them"""
    diagnose_steps: Positive | None = None
    """every N steps the gradient norm of each stream and their cosine, by two more backward passes ([what they
    cost](metrics.md#the-two-gradients)); `null` = never
    """
