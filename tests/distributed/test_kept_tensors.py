"""The planner's tables of what a layer keeps for its backward pass, against autograd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from forked import launch
from kept_tensors_worker import LENGTH
from tiny_families import MODELS, TP_2, write_model

from chord_megatron.config import ParallelConfig
from chord_megatron.planning.activations import Kind, layer_bytes
from chord_megatron.weights.hf_config import read_architecture

pytestmark = pytest.mark.distributed

DENSE = ("qwen2", "qwen3")
# Layout -> processes, keys of parallel, dtype, models; without sequence parallelism latent attention is refused.
EXPERTS = ("qwen3_moe-mixed", "deepseek_v3", "deepseek_v3-plain")
CASES: dict[str, tuple[int, dict[str, Any], str, tuple[str, ...]]] = {
    "float32": (1, {}, "float32", tuple(MODELS)),
    "bfloat16": (1, {}, "bfloat16", ("qwen3", "qwen3_moe")),
    "TP 2": (2, {"tensor_model_parallel_size": 2}, "float32", DENSE),
    "CP 2": (2, {"context_parallel_size": 2}, "float32", (*DENSE, "deepseek_v3")),
    "TP 2 + SP": (2, TP_2, "float32", (*DENSE, *EXPERTS)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_keeps_what_the_planner_says(tmp_path: Path, case: str):
    processes, parallel, dtype, models = CASES[case]
    compare(tmp_path, processes, parallel, dtype, models)


@pytest.mark.parametrize(
    ("modules", "models"),
    [
        (("layernorm",), ("qwen3", *EXPERTS)),
        (("mlp", "moe"), ("qwen3", *EXPERTS)),
        (("layernorm", "mlp", "shared_experts"), ("qwen3", "deepseek_v3")),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_parts_that_are_computed_again_keep_their_input(
    tmp_path: Path, modules: tuple[str, ...], models: tuple[str, ...], dtype: str
):
    compare(tmp_path, 1, {}, dtype, models, modules)


def compare(
    folder: Path,
    processes: int,
    parallel: dict[str, Any],
    dtype: str,
    models: tuple[str, ...],
    recompute: tuple[str, ...] = (),
) -> None:
    for model in models:
        # Several groups on each of two ranks, of several queries each: otherwise the queries are no copy.
        write_model(folder / model, model, num_attention_heads=8, num_key_value_heads=4)
    settings = json.dumps({"parallel": parallel, "dtype": dtype, "recompute": list(recompute) or False})
    worker = Path(__file__).parent / "kept_tensors_worker.py"
    output = launch(worker, settings, *(folder / model for model in models), processes=processes)
    lines = (line.split(" ", 1) for line in output.splitlines() if line.startswith(str(folder)))
    found = {Path(name).name: json.loads(sizes) for name, sizes in lines}
    kind = Kind(
        "local",
        {"float32": 4, "bfloat16": 2}[dtype],
        LENGTH,
        parallel.get("context_parallel_size", 1),
        frozenset(recompute),
    )
    assert found == {model: expected(folder / model, ParallelConfig(**parallel), kind) for model in models}


def expected(model_dir: Path, parallel: ParallelConfig, kind: Kind) -> list[float]:
    arch = read_architecture(model_dir)
    return [layer_bytes(arch, parallel, is_moe=arch.is_moe_layer(layer), kind=kind) for layer in range(arch.num_layers)]
