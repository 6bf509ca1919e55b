"""What every end-to-end test starts from: a tiny model, a small task, and a configuration that trains in seconds."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from harness import write_config, write_rows
from tiny_model import write_tiny_model

# `letters` differs between random completions, so that the group advantages are not all 0. The others fail.
REWARDS = """
import itertools, os, time

calls = itertools.count(1)

def letters(prompts, completions, references, **columns):
    if next(calls) == int(os.environ.get("HOLD_AT_CALL", 0)):
        time.sleep(3600)  # a test kills the run here
    return [sum(map(ord, completion)) % 7 / 7 for completion in completions]

def raises(prompts, completions, references, **columns):
    raise RuntimeError("no verdict\\non two lines")

def nan(prompts, completions, references, **columns):
    return [float("nan")] * len(completions)

def graded(completions, solution, difficulty, **columns):
    return difficulty
"""


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As torchrun's workers: sums must not depend on the number of threads."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def assets(make_once: Callable[..., Path]) -> Path:
    """model/, prompts.jsonl, experts.jsonl and rewards.py; not to be written to."""
    return make_once("assets", write_assets)


@pytest.fixture(scope="session")
def vllm_assets(make_once: Callable[..., Path]) -> Path:
    """As `assets`, with a model that vLLM runs on CPU: its attention wants a head dimension of 32."""
    return make_once("vllm_assets", partial(write_assets, head_dim=32))


def write_assets(root: Path, head_dim: int = 8) -> None:
    write_tiny_model(root / "model", head_dim=head_dim)
    write_rows(root / "prompts.jsonl", [{"prompt": f"{n} + {n + 3} =", "answer": f"{2 * n + 3}"} for n in range(24)])
    write_rows(root / "experts.jsonl", [{"prompt": f"{n} + {n} =", "answer": f"it is {2 * n}"} for n in range(16)])
    (root / "rewards.py").write_text(REWARDS, encoding="utf-8")


@pytest.fixture
def config(assets: Path, tmp_path: Path) -> Path:
    """A configuration whose run goes to tmp_path/run."""
    return write_config(assets, tmp_path)


@pytest.fixture
def eventful(assets: Path, tmp_path: Path) -> tuple[str, ...]:
    """Overrides: an evaluation and a save each step, and a reward that touches the file `scored`."""
    file = tmp_path / "noted.py"
    source = (assets / "rewards.py").read_text(encoding="utf-8")
    source += f"""
def noted(prompts, completions, references, **columns):
    open({str(tmp_path / "scored")!r}, "w").close()
    return letters(prompts, completions, references)
"""
    file.write_text(source, encoding="utf-8")
    return (
        f"rewards.reward_funcs=['{file}:noted']",
        f"data.eval_dataset={assets / 'prompts.jsonl'}",
        "data.num_eval_prompts=2",
        "train.eval_steps=1",
        "train.save_steps=1",
        "train.save_total_limit=2",
    )
