"""Compare methods on the same tasks, policy and budget: makes what they need, then tunes, trains and tests each.

    python examples/reproduction/compare.py examples/reproduction/experiment.yaml
    python examples/reproduction/compare.py examples/smollm2/experiment.yaml
    python examples/reproduction/compare.py EXPERIMENT.yaml --seeds 1 --methods grpo chord_phi --evidence runs/short

What is finished is not done again: stop it at any time, and start it again. The result goes to docs/evidence/NAME, NAME
being that of the experiment's folder, as its runs are in runs/NAME.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from commands import chord_megatron, script
from evidence import write_evidence
from experiment import Experiment, Trial, chosen_lr, load_experiment, make_trial
from pydantic import ValidationError
from results import collect, tested

from chord_megatron.system.errors import UserError


class Comparison:
    """The commands of an experiment, each once: what it has left behind is not made again."""

    def __init__(self, experiment: Experiment, root: Path) -> None:
        self._experiment, self._root = experiment, root
        self._locks: defaultdict[Path, Lock] = defaultdict(Lock)  # two learning rates may share a first stage
        self.grid: dict[str, dict[float, float]] = {}

    def prepare(self) -> None:
        """What the experiment begins with."""
        for path, arguments in self._experiment.prepare.items():
            if not path.exists():
                print(f"making {path}", flush=True)
                script(arguments)

    def test_base(self) -> Path:
        """The folder of the test of the weights that all begin with."""
        directory = self._root / "base"
        self._test(directory, self._experiment.base, "--config", self._experiment.recipe)
        return directory

    def run(self) -> list[Trial]:
        """Tune, then train and test; returns the tested runs."""
        experiment = self._experiment
        for names in experiment.rounds():
            tuned = [self._trial(name, lr, experiment.tuning_seed) for name in names for lr in experiment.grid]
            self._side_by_side(self._train, tuned)
            for one in tuned:
                self.grid.setdefault(one.method, {})[one.lr] = one.validation()
        rates = {name: chosen_lr(found) for name, found in self.grid.items()}
        trials = [self._trial(name, rates[name], seed) for seed in experiment.seeds for name in experiment.methods]
        self._side_by_side(self._train_and_test, trials)
        return trials

    def _trial(self, name: str, lr: float, seed: int) -> Trial:
        return make_trial(self._root, self._experiment, name, lr, seed, self.grid)

    def _side_by_side(self, work: Callable[[Trial], None], trials: Sequence[Trial]) -> None:
        with ThreadPoolExecutor(self._experiment.side_by_side) as pool:
            list(pool.map(work, trials))

    def _train(self, trial: Trial) -> None:
        for one in trial.stages:
            with self._locks[one.directory]:
                if not one.is_finished:
                    print(f"training {one.directory}", flush=True)
                    processes = str(self._experiment.nproc_per_node)
                    chord_megatron("train", self._experiment.recipe, *one.overrides, "--nproc-per-node", processes)

    def _train_and_test(self, trial: Trial) -> None:
        self._train(trial)
        self._test(trial.directory, trial.directory, "--checkpoint", self._experiment.tested_checkpoint)
        if not self._experiment.keep_checkpoints:
            for checkpoint in trial.directory.glob("checkpoints/step_*"):
                shutil.rmtree(checkpoint)

    def _test(self, directory: Path, model: Path, *options: str | Path) -> None:
        if not tested(directory).exists():
            directory.mkdir(parents=True, exist_ok=True)
            common = ["--json", "--output", directory / "completions.test.jsonl"]
            processes = ["--nproc-per-node", str(self._experiment.nproc_per_node)]
            said = chord_megatron("evaluate", model, self._experiment.test, *common, *processes, *options)
            tested(directory).write_text(said, encoding="utf-8")


def main() -> None:
    """Everything, in order."""
    arguments = parse()
    experiment = load_experiment(arguments.experiment)
    if unknown := set(arguments.methods or ()) - set(experiment.methods):
        raise UserError(
            f"{arguments.experiment} has no method {sorted(unknown)[0]}; it has {', '.join(experiment.methods)}"
        )
    methods = {
        name: method for name, method in experiment.methods.items() if name in (arguments.methods or experiment.methods)
    }
    experiment = experiment.model_copy(update={"methods": methods, "seeds": arguments.seeds or experiment.seeds})
    name = arguments.experiment.resolve().parent.name
    comparison = Comparison(experiment, Path("runs") / name)
    comparison.prepare()
    base = comparison.test_base()
    trials = comparison.run()
    for path in write_evidence(collect(experiment, base, comparison.grid, trials), arguments.evidence / name):
        print(path)
    if experiment.base_in_evidence:
        shutil.copytree(experiment.base, arguments.evidence / name / "policy", dirs_exist_ok=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the experiment's")
    parser.add_argument("--methods", nargs="+", help="of the experiment's")
    parser.add_argument("--evidence", type=Path, default=Path("docs/evidence"), help="where the result goes")
    return parser.parse_args()


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValidationError, OSError) as error:
        sys.exit(f"error: {error}")
