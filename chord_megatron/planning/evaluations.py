"""Rules of evaluations: of those that a run makes, and of one without a run."""

from __future__ import annotations

from typing import Literal

from chord_megatron.config import ChordConfig, Config, GRPOConfig, OptimizerConfig, RolloutConfig
from chord_megatron.planning.batches import check_lengths
from chord_megatron.planning.layout import check_layout
from chord_megatron.planning.megatron import check_megatron
from chord_megatron.planning.rewards import check_rewards
from chord_megatron.planning.rollouts import KEYS_OF_MODE, check_rollouts
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture

Engine = Literal["megatron", "vllm"]


def check_evaluations(config: Config) -> None:
    """Of a run's own: that what follows from them has them. Raises UserError."""
    train = config.train
    for key in ("early_stopping_patience", "keep_best"):
        if getattr(train, key) and train.eval_steps is None:
            raise UserError(f"train.{key} goes by evaluations; set train.eval_steps, or remove it")
    if train.keep_best and (train.save_steps is None or train.save_steps % (train.eval_steps or 1)):
        raise UserError(
            f"train.keep_best=true compares saved steps that were evaluated; set train.save_steps, now "
            f"{'null' if train.save_steps is None else train.save_steps}, to a multiple of "
            f"train.eval_steps={train.eval_steps}"
        )
    check_generations(train.eval_num_generations, train.eval_temperature)


def check_generations(num_generations: int, temperature: float) -> None:
    """That completions of one prompt can differ. Raises UserError."""
    if num_generations > 1 and temperature == 0:
        raise UserError(
            f"train.eval_num_generations={num_generations} at train.eval_temperature=0 draws the same completion each "
            "time; set a temperature, such as 1.0, or draw one (`chord-megatron evaluate`: --temperature, --k)"
        )


def for_evaluation(config: Config, *, engine: Engine | None, is_greedy_meant: bool) -> Config:
    """The same with nothing of training. engine: None = the configuration's.

    is_greedy_meant: whether somebody asks for temperature 0; else several completions are drawn at rollout.temperature
    where train.eval_temperature is 0, as it is by default.
    """
    train, rollout, temperature = config.train, config.rollout, config.train.eval_temperature
    if train.eval_num_generations > 1 and temperature == 0 and not is_greedy_meant:
        temperature = rollout.temperature
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"dataset": None}),
            "rollout": _drawing_only(rollout, engine),
            "grpo": GRPOConfig(),
            "chord": ChordConfig(),
            "optimizer": OptimizerConfig(),
            "train": train.model_copy(update={"eval_temperature": temperature, "max_tokens_per_micro_batch": None}),
        }
    )


def with_fitting_lengths(config: Config, limit: int) -> tuple[Config, str | None]:
    """The same where lengths that nobody gave fit into what the model reads, in tokens; and what to say of them."""
    data, rollout, said = config.data, config.rollout, []
    is_prompt_given = "max_prompt_length" in data.model_fields_set
    room = limit - data.max_prompt_length if is_prompt_given else limit // 2
    if "max_completion_length" not in rollout.model_fields_set and 0 < room < rollout.max_completion_length:
        rollout = rollout.model_copy(update={"max_completion_length": room})
        said.append(f"rollout.max_completion_length={room}")
    room = limit - rollout.max_completion_length
    if not is_prompt_given and 0 < room < data.max_prompt_length:
        data = data.model_copy(update={"max_prompt_length": room})
        said.append(f"data.max_prompt_length={room}")
    note = f"{' and '.join(said)}, as the model reads {limit} tokens" if said else None
    return config.model_copy(update={"data": data, "rollout": rollout}), note


def check_evaluation(config: Config, arch: ModelArchitecture, world_size: int) -> None:
    """What `for_evaluation` returns, against the model and the number of processes. Raises UserError."""
    check_generations(config.train.eval_num_generations, config.train.eval_temperature)
    check_layout(config, arch, world_size)
    check_megatron(config)
    check_rewards(config)
    check_rollouts(config, arch, world_size)
    check_lengths(config, arch)


def _drawing_only(rollout: RolloutConfig, engine: Engine | None) -> RolloutConfig:
    """Without what is for training, and for another engine. A recording has no completions of other prompts."""
    engine = engine or ("vllm" if rollout.engine == "vllm" else "megatron")
    defaults = RolloutConfig()
    mode = rollout.vllm_mode or "colocate" if engine == "vllm" else None
    foreign = [key for other, keys in KEYS_OF_MODE.items() if other != mode for key in keys]
    training = ["router_replay", "record_to", "replay_from", "max_staleness", "offload_optimizer"]
    unset = {key: getattr(defaults, key) for key in (*foreign, *training)}
    return rollout.model_copy(update={**unset, "engine": engine, "vllm_mode": mode})
