"""A run: everything it needs is set up, then it loops over its steps."""

from __future__ import annotations

import dataclasses
import os
import resource
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from chord_megatron.algorithm.objective import Objective
from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import initialize_distributed
from chord_megatron.config import Config
from chord_megatron.config_types import sources_of
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.load import RunData, load_run_data, stop_token_ids
from chord_megatron.data.samples import columns_of, lengths_of
from chord_megatron.data.tokenizer import load_tokenizer
from chord_megatron.data.vocabulary import check_vocabulary
from chord_megatron.planning.plan import Plan, make_plan
from chord_megatron.planning.rewards import reward_settings
from chord_megatron.planning.schedule import needs_rollouts
from chord_megatron.rewards.functions import build_reward_function
from chord_megatron.rollout.build import build_embedded, build_rollout
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.heartbeat import Whereabouts
from chord_megatron.tracking.run_dir import RunDir
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.beginning import find_beginning
from chord_megatron.training.counting import counted_in
from chord_megatron.training.ending import EarlyEnd, limits
from chord_megatron.training.evaluation import Evaluator, build_evaluator
from chord_megatron.training.expert_stream import ExpertStream
from chord_megatron.training.mu_control import MuControl
from chord_megatron.training.objective import build_means, build_objective
from chord_megatron.training.outputs import RunOutputs
from chord_megatron.training.packing import expert_name, refuse_longer_rows
from chord_megatron.training.rollout_stream import RolloutStream
from chord_megatron.training.sampler import Sampler, choose_probes, sampling_params
from chord_megatron.training.saving import Saves
from chord_megatron.training.scorer import Scorer
from chord_megatron.training.stopping import Stopped, StopSignals
from chord_megatron.training.trainer import ChordTrainer, StepResult
from chord_megatron.types import SamplingParams
from chord_megatron.weights.hf_config import read_architecture
from chord_megatron.weights.model_files import links_out_of


