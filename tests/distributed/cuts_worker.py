"""Trains models, or loads them, under one cut, saves and trains on: `cuts_worker.py QUESTIONS.json RESULTS.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from models_worker import as_sample, train_step

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed, shut_down_distributed
from chord_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig


def main(questions: dict[str, Any], results: Path) -> None:
    """Of each case: loss and gradient norm of the two steps after the one that was saved. Rank 0 writes."""
    parallel = ParallelConfig(**questions["parallel"])
    groups = initialize_distributed(parallel, seed=0)
    samples = [as_sample(tokens, temperature=1.0) for tokens in questions["sequences"]]
    answers = {}
    for name, case in questions["cases"].items():
        model = ModelConfig(path=case["path"], dtype="float32")
        optimizer = OptimizerConfig(lr=0.01, use_distributed_optimizer=case["distributed_optimizer"])
        engine = MegatronEngine(model, parallel, optimizer, groups, train_iters=9, keep_reference=False)
        if questions["source"] is None:
            for _ in range(2):
                train_step(engine, samples)
        else:
            engine.load(Path(questions["source"]) / name)
        engine.save(Path(questions["target"]) / name, {})
        answers[name] = [*train_step(engine, samples), *train_step(engine, samples)]
    if groups.rank == 0:
        results.write_text(json.dumps(answers), encoding="utf-8")
    shut_down_distributed()


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
