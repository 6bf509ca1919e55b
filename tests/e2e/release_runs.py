"""Short runs that are recorded with one release of megatron-core and resumed with another.

`python tests/e2e/release_runs.py` records them with the installed release below tests/data/releases: the checkpoint of
their second step and the metrics of all four. test_other_releases.py resumes every recording there is.
"""

from __future__ import annotations

import shutil
import sys
import tarfile
import tempfile
from pathlib import Path

from harness import finish, start, succeeded, write_config, write_rows
from tiny_model import write_tiny_model

from chord_megatron.system.versions import installed_version

RECORDINGS = Path(__file__).parents[1] / "data" / "releases"
REWARD = (Path(__file__).parents[1] / "distributed" / "hash_reward.py").resolve()
RESUMED_STEP, STEPS = 2, 4
SHARDED = "optimizer.use_distributed_optimizer=true"
# name -> (whether the model has experts, overrides, processes)
RUNS: dict[str, tuple[bool, tuple[str, ...], int]] = {
    "dense": (False, (), 1),
    "sharded": (True, (SHARDED, "parallel.expert_model_parallel_size=2"), 2),
}


def prepare(directory: Path, name: str) -> tuple[Path, tuple[str, ...], int]:
    """(configuration, overrides, processes) of a run over assets below `directory`, always the same."""
    with_experts, overrides, processes = RUNS[name]
    write_tiny_model(directory / "model", with_experts=with_experts, hidden_size=8)
    write_rows(directory / "prompts.jsonl", [{"prompt": f"{n} + {n + 3} =", "answer": "none"} for n in range(24)])
    write_rows(directory / "experts.jsonl", [{"prompt": f"{n} + {n} =", "answer": f"{2 * n}"} for n in range(16)])
    config = write_config(directory, directory)
    return config, (f"rewards.reward_funcs=[{REWARD}:hash_reward]", f"train.train_iters={STEPS}", *overrides), processes


def run(config: Path, overrides: tuple[str, ...], processes: int) -> None:
    """To its end, each process with one thread: sums must not depend on their number."""
    arguments = ("train", config, *overrides, "--nproc-per-node", str(processes))
    succeeded(finish(start("chord_megatron.cli", *arguments)))


def archive_name(release: str, name: str) -> str:
    return f"{release}_{name}.tar.gz"


def record(name: str) -> Path:
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        run(*prepare(directory, name))
        kept = directory / "kept"
        checkpoints = kept / "checkpoints"
        shutil.copytree(
            directory / "run" / "checkpoints" / f"step_{RESUMED_STEP}", checkpoints / f"step_{RESUMED_STEP}"
        )
        for path in checkpoints.glob("step_*/tokenizer*"):
            path.unlink()
        (checkpoints / "latest").write_text(f"step_{RESUMED_STEP}\n", encoding="utf-8")
        shutil.copy(directory / "run" / "metrics.jsonl", kept)
        RECORDINGS.mkdir(parents=True, exist_ok=True)
        archive = RECORDINGS / archive_name(str(installed_version("megatron-core")), name)
        with tarfile.open(archive, "w:gz") as file:
            file.add(kept, "run", filter=_anonymous)
    return archive


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


if __name__ == "__main__":
    for each in sys.argv[1:] or RUNS:
        print(record(each))
