"""The optimizer's states on the host, and in fewer bits, on one NVIDIA GPU with TransformerEngine."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_families import VOCAB_SIZE, make_model

from chord_megatron.algorithm.objective import Objective, chord_loss
from chord_megatron.algorithm.policy_losses import clipped_policy_loss
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed, shut_down_distributed
from chord_megatron.batching.packing import build_global_batch
from chord_megatron.config import Config, ModelConfig, OptimizerConfig, ParallelConfig
from chord_megatron.planning.memory import Parameters, optimizer_bytes
from chord_megatron.types import TrainingSample

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and find_spec("transformer_engine")), reason="needs a GPU and TransformerEngine"
    ),
]

STEPS = 3
WAYS: dict[str, dict[str, Any]] = {
    "on the host": {"optimizer_cpu_offload": True},
    "half on the host": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
    "float32": {"use_precision_aware_optimizer": True},
    "moments in bfloat16": {
        "use_precision_aware_optimizer": True,
        "exp_avg_dtype": "bfloat16",
        "exp_avg_sq_dtype": "bfloat16",
    },
    "everything small": {
        "use_precision_aware_optimizer": True,
        "main_grads_dtype": "bfloat16",
        "main_params_dtype": "float16",
        "exp_avg_dtype": "float16",
        "exp_avg_sq_dtype": "float16",
    },
}
ROUNDING = {"on the host": 1e-3, "half on the host": 1e-3, "float32": 1e-3}  # of the loss; else of fewer bits
OF_FEWER_BITS = 0.05


@pytest.fixture(scope="module")
def groups() -> Iterator[ParallelGroups]:
    yield initialize_distributed(ParallelConfig(), seed=0)
    shut_down_distributed()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 million parameters, most of them in large tensors."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 16, "num_hidden_layers": 2}
    make_model("llama", **sizes).bfloat16().save_pretrained(folder)
    return folder


def build(model_dir: Path, groups: ParallelGroups, **settings: Any) -> MegatronEngine:
    optimizer = OptimizerConfig(lr=1e-4, use_distributed_optimizer=True, **settings)
    model = ModelConfig(path=str(model_dir))
    return MegatronEngine(model, ParallelConfig(), optimizer, groups, train_iters=STEPS + 2, keep_reference=False)


def losses(engine: MegatronEngine, steps: int) -> list[float]:
    tokens = torch.randint(0, VOCAB_SIZE, (32,), generator=torch.Generator().manual_seed(0))
    sample = TrainingSample(tokens, torch.ones(32, dtype=torch.bool), is_expert=True, temperature=1.0)
    batch = build_global_batch([sample], engine.batch_layout, micro_batch_size=1)
    objective = Objective(partial(clipped_policy_loss, epsilon=0.2, epsilon_high=0.2))
    found = []
    for _ in range(steps):
        totals = engine.forward_backward(batch, partial(chord_loss, objective=objective, mu=1.0))
        assert engine.optimizer_step().stepped
        found.append(totals.sums["loss_expert"])
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_steps_are_those_of_a_plain_optimizer_and_take_less_memory(
    way: str, model_dir: Path, groups: ParallelGroups
) -> None:
    expected = losses(build(model_dir, groups), STEPS)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    engine = build(model_dir, groups, **WAYS[way])
    assert losses(engine, STEPS) == pytest.approx(expected, rel=ROUNDING.get(way, OF_FEWER_BITS))
    count = sum(parameter.numel() for chunk in engine._chunks for parameter in chunk.parameters())
    config = Config.model_validate(
        {
            "model": {"path": str(model_dir)},
            "optimizer": {"use_distributed_optimizer": True, **WAYS[way]},
            "train": {"output_dir": "out", "global_batch_size": 8, "train_iters": 1},
        }
    )
    gradient = 2 if WAYS[way].get("main_grads_dtype") else 4
    wanted = (2 + gradient) * count + optimizer_bytes(config, Parameters(count, 0), 1, 1).device
    assert torch.cuda.memory_allocated() - before == pytest.approx(wanted, rel=0.1)


@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_run_goes_on(way: str, model_dir: Path, groups: ParallelGroups, tmp_path: Path) -> None:
    """With the numbers of the undisturbed one, and by a plain optimizer to rounding."""
    engine = build(model_dir, groups, **WAYS[way])
    losses(engine, STEPS)
    engine.save(tmp_path / "checkpoint", {})
    expected = losses(engine, 2)
    resumed = build(model_dir, groups, **WAYS[way])
    resumed.load(tmp_path / "checkpoint")
    assert losses(resumed, 2) == pytest.approx(expected, rel=1e-5)
    plain = build(model_dir, groups)
    plain.load(tmp_path / "checkpoint")
    assert losses(plain, 2) == pytest.approx(expected, rel=ROUNDING.get(way, OF_FEWER_BITS))
