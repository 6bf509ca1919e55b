"""Everything that rank 0 writes while a run goes on: logs, completions, recordings, and the report at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from chord_megatron.config import Config, to_yaml
from chord_megatron.rewards.scoring import completion_text
from chord_megatron.rollout.replay import RolloutRecorder
from chord_megatron.system.atomic import atomic_write, failed_writes_named
from chord_megatron.system.provenance import provenance
from chord_megatron.system.secrets import without_secrets_in
from chord_megatron.tracking.findings import findings
from chord_megatron.tracking.report import write_report
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.run_log import RunLog
from chord_megatron.tracking.step_metrics import ExpertRow
from chord_megatron.tracking.summary import load_history
from chord_megatron.tracking.trackers.protocol import TrackedRun
from chord_megatron.training.ending import EarlyEnd, early_end
from chord_megatron.training.rollout_stream import StepRollouts
from chord_megatron.types import Metrics, ScoredRollouts


class RunOutputs:
    """The files of a run directory. `next_step` > 0: a resumed run, whose later lines are written again."""

    def __init__(
        self,
        config: Config,
        run_dir: RunDir,
        tokenizer: Any,
        *,
        next_step: int,
        notes: Sequence[str],
        changed: Sequence[str] = (),  # what the configuration was before, and what it is now
    ) -> None:
        self._config, self._run_dir, self._tokenizer = config, run_dir, tokenizer
        # A run killed before its first checkpoint starts over, over its own lines.
        is_restart = run_dir.config.exists()
        resume_step = next_step if next_step > 0 or is_restart else None
        self._is_finished = False
        found = provenance()
        with failed_writes_named(run_dir.path):
            kept = run_dir.set_aside(next_step)
            self.log = RunLog(
                run_dir.path,
                train_iters=config.train.train_iters,
                report_to=config.tracking.report_to,
                resume_step=resume_step,
                tracked=_tracked_run(config, run_dir, goes_back=bool(kept), versions=found),
            )
        with_versions = f"# {', '.join(' '.join(pair) for pair in found.items())}\n{to_yaml(config)}"
        atomic_write(run_dir.config, [with_versions.encode()])
        record_to = config.rollout.record_to
        self._recorder = RolloutRecorder(Path(record_to), resume_step=resume_step) if record_to else None
        for note in (*notes, *_how_it_begins(run_dir, next_step, changed, kept)):
            self.log.message(note)

    def step(self, step: int, metrics: Metrics, rollouts: StepRollouts, expert_rows: Sequence[ExpertRow]) -> None:
        """One training step."""
        self.log.log_step(metrics)
        self.log.log_experts(step, expert_rows)
        if rollouts.scored is not None:
            self.log.log_completions(step, self._completion_rows(rollouts.scored))
        if self._recorder is not None and rollouts.new_generation is not None:
            self._recorder.write(step, rollouts.new_generation.rollouts)

    def evaluation(self, step: int, metrics: Metrics, scored: ScoredRollouts) -> None:
        """One evaluation of the weights after `step` steps."""
        rows = [{"split": "eval", **row} for row in self._completion_rows(scored)]
        self.log.log_completions(step, rows)
        self.log.log_eval(step, metrics)

    def finish(self, step: int, early: EarlyEnd | None) -> None:
        """The report, and where everything is; then the log is closed. early: what ended the run before its time."""
        png, html = write_report(self._run_dir.path)
        self._run_dir.mark_finished(self._config.train.train_iters, early=early)
        if early is not None:
            print(early.reason, flush=True)
        best = self._run_dir.best_step() if self._config.train.keep_best else None
        if best is not None:
            print(f"best: {self._run_dir.hf(best)}, by its eval_reward_mean", flush=True)
        self._is_finished = True
        if said := findings(load_history(self._run_dir.path).steps):
            self.log.track_text(step, "findings", "\n".join(said))
        for path in (html, png, self._run_dir.config):
            self.log.track_artifact(path)
        self.log.close()
        print(f"model: {self._run_dir.hf(step)}\nreport: {html}, {png}", flush=True)

    def early_end(self, step: int) -> EarlyEnd | None:
        """What ends the run before this step."""
        return early_end(self._config.train, step, self.log.rewards, self.log.loss_tokens)

    def close(self) -> None:
        """Close the files, of a run that has not finished, too."""
        self.log.close(failed=not self._is_finished)
        if self._recorder is not None:
            self._recorder.close()

    def _completion_rows(self, scored: ScoredRollouts) -> list[dict[str, object]]:
        """tracking.log_completions of them, spread evenly over the batch."""
        count = min(self._config.tracking.log_completions, len(scored.rollouts))
        chosen = [math.floor(i * len(scored.rollouts) / count) for i in range(count)]
        return [
            {
                "prompt_id": scored.rollouts[i].prompt_id,
                "prompt": scored.prompts[i].text,
                "completion": completion_text(scored.prompts[i], scored.rollouts[i], self._tokenizer),
                "reference": scored.prompts[i].reference,
                "reward": scored.rewards[i],
                "finish_reason": scored.rollouts[i].finish_reason,
            }
            for i in chosen
        ]


def _tracked_run(config: Config, run_dir: RunDir, *, goes_back: bool, versions: dict[str, str]) -> TrackedRun:
    tracking = config.tracking
    port = tracking.prometheus_port
    return TrackedRun(
        run_dir.path,
        project=tracking.project,
        name=tracking.run_name,
        group=tracking.group,
        tags=tracking.tags,
        entity=tracking.entity,
        uri=tracking.uri,
        prometheus=None if port is None else (tracking.prometheus_host, port),
        config=without_secrets_in({**config.model_dump(), "versions": versions}),
        goes_back=goes_back,
    )


def _how_it_begins(run_dir: RunDir, step: int, changed: Sequence[str], kept: Sequence[str]) -> list[str]:
    """What a run that is started again says."""
    lines = []
    if step > 0 and not run_dir.has_pointer:
        lines.append(f"checkpoints/latest is missing; step_{step} is the newest complete checkpoint in {run_dir.path}")
    if step > 0 or changed:
        since = f"; since then {', '.join(changed)}" if changed else ""
        lines.append(f"{'resuming' if step else 'starting'} {run_dir.path} at step {step}{since}")
    if kept:
        lines.append(f"newer than step {step}, and kept: {', '.join(kept)}")
    return lines