class Run:
    """One run: everything it needs, and the loop over its steps. Every method is a collective call."""

    def __init__(self, config: Config, signals: StopSignals | None = None, where: Whereabouts | None = None) -> None:
        """`signals`: what this process is told; `where`: what it tells the others."""
        self.signals, self.where = signals or StopSignals(), where or Whereabouts()
        model_dir = Path(config.model.path)
        self.config = config
        self.run_dir = RunDir(Path(config.train.output_dir))
        arch = read_architecture(model_dir)
        plan = make_plan(config, arch, int(os.environ.get("WORLD_SIZE", 1)))
        objective = build_objective(config.grpo, config.chord)  # functions of the user's own are loaded now
        beginning = find_beginning(self.run_dir, config, plan)
        self._resume_step = beginning.step
        self._lacks_export = beginning.step is not None and self.run_dir.lacks_export(beginning.step)
        self._steps_per_rollout = plan.steps_per_rollout
        self.where.begin("reading the data")
        tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        data = load_run_data(
            config.data, config.chord, tokenizer, expert_max_length=plan.expert_max_length, work=self.where.work
        )
        config, length = counted_in(data, config, plan)
        if config is not self.config:
            self.config, plan = config, make_plan(config, arch, plan.world_size)
            beginning = find_beginning(self.run_dir, config, plan)
        check_vocabulary(config, tokenizer, arch.vocab_size, data)
        expert_lengths = ((expert_name(row), tokens) for row, tokens in lengths_of(data.experts))
        refuse_longer_rows(expert_lengths, config.train.max_tokens_per_micro_batch)
        self._fingerprints = {"prompts": fingerprint(data.prompts), "experts": fingerprint(data.experts)}
        self.where.begin("starting the reward functions")
        with ExitStack() as opened:  # closed in reverse order, here where something fails
            reward_function = build_reward_function(
                **reward_settings(config),
                columns=columns_of(data.prompts, data.eval_prompts),
                reference_column=config.data.reference_column,
            )
            opened.callback(reward_function.close)
            self.where.begin("loading the model")
            self.groups = initialize_distributed(config.parallel, config.train.seed)
            self.engine = MegatronEngine(
                config.model,
                config.parallel,
                config.optimizer,
                self.groups,
                train_iters=config.train.train_iters,
                keep_reference=config.grpo.beta > 0,
            )
            # Where nothing is drawn, evaluation alone may sample, with the training weights.
            build = build_rollout if needs_rollouts(config) else build_embedded
            self.where.begin("starting the rollout engine")
            rollout = build(config, self.engine, self.groups, self.where.work)
            opened.callback(rollout.close)
            timer = PhaseTimer(torch.cuda.synchronize if torch.cuda.is_available() else None, where=self.where)
            scorer = Scorer(tokenizer, reward_function, timer)
            stop = stop_token_ids(model_dir, tokenizer, config.rollout.stop_token_ids, data.end_token_ids)
            params = sampling_params(config.rollout, stop)
            probes = choose_probes(config.rollout, rollout, data.prompts)
            sampler = Sampler(self.engine, rollout, config.rollout, probes, timer)
            self.evaluator = self._build_evaluator(data, params, sampler, scorer)
            self.trainer = _build_trainer(config, plan, objective, data, params, sampler, scorer)
            self.skipped_steps = self.skipped_in_row = 0
            self.next_step = self._resume()
            self.outputs: RunOutputs | None = None  # rank 0 writes
            if self.groups.rank == 0:
                notes = [_how_it_computes(config, self.engine), *data.notes, *length, *links_out_of(model_dir)]
                self.outputs = RunOutputs(
                    config, self.run_dir, tokenizer, next_step=self.next_step, notes=notes, changed=beginning.changed
                )
                opened.callback(self.outputs.close)
            self.saves = Saves(
                self.engine,
                self.run_dir,
                model_dir,
                keep=config.train.save_total_limit,
                say=self.outputs.log.message if self.outputs else None,
                rewards=self.outputs.log.rewards if self.outputs and config.train.keep_best else None,
            )
            opened.callback(self.saves.abandon)
            self._opened = opened.pop_all()

    def _build_evaluator(self, data: RunData, params: SamplingParams, sampler: Sampler, scorer: Scorer) -> Evaluator:
        if self.config.rollout.replay_from:  # a recording has no answers to them
            embedded = build_embedded(self.config, self.engine, self.groups, self.where.work)
            sampler = dataclasses.replace(sampler, rollout=embedded)
        return build_evaluator(self.config.train, data.eval_prompts, params, sampler, scorer)

    def train(self) -> None:
        """Evaluate, step, log and save until train_iters, or what ends a run earlier."""
        self.signals.is_noted_only = self.config.train.save_on_signal
        self.where.step = self.next_step
        self._ended: EarlyEnd | None = None  # on rank 0, where it was decided: a last evaluation does not change it
        with self._opened, self.where.within("log"):
            self.saves.mark_best()
            if self._lacks_export:
                with self.where.within("save"):
                    self.saves.export(self.next_step)
            while self.next_step < self.config.train.train_iters:
                self.where.step = self.next_step
                self._evaluate()
                if self._ends_early():
                    break
                result = self.trainer.step(self.next_step)
                told = self._log(result)
                self.next_step += 1
                self._save(told)
                self._stop_if_diverged()
            self.where.step = self.next_step
            self._evaluate(is_last=True)
            with self.where.within("save"):
                self.saves.finish()
            if self.outputs:
                self.outputs.finish(self.next_step, self._ended)

    def _resume(self) -> int:
        """Load the checkpoint to go on from; returns the step to go on with."""
        step = self._resume_step
        if step is None:
            return 0
        directory = self.run_dir.checkpoint(step)
        self.where.begin("reading the checkpoint")
        state = self.engine.load(directory)
        _refuse_other_data(self.config, state.get("data"), self._fingerprints)
        try:
            self.trainer.load_state_dict(state["trainer"])
            counts = [state[name] for name in ("skipped_steps", "skipped_in_row", "step")]
            if not all(type(count) is int and count >= 0 for count in counts) or counts[2] != step:
                raise TypeError("its counts are not those of this step")
            self.skipped_steps, self.skipped_in_row, _ = counts
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{directory / 'state.json'} is damaged ({error}); name an earlier one in {directory.parent}/latest"
            ) from error
        return step

    def _evaluate(self, *, is_last: bool = False) -> None:
        """Before the first step, every eval_steps, and at the end; not again where a resumed run has it."""
        eval_steps, step = self.config.train.eval_steps, self.next_step
        is_due = eval_steps is not None and (step % eval_steps == 0 or is_last)
        answer = [is_due and self.outputs is not None and self.outputs.log.last_eval_step != step]
        dist.broadcast_object_list(answer, src=0)
        if not answer[0]:
            return
        with self.where.within("evaluation"):
            metrics, scored = self.evaluator.evaluate()
            if self.outputs:
                self.outputs.evaluation(step, metrics, scored)
                self.saves.mark_best()

    def _ends_early(self) -> bool:
        """Whether a limit of `ending` is reached; the weights are saved then."""
        step = self.next_step
        if not limits(self.config.train) or step % self._steps_per_rollout:  # inside a batch a run cannot be resumed
            return False
        self._ended = self.outputs.early_end(step) if self.outputs else None
        answer = [self._ended is not None]
        dist.broadcast_object_list(answer, src=0)
        if answer[0] and step not in (self._resume_step, self.saves.last_step):
            with self.where.within("save"):
                self.saves.begin(step, self._state(), in_background=False)
        return answer[0]

    def _log(self, result: StepResult) -> int:
        """Returns the signal that any rank was told to end by, the same on all; 0 for none."""
        self.skipped_in_row = 0 if result.stepped else self.skipped_in_row + 1
        self.skipped_steps += not result.stepped
        found = torch.tensor([_peak_memory_bytes(), self.signals.received], device=self.groups.device)
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
        peak, told = found.tolist()
        if self.outputs:
            metrics = {
                "step": self.next_step,
                **result.metrics,
                "skipped_steps": self.skipped_steps,
                "peak_memory_bytes": peak,
            }
            self.outputs.step(self.next_step, metrics, result.rollouts, result.expert_rows)
        return told

    def _save(self, told: int) -> None:
        """A checkpoint where one is due, or where a signal asks for one; after that the run ends."""
        train, step = self.config.train, self.next_step
        is_due = step == train.train_iters or (train.save_steps is not None and step % train.save_steps == 0)
        is_last = told and step % self._steps_per_rollout == 0  # elsewhere a run cannot be resumed
        with self.where.within("save"):
            if is_due or is_last:
                self.saves.begin(step, self._state(), in_background=train.async_save and not is_last)
            else:
                self.saves.finish_if_written()
        if is_last and step != train.train_iters:
            dist.barrier()  # the pointer is written
            raise Stopped(told, saved_step=step)

    def _state(self) -> dict[str, Any]:
        """What a checkpoint has of the run beside the engine's."""
        return {
            "trainer": self.trainer.state_dict(),
            "data": self._fingerprints,
            "step": self.next_step,  # of mu and of everything else that follows a schedule
            "skipped_steps": self.skipped_steps,
            "skipped_in_row": self.skipped_in_row,
        }

    def _stop_if_diverged(self) -> None:
        if self.skipped_in_row >= self.config.train.max_skipped_steps:
            self.saves.finish()  # the last weights that were any good
            raise UserError(
                f"stopped after {self.skipped_in_row} steps in a row with a non-finite loss or gradient norm; "
                "lower optimizer.lr, or look at the last completions in completions.jsonl"
            )


