"""Write the tables of docs/scaling.md: what the planner proposes for published models on 8 to 512 GPUs.

    python tools/make_scaling.py [--gpu h100] [--check]

Computed from tests/data/configs and the assumptions of chord_megatron/planning/gpus.py; nothing is run or measured.
--check: exit code 1 where the document holds other tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from chord_megatron.config import Config
from chord_megatron.planning.gpus import Assumptions, Cluster, gpu_named
from chord_megatron.planning.proposals import Proposal, search
from chord_megatron.planning.rollout_time import server_gpus
from chord_megatron.planning.workload import workload
from chord_megatron.system.errors import UserError
from chord_megatron.weights.architecture import ModelArchitecture
from chord_megatron.weights.hf_config import read_architecture

ROOT = Path(__file__).parents[1]
DOCUMENT, CONFIGS = ROOT / "docs" / "scaling.md", ROOT / "tests" / "data" / "configs"
BEGIN, END = "<!-- computed by tools/make_scaling.py -->", "<!-- until here -->"
MODELS = ("Qwen2.5-7B", "Qwen2.5-32B", "Qwen3-235B-A22B", "DeepSeek-V3")
GPUS = (8, 16, 32, 64, 128, 256, 512)
COLUMNS = (
    "GPUs",
    "layout",
    "GB",
    "train, s",
    "bubble",
    "messages",
    "tokens/s/GPU",
    "MFU",
    "scaling",
    "rollout, s",
    "sync, s",
)


def step_of(model: str, arch: ModelArchitecture, cluster: Cluster) -> Config:
    """The step of all tables: 1024 completions and 128 expert rows; vLLM servers on as many GPUs as train."""
    servers = max(1, cluster.gpus // server_gpus_of(model, arch, cluster))
    return Config.model_validate(
        {
            "model": {"path": str(CONFIGS / model)},
            "data": {"dataset": "prompts.jsonl", "max_prompt_length": 1024},
            "rollout": {
                "engine": "vllm",
                "vllm_mode": "server",
                "vllm_servers": [f"http://server-{number}:8000" for number in range(servers)],
                "weight_transfer": "broadcast",
                "weight_transfer_address": "trainer",
                "num_generations": 8,
                "max_completion_length": 4096,
            },
            "chord": {
                "chord_sft_dataset": "experts.jsonl",
                "chord_sft_max_length": 5120,
                "chord_sft_global_batch_size": 128,
                "mu_schedule": "constant",
                "chord_mu_peak": 0.5,
            },
            "train": {"output_dir": "runs/scaling", "global_batch_size": 1024, "train_iters": 100},
        }
    )


def server_gpus_of(model: str, arch: ModelArchitecture, cluster: Cluster) -> int:
    """What a server has: for a model as large as this."""
    settings = {"model": {"path": model}, "train": {"output_dir": "o", "global_batch_size": 8, "train_iters": 1}}
    return server_gpus(Config.model_validate(settings), arch, cluster)


def table(model: str, gpu: str, counts: Sequence[int] = GPUS) -> list[str]:
    """One model's, as lines of Markdown."""
    arch = read_architecture(CONFIGS / model)
    lines = [f"### {model}", "", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    base = None
    for gpus in counts:
        cluster, assumptions = Cluster(gpu_named(gpu), gpus, 8), Assumptions()
        config = step_of(model, arch, cluster)
        try:
            best = search(config, arch, cluster, assumptions).best
        except UserError as error:
            needed = str(error).partition(" needs ")[2].partition(",")[0]
            lines.append(f"| {gpus} | does not fit: the smallest needs {needed} " + "| " * (len(COLUMNS) - 2) + "|")
            continue
        rate = tokens_per_second(best) / gpus
        base = base or rate
        lines.append(row(best, cluster, rate, base))
    return [*lines, ""]


def row(best: Proposal, cluster: Cluster, rate: float, base: float) -> str:
    time = best.step.time
    train = training_seconds(best)
    messages = time.communication + time.gradients
    mfu = best.step.model_flops / (train * cluster.gpus * cluster.gpu.bf16_tflops * 1e12)
    cut = " (layers by cost)" * (best.layout.config.parallel.pipeline_layout == "auto")
    rows = best.layout.config.train.global_batch_size
    grown = f", {rows} completions" * best.changed_rows
    cells = (
        f"{cluster.gpus}",
        best.layout.name + cut + grown,
        f"{best.layout.fullest.peak / 1e9:.0f}",
        f"{train:.1f}",
        f"{time.bubble / train:.0%}",
        f"{messages / train:.0%}",
        f"{rate:,.0f}",
        f"{mfu:.0%}",
        f"{rate / base:.0%}",
        f"{time.rollout:.0f}",
        f"{time.sync:.1f}",
    )
    return f"| {' | '.join(cells)} |"


def training_seconds(best: Proposal) -> float:
    """Without drawing completions and updating the sampler."""
    return best.step.time.total - best.step.time.rollout - best.step.time.sync


def tokens_per_second(best: Proposal) -> float:
    """That are trained on while training."""
    return workload(best.layout.config, best.layout.plan).tokens / training_seconds(best)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gpu", default="h100")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = DOCUMENT.read_text(encoding="utf-8")
    head, _, rest = before.partition(BEGIN)
    tail = rest.partition(END)[2]
    lines = [line for model in MODELS for line in table(model, arguments.gpu)]
    after = f"{head}{BEGIN}\n" + "\n".join(lines) + f"{END}{tail}"
    if arguments.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
