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
import signal
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from commands import end_all, run_chord_megatron, run_script
from evidence import write_evidence
from experiment import Experiment, Trial, chosen_lr, load_experiment, make_trial
from results import collect, completions_file, result_file

from chord_megatron.system.atomic import atomic_write
from chord_megatron.system.errors import UserError


class Runner:
    """The commands of an experiment, each once: what it has left behind is not made again."""

    def __init__(self, experiment: Experiment, root: Path) -> None:
        self._experiment, self._root = experiment, root
        self.grid: dict[str, dict[float, float]] = {}

    def prepare(self) -> None:
        """What the experiment begins with, each whole or not at all."""
        for path, script in self._experiment.prepare.items():
            if not path.exists():
                print(f"making {path}", flush=True)
                part = path.with_name(f"{path.name}.part")
                shutil.rmtree(part, ignore_errors=True)
                run_script(script, part)
                part.rename(path)

    def refuse_other(self) -> None:
        """Raise UserError where runs that are there had or were tested by something else."""
        settings = self._root / "settings"
        for name, folders, content in self._settings():
            kept = settings / name
            if kept.exists() and kept.read_bytes() != content and self._has_results(folders):
                raise UserError(f"the runs in {self._root} are of another {name}; move them away, or restore it")
        settings.mkdir(parents=True, exist_ok=True)
        for name, _, content in self._settings():
            atomic_write(settings / name, [content])

    def _settings(self) -> list[tuple[str, str, bytes]]:
        """What runs go by: its name, the folders of these runs, and what it is now."""
        tested = self._experiment.model_dump_json(include={"base", "test", "tested_checkpoint"})
        return [
            ("recipe", "*", self._experiment.recipe.read_bytes()),
            ("base, test or tested_checkpoint", "*", tested.encode()),
            *(
                (name, f"{name}*", method.model_dump_json(include={"keys", "first"}).encode())
                for name, method in self._experiment.methods.items()
            ),
        ]

    def _has_results(self, folders: str) -> bool:
        """Whether anything there was saved or tested: what came to nothing keeps nobody to its settings."""
        marks = (f"{folders}/lr_*/seed_*/checkpoints/latest", f"{folders}/test.json")
        return any(path for mark in marks for path in self._root.glob(mark))

    def test_base(self) -> Path:
        """The folder of the test of the weights that all begin with."""
        directory = self._root / "base"
        self._test(directory, self._experiment.base, "--config", self._experiment.recipe)
        return directory

    def tune_train_test(self) -> list[Trial]:
        """Returns the tested runs."""
        experiment = self._experiment
        for names in experiment.rounds():
            tuned = [self.trial(name, lr, experiment.tuning_seed) for name in names for lr in experiment.grid]
            self._train_all(tuned)
            for one in tuned:
                self.grid.setdefault(one.method, {})[one.lr] = one.validation(experiment.tested_checkpoint)
        trials = [self.chosen(name, seed) for seed in experiment.seeds for name in experiment.methods]
        self._train_all(trials)
        self._side_by_side(self._test_run, trials)
        return trials

    def trial(self, name: str, lr: float, seed: int) -> Trial:
        """A run of a method."""
        return make_trial(self._root, self._experiment, name, lr, seed, self.grid)

    def chosen(self, name: str, seed: int) -> Trial:
        """At the learning rate that was chosen."""
        return self.trial(name, chosen_lr(self.grid[name]), seed)

    def _train_all(self, trials: list[Trial]) -> None:
        first = {trial.first.directory: trial.first for trial in trials if trial.first}  # several may have the same
        self._side_by_side(self._train, first.values())
        self._side_by_side(self._train, trials)

    def _side_by_side(self, work: Callable[[Trial], None], trials: Iterable[Trial]) -> None:
        with ThreadPoolExecutor(self._experiment.side_by_side) as pool:
            list(pool.map(work, trials))

    def _train(self, trial: Trial) -> None:
        if not trial.is_finished:
            print(f"training {trial.directory}\n", end="", flush=True)  # in one piece: others print at the same time
            processes = str(self._experiment.nproc_per_node)
            run_chord_megatron("train", self._experiment.recipe, *trial.overrides, "--nproc-per-node", processes)

    def _test_run(self, trial: Trial) -> None:
        self._test(trial.directory, trial.directory, "--checkpoint", self._experiment.tested_checkpoint)
        if not self._experiment.keep_checkpoints:
            for checkpoint in trial.directory.glob("checkpoints/step_*"):
                shutil.rmtree(checkpoint)

    def _test(self, directory: Path, model: Path, *options: str | Path) -> None:
        if not result_file(directory).exists():
            directory.mkdir(parents=True, exist_ok=True)
            common = ["--json", "--output", completions_file(directory)]
            processes = ["--nproc-per-node", str(self._experiment.nproc_per_node)]
            said = run_chord_megatron("evaluate", model, self._experiment.test, *common, *processes, *options)
            atomic_write(result_file(directory), [said.encode()])


def main() -> None:
    """Everything, in order."""
    arguments = parse()
    experiment = load_experiment(arguments.experiment, arguments.methods, arguments.seeds)
    name = arguments.experiment.resolve().parent.name
    runner = Runner(experiment, Path("runs") / name)
    experiment.check_recipe()
    runner.refuse_other()
    runner.prepare()
    base = runner.test_base()
    trials = runner.tune_train_test()
    tuning = {method: runner.chosen(method, experiment.tuning_seed) for method in experiment.methods}
    results = collect(experiment, base, runner.grid, tuning, trials)
    for path in write_evidence(results, arguments.evidence / name):
        print(path)
    if experiment.base_in_evidence:
        shutil.copytree(experiment.base, arguments.evidence / name / "policy", dirs_exist_ok=True)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", help="instead of the experiment's; asks for --evidence")
    parser.add_argument("--methods", nargs="+", help="of the experiment's; asks for --evidence")
    parser.add_argument("--evidence", type=Path, help="where the result goes: docs/evidence")
    arguments = parser.parse_args()
    if (arguments.seeds or arguments.methods) and not arguments.evidence:
        parser.error("a part of the experiment is no evidence of the whole: say with --evidence where it goes")
    arguments.evidence = arguments.evidence or Path("docs/evidence")
    return arguments


def stop(*_: object) -> None:
    """As Ctrl-C does it, which reaches the commands by itself."""
    end_all()
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, stop)
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command goes on")
