"""The configuration: pydantic models, and YAML with dotted overrides. Rules across keys are in planning/.

Leaves keep the names that Megatron-LM and ms-swift users know. `None` means off. An unknown key is an
error that names the nearest known one.
"""

from chord_megatron.config.data import DataConfig, OnBadRow, PromptFormat, RewardsConfig
from chord_megatron.config.groups import Config
from chord_megatron.config.loading import explain_mistakes, known_keys, load_config, to_yaml
from chord_megatron.config.model import ModelConfig, ParallelConfig
from chord_megatron.config.objective import ChordConfig, GRPOConfig
from chord_megatron.config.rollout import RolloutConfig
from chord_megatron.config.training import MomentDtype, OptimizerConfig, TrackerName, TrackingConfig, TrainConfig

__all__ = [
    "ChordConfig",
    "Config",
    "DataConfig",
    "GRPOConfig",
    "ModelConfig",
    "MomentDtype",
    "OnBadRow",
    "OptimizerConfig",
    "ParallelConfig",
    "PromptFormat",
    "RewardsConfig",
    "RolloutConfig",
    "TrackerName",
    "TrackingConfig",
    "TrainConfig",
    "explain_mistakes",
    "known_keys",
    "load_config",
    "to_yaml",
]
