"""A run whose length is said in epochs, and its warm-up as a share."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from harness import read_metrics, succeeded, train_here

pytestmark = pytest.mark.e2e

EPOCHS = ("train.train_iters=null", "train.num_train_epochs=0.25", "optimizer.lr_warmup_ratio=0.5")


def test_a_quarter_of_an_epoch(config: Path, tmp_path: Path):
    """24 prompts, 2 a step: 3 steps of the quarter, the first 2 of which warm up: lr 1e-3 / 2, then 1e-3."""
    done = succeeded(train_here(config, *EPOCHS))
    assert "3 steps: 0.25 epochs of 24 prompts, 2 a step" in done.stdout
    rates = [line["lr"] for line in read_metrics(tmp_path / "run")]
    assert rates == pytest.approx([0.0, 5e-4, 1e-3])
    written = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert (written["train"]["train_iters"], written["train"]["num_train_epochs"]) == (3, None)
    assert (written["optimizer"]["lr_warmup_iters"], written["optimizer"]["lr_warmup_ratio"]) == (2, None)

    again = succeeded(train_here(config, *EPOCHS))
    assert len(read_metrics(tmp_path / "run")) == 3
    assert "resuming" in again.stdout and "since then" not in again.stdout
