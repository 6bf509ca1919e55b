"""The configuration: pydantic models, and YAML with dotted overrides. Rules across fields are in planning/.

Leaves keep the names that Megatron-LM and ms-swift users know. `None` means off. An unknown key is an
error that names the nearest known one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from chord_megatron.algorithm.advantages import AdvantageEstimator, Scale
from chord_megatron.algorithm.importance import ImportanceSamplingMode
from chord_megatron.algorithm.policy_losses import ImportanceSamplingLevel, KLEstimator, LossType
from chord_megatron.algorithm.presets import Preset
from chord_megatron.config_names import OTHER_NAMES
from chord_megatron.config_types import (
    LARGEST_INTEGER,
    LARGEST_NUMBER,
    DataFormat,
    DataSet,
    Fraction,
    Gigabytes,
    Minutes,
    NonNegative,
    NonNegativeNumber,
    Number,
    PathName,
    Pattern,
    PipelineLayout,
    Port,
    Positive,
    PositiveNumber,
    Recompute,
    Seconds,
    Sharpness,
    Temperature,
    TemperatureOrGreedy,
    Text,
    is_text,
)
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import did_you_mean, shown
from chord_megatron.system.yaml_text import YamlError, read_yaml, read_yaml_value, write_yaml

PromptFormat = Literal["chat", "text"]
OnBadRow = Literal["stop", "skip"]
TrackerName = Literal["tensorboard", "wandb", "swanlab", "mlflow"]
MomentDtype = Literal["float32", "bfloat16", "float16", "fp8"]


class _Group(BaseModel):
    # strict: no text for a number, no true for 1. What YAML says is what is meant.
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


class ModelConfig(_Group):
    path: PathName  # config.json and tokenizer, with safetensors or a Megatron checkpoint
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    # Activations that the backward pass computes again: true or full = whole layers; or parts of each layer.
    recompute: Recompute = False
    recompute_method: Literal["uniform", "block"] | None = None  # of whole layers; None = uniform
    recompute_num_layers: Positive | None = None  # uniform: at a time; block: of a stage; None = 1
    # Fields of Megatron-Core's TransformerConfig, as they stand: backend/transformer_options.py says which.
    transformer_config: dict[str, Any] = {}
    export_bucket_megabytes: Positive = 512  # full weights gathered at a time, for saving and for rollout engines
    trust_remote_code: bool = False  # passed to the tokenizer only; models never run foreign code

    @property
    def recomputes_layers(self) -> bool:
        """Whether whole layers are computed again."""
        return self.recompute is True or self.recompute == "full"


class ParallelConfig(_Group):
    tensor_model_parallel_size: Positive = 1
    pipeline_model_parallel_size: Positive = 1
    virtual_pipeline_model_parallel_size: Positive | None = None
    # Layers of each stage, under VPP of each virtual stage, in the order of the layers; auto = by what they cost;
    # None = the same for all, where that does not come out even as auto.
    pipeline_layout: PipelineLayout = None
    # Of a stage's chunks together; the other stages share the rest evenly.
    num_layers_in_first_pipeline_stage: Positive | None = None
    num_layers_in_last_pipeline_stage: Positive | None = None
    sequence_parallel: bool = False
    context_parallel_size: Positive = 1  # splits each sequence
    expert_model_parallel_size: Positive = 1  # splits each layer's experts over TP x CP x DP ranks
    distributed_timeout_minutes: Minutes = 30.0  # how long a rank waits for another


class DataConfig(_Group):
    # A file, folder, glob or `datasets` name, as "org/name:subset" (docs/data.md); or several, which come in the ratio
    # of their weights: [a.jsonl, {path: b.parquet, weight: 2.0}]. None = no prompts (mu must be 1).
    dataset: DataSet | None = None
    dataset_split: Text = "train"  # for a `datasets` name
    eval_dataset: PathName | None = None
    eval_dataset_split: Text = "test"
    num_eval_prompts: Positive | None = None  # the first N; None = all
    format: DataFormat = "auto"  # whose rows these are; auto recognises each row, and says what it was taken for
    max_rows: Positive | None = None  # of each source of data.dataset the first N; None = all
    prompt_column: Text | None = None  # text, or chat messages; "a.b" leads into an object; None = the format's
    reference_column: Text | None = None
    reference_pattern: Pattern | None = None  # a regular expression; group 1 of its match is the reference
    prompt_format: PromptFormat = "chat"
    system_prompt: Annotated[str, AfterValidator(is_text)] | None = None
    chat_template_kwargs: dict[str, Any] = {}  # variables of the template, such as {enable_thinking: false}
    max_prompt_length: Positive = 1024
    on_bad_row: OnBadRow = "stop"  # of all data sets; skipped rows are counted by reason


class RewardsConfig(_Group):
    reward_funcs: list[Text] = Field(default=["accuracy"], min_length=1)  # names, or path.py:function
    reward_weights: list[Number] | None = None  # None = 1 each
    timeout_seconds: Seconds = 60.0  # of one call of a user's function
    memory_limit_gb: Gigabytes | None = None  # address space of each process of a user's function
    environment: list[Text] = []  # variables that users' functions see beside those that every program needs
    soft_max_length: Positive | None = None  # soft_overlong: tokens; None = rollout.max_completion_length
    soft_cache_length: Positive | None = None  # soft_overlong: how many tokens before that its punishment begins
    # The mark that `accuracy` wants in a completion: \boxed{}, a "####" line, <answer> tags; any = also without one.
    answer_format: Literal["boxed", "hash", "tag", "any"] = "any"
    on_error: Literal["stop", "leave_out"] = "stop"  # of a completion for which a function returns None or NaN


class RolloutConfig(_Group):
    engine: Literal["megatron", "replay", "vllm"] = "megatron"
    num_generations: Positive = 8
    temperature: Temperature = 1.0
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: NonNegative = 0  # 0 = all
    max_completion_length: Positive = 256
    # None = the end tokens of template, tokenizer and model.
    stop_token_ids: list[NonNegative] | None = Field(default=None, min_length=1)
    max_batch_size: Positive = 256  # completions decoded at once per data-parallel rank
    record_to: PathName | None = None  # jsonl of all rollouts, readable by the replay engine
    replay_from: PathName | None = None
    # Of models with experts: a rollout's update has the experts that it had when the trainer first scored it, or when
    # the sampler drew it; None = those that the routers choose then.
    router_replay: Literal["trainer", "sampler"] | None = None
    vllm_mode: Literal["colocate", "server"] | None = None  # in the trainer's processes, or in servers of its own
    vllm_tensor_parallel_size: Positive = 1  # colocate
    vllm_gpu_memory_utilization: float = Field(default=0.4, gt=0, le=1)  # colocate: share of each GPU's memory
    vllm_enforce_eager: bool = False  # colocate: no CUDA graphs
    # colocate: 1 keeps the sampler's weights on the host while training, 2 drops them
    sleep_level: Literal[0, 1, 2] = 0
    offload_optimizer: bool = False  # colocate: optimizer state and gradients to the host while generating
    offload_model: bool = False  # colocate: the training weights to the host while generating
    vllm_servers: list[Text] | None = None  # server: http://host:port of each
    vllm_server_timeout: Seconds = 600.0  # server: seconds for a completion, and to come back
    weight_transfer: Literal["files", "broadcast"] = "files"  # server: broadcast = NCCL between GPUs, else gloo
    weight_transfer_dir: PathName = "/dev/shm"  # files: memory on one node; across nodes a shared directory
    weight_transfer_address: Text = "127.0.0.1"  # broadcast: rank 0's, as the servers reach it
    max_staleness: Literal[0, 1] = 0  # server: 1 draws the next batch while training on this one
    consistency_threshold: PositiveNumber | None = 0.05  # vllm: mean |log-prob difference| of the probes
    consistency_action: Literal["stop", "warn"] = "stop"


class GRPOConfig(_Group):
    loss_type: LossType = "dapo"  # the surrogate and its mean: algorithm/policy_losses.py, LOSS_TYPES
    policy_loss: PathName | None = None  # path.py:function in place of the surrogate
    importance_sampling_level: ImportanceSamplingLevel = "token"  # of the ratio
    epsilon: float = Field(default=0.2, ge=0, lt=1)
    epsilon_high: NonNegativeNumber | None = None  # None = epsilon; cispo: the cap itself
    delta: float | None = Field(default=None, gt=1, le=LARGEST_NUMBER)  # bounds the ratio where the clip leaves it
    tau_pos: Sharpness = 1.0  # sapo
    tau_neg: Sharpness = 1.05
    vespo_k_pos: float = Field(default=2.0, ge=0, le=10)
    vespo_lambda_pos: float = Field(default=3.0, ge=0.1, le=10)
    vespo_k_neg: float = Field(default=3.0, ge=0, le=10)
    vespo_lambda_neg: float = Field(default=2.0, ge=0.1, le=10)
    off_policy_sequence_mask_delta: NonNegativeNumber | None = None  # nats a token
    entropy_coef: NonNegativeNumber = 0.0  # of the mean entropy, which is taken from the loss
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)  # the share of tokens that have a policy loss
    beta: NonNegativeNumber = 0.0  # KL coefficient against the frozen initial model; 0 = no reference
    kl_estimator: KLEstimator = "k3"
    kl_in_reward: bool = False  # the penalty is taken from the rewards, not added to the loss
    advantage_estimator: AdvantageEstimator = "grpo"
    # What advantages are divided by; None = what is usual with the estimator.
    scale_rewards: Scale | None = None
    overlong_filter: bool = False  # completions without an end token have no loss
    # Whether those still count in the denominators; None = as chord.semantics.
    filtered_count: Literal["drop", "keep"] | None = None
    old_log_probs: Literal["trainer", "sampler"] = "trainer"  # whose are those of the clipped ratio
    steps_per_generation: Positive = 1
    num_iterations: Positive = 1
    rollout_importance_sampling_mode: ImportanceSamplingMode | None = None  # weights against the sampler's log-probs
    # Upper bound of a weight, or of its ratio.
    rollout_importance_sampling_threshold: float = Field(default=2.0, gt=1, le=LARGEST_NUMBER)


class ChordConfig(_Group):
    semantics: Preset = "paper"  # whose means, step base and temperatures
    chord_sft_dataset: DataSet | None = None  # as data.dataset; None = no expert stream (mu must be 0)
    chord_sft_dataset_split: Text = "train"
    chord_sft_format: DataFormat = "auto"  # as data.format
    chord_sft_max_rows: Positive | None = None  # of each source the first N; None = all
    chord_sft_prompt_column: Text | None = None  # None = that of the format
    chord_sft_answer_column: Text | None = None
    chord_sft_max_length: Positive | None = None  # prompt + answer; None = what the model reads
    chord_sft_global_batch_size: Positive | None = None  # expert rows per optimizer step
    chord_sft_per_device_train_batch_size: Positive | None = None  # ms-swift: x DP x gradient accumulation
    # reward and gradient_ratio are closed loops within [chord_mu_valley, chord_mu_peak].
    mu_schedule: Literal["cosine", "linear", "constant", "reward", "gradient_ratio"] = "cosine"
    mu_target: Number | None = None  # closed loops: a mean reward; the expert stream's share of the gradient
    mu_start: Fraction | None = None  # closed loops: mu before the first measurement; None = chord_mu_peak
    mu_smoothing: float = Field(default=0.9, ge=0, lt=1)  # closed loops: what the moving average keeps at each value
    mu_update_steps: Positive = 10  # gradient_ratio: measure every N steps, by two more backward passes
    chord_mu_peak: Fraction = 0.5
    chord_mu_valley: Fraction = 0.05
    chord_mu_warmup_steps: NonNegative = 0
    chord_mu_decay_steps: NonNegative = 0
    chord_enable_phi_function: bool = False  # ms-swift's spelling of expert_weight: phi
    # uniform, phi, probability, luffy, entropy, or path.py:function; None = uniform, or what the key above says.
    expert_weight: Text | None = None
    expert_weight_cutoff: float | None = Field(default=None, gt=0, lt=1)  # phi: tokens of p above it are not learnt
    luffy_gamma: PositiveNumber = 0.1


class OptimizerConfig(_Group):
    lr: PositiveNumber = 1e-6
    min_lr: NonNegativeNumber = 0.0
    lr_decay_style: Literal["constant", "linear", "cosine"] = "constant"
    lr_warmup_iters: NonNegative = 0
    lr_warmup_ratio: float | None = Field(default=None, ge=0, lt=1)  # in place of lr_warmup_iters: of train_iters
    weight_decay: NonNegativeNumber = 0.0
    adam_beta1: float = Field(default=0.9, ge=0, lt=1)
    adam_beta2: float = Field(default=0.95, ge=0, lt=1)
    adam_eps: float = Field(default=1e-8, ge=1e-30, le=1)  # float32 has to hold it: without it, 0 / 0
    clip_grad: NonNegativeNumber = 1.0  # 0 = no clipping
    use_distributed_optimizer: bool = False
    # As in Megatron-LM; gradient sums, the copy of the weights and Adam's moments in fewer bits. TransformerEngine's.
    use_precision_aware_optimizer: bool = False
    main_grads_dtype: Literal["float32", "bfloat16"] = "float32"
    main_params_dtype: Literal["float32", "float16"] = "float32"
    exp_avg_dtype: MomentDtype = "float32"
    exp_avg_sq_dtype: MomentDtype = "float32"
    optimizer_cpu_offload: bool = False  # states on the host, which computes their steps
    optimizer_offload_fraction: float = Field(default=1.0, gt=0, le=1)  # of the parameters
    overlap_grad_reduce: bool | None = None  # sum gradients while others are computed; None = on GPUs


class TrainConfig(_Group):
    output_dir: PathName
    micro_batch_size: Positive = 1  # sequences packed into one micro-batch
    global_batch_size: Positive | None = None  # completions per optimizer step; None where mu is 1 throughout
    # In place of micro_batch_size: rows are spread over ranks and micro-batches by their cost; the same loss.
    max_tokens_per_micro_batch: Positive | None = None
    packing_order: Literal["arrival", "shuffled"] = "arrival"  # shuffled spreads long rows over ranks; same loss
    skip_idle_rows: bool = True  # rows whose loss has no gradient are not run
    share_prompts: bool = True  # the prompt of several rows of a micro-batch is read once, where the attention can
    train_iters: Positive
    # In place of train_iters: passes over the prompts, over the experts at mu = 1; counted where the data is read.
    num_train_epochs: PositiveNumber | None = None
    seed: NonNegative = 0
    eval_steps: Positive | None = None
    eval_temperature: TemperatureOrGreedy = 0.0  # 0 = greedy
    eval_num_generations: Positive = 1  # completions of each held-out prompt
    early_stopping_patience: Positive | None = None  # evaluations in a row that are no better than the best before
    save_steps: Positive | None = None  # None = only after the last step
    save_total_limit: Positive | None = None
    keep_best: bool = False  # beside those: the saved step with the best eval_reward_mean
    async_save: bool = False  # a checkpoint's files are written while training goes on
    save_on_signal: bool = False  # SIGTERM, SIGINT: finish the step and save a checkpoint first
    max_skipped_steps: Positive = 5  # abort after that many non-finite steps in a row

    @model_validator(mode="before")
    @classmethod
    def _iterations_until_counted(cls, values: Any) -> Any:
        """A run of epochs is as long as any until its data is read."""
        is_open = isinstance(values, dict) and values.get("num_train_epochs") is not None
        return {**values, "train_iters": LARGEST_INTEGER} if is_open and values.get("train_iters") is None else values


class TrackingConfig(_Group):
    report_to: list[TrackerName] = ["tensorboard"]
    project: Text = "chord_megatron"  # of trackers, as the next ones; mlflow: the experiment
    run_name: Text | None = None  # None = the name of train.output_dir
    group: Text | None = None
    tags: list[Text] = []
    entity: Text | None = None  # wandb: team or user; swanlab: workspace; None = as you are logged in
    uri: Text | None = None  # mlflow: server or store; None = MLFLOW_TRACKING_URI
    prometheus_port: Port | None = None  # where rank 0 tells Prometheus the last step's metrics
    prometheus_host: Text = "127.0.0.1"  # the address that it listens at: as it is, this machine's own
    log_completions: NonNegative = 8  # completions per step in completions.jsonl, and in trackers
    # Gradient norm of each stream and their cosine every N steps, by two more backward passes; None = never.
    diagnose_steps: Positive | None = None


class Config(_Group):
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig = DataConfig()
    rewards: RewardsConfig = RewardsConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GRPOConfig = GRPOConfig()
    chord: ChordConfig = ChordConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig
    tracking: TrackingConfig = TrackingConfig()


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read YAML, apply `group.key=value` overrides (values as of `read_yaml_value`), and check every field.

    Relative paths stay relative to the working directory. Raises UserError.
    """
    try:
        raw = read_yaml(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise UserError(f"cannot read the configuration {path}: {error.strerror}") from None
    except ValueError as error:  # of YAML, of UTF-8, or of a path with NUL
        raise UserError(f"{path} is not valid YAML: {error}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold a mapping of groups (model, data, train, ...), not {type(raw).__name__}")
    for override in overrides or []:
        _apply_override(raw, override)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise UserError(explain_mistakes(error)) from None


def explain_mistakes(error: ValidationError) -> str:
    """What is wrong with a configuration, in one sentence."""
    mistakes = [_explain(item) for item in error.errors()]
    more = f"; and {len(mistakes) - _MOST_MISTAKES} more" if len(mistakes) > _MOST_MISTAKES else ""
    return "; ".join(mistakes[:_MOST_MISTAKES]) + more


def _apply_override(raw: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    place = f"override {shown(override)}"
    if not equals or not key:
        raise UserError(f"{place} must look like group.key=value")
    if key in Config.model_fields:
        raise UserError(f"{place}: {key!r} is a group; set one of its keys, as in {key}.KEY=value")
    *groups, leaf = key.split(".")
    target = raw
    for group in groups:
        child = target.setdefault(group, {})
        if child is None:
            child = target[group] = {}
        if not isinstance(child, dict):
            raise UserError(f"{place}: {group!r} is a value, not a group")
        target = child
    try:
        target[leaf] = read_yaml_value(value)
    except YamlError:
        raise UserError(f"{place}: the value is not valid YAML; put text in quotes") from None


_MOST_MISTAKES = 5  # in one sentence
_REMEDIES = {
    "bool_type": "must be true or false",
    "dict_type": "must be a group of keys",
    "float_type": "must be a number, without quotes",
    "int_type": "must be an integer, without quotes",
    "list_type": "must be a list, such as [a, b]",
    "model_type": "must be a group of keys",
    "string_too_short": "must not be empty",
    "string_type": "must be text; put it in quotes",
    "too_short": "must not be empty",
}
_BOUNDS = {  # pydantic's name and ours
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}


def _explain(error: Any) -> str:
    """One pydantic error as a sentence with the dotted key."""
    parts = [part for part in error["loc"] if part not in ("<path>", "<source>", "<list>")]  # the forms of a data set
    location = [shown(part)[1:-1] if isinstance(part, str) else str(part) for part in parts]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown configuration key {name!r}{_nearest(location)}"
    if error["type"] == "missing":
        return f"configuration key {name!r} is required"
    remedy = _REMEDIES.get(error["type"])
    if bound := _BOUNDS.get(error["type"]):
        remedy = f"must be {bound[1]} {error['ctx'][bound[0]]:.10g}"
    remedy = remedy or error["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if bound and name in ("optimizer.lr", "train.train_iters") and error["input"] == 0:
        remedy += "; `chord-megatron evaluate` draws and scores completions without training"
    return f"{name}={shown(error['input'])}: {remedy}"


def _nearest(location: list[str]) -> str:
    known = known_keys()
    same_leaf = [key for key in known if key.split(".")[-1] == location[-1]]  # in the wrong group, or in none
    wanted = same_leaf[0] if same_leaf else OTHER_NAMES.get(location[-1], ".".join(location))
    return did_you_mean(wanted, known) or f"; known groups are {', '.join(Config.model_fields)}"


def known_keys() -> list[str]:
    """Every group and dotted leaf of the configuration."""
    keys: list[str] = []
    for group, group_field in Config.model_fields.items():
        keys.append(group)
        group_type: Any = group_field.annotation
        keys.extend(f"{group}.{leaf}" for leaf in group_type.model_fields)
    return keys


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that `load_config` reads back."""
    return write_yaml(config.model_dump())
