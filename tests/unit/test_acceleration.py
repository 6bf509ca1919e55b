"""What is chosen from what is installed, for every combination."""

from __future__ import annotations

import tomllib
from itertools import product
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from chord_megatron.backend.acceleration import (
    Acceleration,
    Installed,
    choose_acceleration,
    describe,
    find_installed,
)

# (CUDA, TransformerEngine, Apex's extension): (kind of layers, fused gradient accumulation).
CHOICES = {
    (False, False, False): ("local", False),
    (False, False, True): ("local", False),
    (False, True, False): ("local", False),
    (False, True, True): ("local", False),
    (True, False, False): ("local", False),
    (True, False, True): ("local", True),
    (True, True, False): ("transformer_engine", False),
    (True, True, True): ("transformer_engine", True),
}


def test_every_combination_is_here():
    assert set(CHOICES) == set(product((False, True), repeat=3))


@pytest.mark.parametrize(("facts", "choice"), CHOICES.items())
@pytest.mark.parametrize("adam", ["TransformerEngine", "Apex", "torch"])
@pytest.mark.parametrize("data_parallel_size", [1, 2])
@pytest.mark.parametrize("asked", [None, False, True])
def test_the_choice(facts: tuple[bool, bool, bool], choice: tuple, adam: str, data_parallel_size: int, asked):
    installed = Installed(*facts, adam)
    chosen = choose_acceleration(installed, data_parallel_size=data_parallel_size, overlap_grad_reduce=asked)
    overlaps = data_parallel_size == 2 and (facts[0] if asked is None else asked)
    assert chosen == Acceleration(*choice, overlaps, share_prompts=chosen.transformer_impl == "local")
    assert not choose_acceleration(installed, context_parallel_size=2).share_prompts


def test_the_line_of_a_run():
    bare, full = Installed(False, False, False, "torch"), Installed(True, True, True, "Apex")
    assert describe(choose_acceleration(bare), bare) == (
        "layers: Megatron local (TransformerEngine needs a GPU), Adam: torch, "
        "gradient accumulation: unfused (Apex's kernel needs a GPU), gradient reduction: not overlapped"
    )
    assert describe(choose_acceleration(full, data_parallel_size=2), full) == (
        "layers: TransformerEngine, Adam: Apex, gradient accumulation: fused, gradient reduction: overlapped"
    )
    only_gpu = Installed(True, False, False, "torch")
    assert describe(choose_acceleration(only_gpu), only_gpu) == (
        "layers: Megatron local (TransformerEngine not installed), Adam: torch, "
        "gradient accumulation: unfused (Apex's kernel not installed), gradient reduction: not overlapped"
    )


def test_the_facts_are_megatrons_own():
    from megatron.core.optimizer import USING_PYTORCH_OPTIMIZER  # noqa: TID251

    assert (find_installed().adam == "torch") == USING_PYTORCH_OPTIMIZER


def test_no_dependency_is_pypis_apex():
    """It is an unrelated project; NVIDIA's Apex is on no index."""
    path = Path(__file__).parents[2] / "pyproject.toml"
    project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    names = {Requirement(line).name.lower() for lines in (project["dependencies"], *extras) for line in lines}
    assert "torch" in names and "apex" not in names