def _build_trainer(
    config: Config,
    plan: Plan,
    objective: Objective,
    data: RunData,
    params: SamplingParams,
    sampler: Sampler,
    scorer: Scorer,
) -> ChordTrainer:
    # Two streams of numbers, so that the two data sets are not shuffled alike.
    seed = 2 * config.train.seed
    return ChordTrainer(
        config=config,
        means=build_means(config, plan),
        objective=objective,
        engine=sampler.engine,
        rollout_stream=RolloutStream(
            config, plan, objective, data.prompts, params, sampler=sampler, scorer=scorer, seed=seed
        ),
        expert_stream=ExpertStream(config, data.experts, plan.expert_rows_per_step, seed + 1),
        mu=MuControl(config),
        timer=sampler.timer,
    )


def _how_it_computes(config: Config, engine: MegatronEngine) -> str:
    is_shared = config.train.share_prompts and engine.batch_layout.can_share_prompts
    prompts = "read once in each micro-batch" if is_shared else "read by each row"
    return f"{engine.acceleration_note}, shared prompts: {prompts}"


def _refuse_other_data(config: Config, before: object, now: Mapping[str, str]) -> None:
    """Raise UserError where a data set has other rows than a checkpoint's. Those of older releases do not say."""
    sources = {
        "prompts": ("data.dataset", config.data.dataset),
        "experts": ("chord.chord_sft_dataset", config.chord.chord_sft_dataset),
    }
    for name, (key, source) in sources.items():
        if isinstance(before, dict) and before.get(name, now[name]) != now[name]:
            paths = ", ".join(each.path for each in sources_of(source)) if source else None
            raise UserError(
                f"{key}={paths} has other rows than when the run began; restore them, or choose another "
                "train.output_dir"
            )


def _peak_memory_bytes() -> int:
    """Peak device memory of this process, or its peak resident memory without a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
