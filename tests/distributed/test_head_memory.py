"""The engine never holds the logits of a batch."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import launch
from tiny_families import make_model

pytestmark = pytest.mark.distributed

NUM_TOKENS, VOCAB_SIZE = 2048, 150_000  # head_memory_worker.py; 1.2 GB of float32 logits


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_a_step_takes_a_fraction_of_the_memory_of_its_logits(
    tmp_path: Path, measure: Callable[[str, float], None], tied: bool
):
    make_model(
        "llama", tied=tied, vocab_size=VOCAB_SIZE, hidden_size=16, max_position_embeddings=NUM_TOKENS
    ).save_pretrained(tmp_path)
    output = launch(Path(__file__).parent / "head_memory_worker.py", tmp_path, processes=1)
    (extra,) = re.findall(r"extra bytes: (\d+)", output)
    logits = NUM_TOKENS * VOCAB_SIZE * 4
    measure("memory of a step and of log-probs, as a share of its logits", int(extra) / logits)
    assert int(extra) < logits / 8
