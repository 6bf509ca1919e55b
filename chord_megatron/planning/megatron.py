"""Rules of what is Megatron-Core's own, as far as they need neither it nor a GPU; others: backend/preflight.py."""

from __future__ import annotations

from chord_megatron.config import Config
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.system.errors import UserError


def asks_megatron(config: Config) -> bool:
    """Whether backend/preflight.py has anything to check, for which Megatron-Core is imported: some seconds."""
    model, optimizer = config.model, config.optimizer
    return (
        bool(model.transformer_config)
        or (isinstance(model.recompute, list) and "moe_act" in model.recompute)
        or optimizer.use_precision_aware_optimizer
        or optimizer.optimizer_cpu_offload
    )


def check_megatron(config: Config) -> None:
    """Raises UserError."""
    is_drawn, engine = needs_rollouts(config), config.rollout.engine
    is_sampled_here = is_drawn and engine == "megatron"
    is_evaluated_here = config.train.eval_steps is not None and not (is_drawn and engine == "vllm")
    for name in ("fp8", "fp4"):
        if config.model.transformer_config.get(name) and (is_sampled_here or is_evaluated_here):
            raise UserError(
                f"model.transformer_config.{name} multiplies blocks of tokens, and the engine in the trainer decodes "
                "one of each row at a time; sample with rollout.engine=vllm, or train without rollouts and evaluation"
            )
