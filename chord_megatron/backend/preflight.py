"""What a configuration asks of Megatron-Core and of this machine, checked where nothing is started yet."""

from __future__ import annotations

from chord_megatron.backend.acceleration import choose_acceleration, find_installed
from chord_megatron.backend.optimizer import check_optimizer_here
from chord_megatron.backend.transformer_config import transformer_config
from chord_megatron.config import Config
from chord_megatron.weights.architecture import ModelArchitecture


def check_machine(config: Config, arch: ModelArchitecture) -> None:
    """Raises UserError where Megatron-Core, or this machine, lacks what the configuration asks for."""
    installed = find_installed()
    transformer_config(arch, config.model, config.parallel, choose_acceleration(installed))
    check_optimizer_here(config.optimizer, installed)
