"""All groups together."""

from __future__ import annotations

from chord_megatron.config.base import Group
from chord_megatron.config.data import DataConfig, RewardsConfig
from chord_megatron.config.model import ModelConfig, ParallelConfig
from chord_megatron.config.objective import ChordConfig, GRPOConfig
from chord_megatron.config.rollout import RolloutConfig
from chord_megatron.config.training import OptimizerConfig, TrackingConfig, TrainConfig


class Config(Group):
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
