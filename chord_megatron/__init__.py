"""CHORD training on Megatron-Core: GRPO on rollouts and weighted SFT on expert answers in one objective."""

__version__ = "0.1.0"
