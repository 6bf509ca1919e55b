"""One evaluation: a model, its prompts and what is drawn, by the code that evaluates within training."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from chord_megatron.backend.engine import MegatronEngine
from chord_megatron.backend.groups import ParallelGroups, initialize_distributed
from chord_megatron.config import Config
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.load import RunData, load_run_data, stop_token_ids
from chord_megatron.data.samples import columns_of
from chord_megatron.data.tokenizer import load_tokenizer
from chord_megatron.data.vocabulary import check_vocabulary
from chord_megatron.evaluation.records import Answered, Drawn, EvaluationFile, name_by_settings
from chord_megatron.planning.rewards import reward_settings
from chord_megatron.rewards.functions import build_reward_function
from chord_megatron.rewards.scoring import completion_text
from chord_megatron.rewards.votes import vote
from chord_megatron.rollout.build import build_rollout
from chord_megatron.system.errors import UserError
from chord_megatron.tracking.heartbeat import Whereabouts
from chord_megatron.tracking.timers import PhaseTimer
from chord_megatron.training.evaluation import Evaluator, build_evaluator
from chord_megatron.training.sampler import Sampler, choose_probes, sampling_params
from chord_megatron.training.scorer import Scorer
from chord_megatron.types import Prompt, ScoredRollouts
from chord_megatron.weights.hf_config import read_architecture

_SOURCE_COLUMNS = ("data_source", "source")  # of rows: verl's name, and a plain one
_WEIGHTS = ("*.safetensors", "*.distcp")


@dataclass(frozen=True)
class Session:
    """What is set up before the weights are loaded. Every method is a collective call of all ranks."""

    config: Config  # as planning/evaluations.py makes it
    groups: ParallelGroups
    tokenizer: Any
    data: RunData
    stop: tuple[int, ...]
    where: Whereabouts

    @staticmethod
    def open(config: Config, where: Whereabouts) -> Session:
        """Reads prompts and tokenizer. Raises UserError."""
        model_dir = Path(config.model.path)
        arch = read_architecture(model_dir)
        tokenizer = load_tokenizer(model_dir, trust_remote_code=config.model.trust_remote_code)
        data = load_run_data(config.data, config.chord, tokenizer, expert_max_length=arch.max_position_embeddings)
        check_vocabulary(config, tokenizer, arch.vocab_size, data)
        stop = stop_token_ids(model_dir, tokenizer, config.rollout.stop_token_ids, data.end_token_ids)
        groups = initialize_distributed(config.parallel, config.train.seed)
        return Session(config, groups, tokenizer, data, stop, where)

    def evaluate(self, output: Path, *, is_default: bool) -> EvaluationFile | None:
        """Draw what `output` lacks; the file, which is closed, on rank 0, nothing elsewhere. Raises UserError.

        is_default: the settings are to tell it from others beside it.
        """
        with ExitStack() as opened:
            file = self._open_file(output, is_default, opened)
            done = [0 if file is None else len(file.rows)]
            dist.broadcast_object_list(done, src=0)
            prompts = self.data.eval_prompts
            if done[0] < len(prompts):
                evaluator = self._build_evaluator(opened)
                self._draw(evaluator, done[0], file)
            return file

    def _open_file(self, output: Path, is_default: bool, opened: ExitStack) -> EvaluationFile | None:
        """On rank 0; what is wrong with it, all ranks hear."""
        file: EvaluationFile | None = None
        error: list[UserError | None] = [None]
        if self.groups.rank == 0:
            settings = self.settings()
            path = name_by_settings(output, settings) if is_default else output
            try:
                file = opened.enter_context(EvaluationFile(path, settings))
            except UserError as refused:
                error = [refused]
        dist.broadcast_object_list(error, src=0)
        if error[0] is not None:
            raise error[0]
        return file

    def _build_evaluator(self, opened: ExitStack) -> Evaluator:
        config, prompts = self.config, self.data.eval_prompts
        reward_function = build_reward_function(
            **reward_settings(config), columns=columns_of(prompts), reference_column=config.data.reference_column
        )
        opened.callback(reward_function.close)
        engine = MegatronEngine(config.model, config.parallel, None, self.groups, train_iters=1, keep_reference=False)
        rollout = build_rollout(config, engine, self.groups)
        opened.callback(rollout.close)
        timer = PhaseTimer(where=self.where)
        probes = choose_probes(config.rollout, rollout, prompts)
        sampler = Sampler(engine, rollout, config.rollout, probes, timer)
        params = sampling_params(config.rollout, self.stop)
        scorer = Scorer(self.tokenizer, reward_function, timer)
        return build_evaluator(config.train, prompts, params, sampler, scorer)

    def _draw(self, evaluator: Evaluator, done: int, file: EvaluationFile | None) -> None:
        """Batches of about rollout.max_batch_size completions on each replica, each written when it is scored."""
        prompts, k = evaluator.prompts, evaluator.num_generations
        replicas = self.groups.dp_size * self.groups.cp_size
        at_once = max(1, self.config.rollout.max_batch_size * replicas // k)
        for start in range(done, len(prompts), at_once):
            part = prompts[start : start + at_once]
            scored = evaluator.score(part, first=start)
            if file is not None:
                file.append(self._rows(part, scored))
                print(f"{start + len(part)} of {len(prompts)} prompts", file=sys.stderr, flush=True)

    def _rows(self, prompts: Sequence[Prompt], scored: ScoredRollouts) -> list[Answered]:
        k = self.config.train.eval_num_generations
        drawn = [self._drawn(scored, index) for index in range(len(scored.rollouts))]
        return [
            Answered(
                prompt_id=prompt.id,
                source=source_of(prompt, self.config.data.eval_dataset or ""),
                prompt=prompt.text,
                reference=prompt.reference,
                completions=drawn[index * k : (index + 1) * k],
            )
            for index, prompt in enumerate(prompts)
        ]

    def _drawn(self, scored: ScoredRollouts, index: int) -> Drawn:
        text = completion_text(scored.prompts[index], scored.rollouts[index], self.tokenizer)
        counts_votes = self.config.train.eval_num_generations > 1
        return Drawn(
            completion=text,
            answer=vote(text, self.config.rewards.answer_format) if counts_votes else None,
            reward=_number(scored.rewards[index]),
            rewards={name: _number(values[index]) for name, values in scored.rewards_by_function.items()},
            reward_errors=scored.reward_errors[index],
            tokens=int(scored.rollouts[index].response_mask.sum()),
            finish_reason=scored.rollouts[index].finish_reason,
        )

    def settings(self) -> dict[str, Any]:
        """What the completions and their rewards follow from, as JSON values."""
        config, prompts = self.config, self.data.eval_prompts
        model_dir = Path(config.model.path)
        return {
            "model": str(model_dir),
            "weights": weights_in(model_dir),
            "dtype": config.model.dtype,
            "prompts": config.data.eval_dataset,
            "num_prompts": len(prompts),
            "rows": fingerprint(prompts),
            "k": config.train.eval_num_generations,
            "temperature": config.train.eval_temperature,
            "max_completion_length": config.rollout.max_completion_length,
            "stop_token_ids": list(self.stop),
            "seed": config.train.seed,
            "engine": config.rollout.engine,
            **{
                key: getattr(config.rewards, key)
                for key in ("reward_funcs", "reward_weights", "answer_format", "on_error")
            },
        }


def source_of(prompt: Prompt, data_set: str) -> str:
    """What the row says of its source; the data set where it says nothing."""
    named = (prompt.columns.get(column) for column in _SOURCE_COLUMNS)
    return next((name for name in named if isinstance(name, str) and name), data_set)


def weights_in(model_dir: Path) -> str:
    """What tells a folder's weights from those that take their place: bytes, and when they were last written."""
    files = [file.stat() for pattern in _WEIGHTS for file in model_dir.glob(pattern)]
    newest = max((file.st_mtime_ns for file in files), default=0)
    return f"{sum(file.st_size for file in files)} bytes, written {newest / 1e9:.3f}"


def _number(value: float) -> float | None:
    return None if value != value else value
