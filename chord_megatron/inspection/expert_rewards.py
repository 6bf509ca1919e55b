"""What the reward functions of a run give to expert answers: what they reject is learnt and punished at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from chord_megatron.config import Config
from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.conversations import read_conversation
from chord_megatron.data.formats import FINAL
from chord_megatron.data.samples import columns_of
from chord_megatron.data.turns import Turns
from chord_megatron.inspection.duplicates import question_of
from chord_megatron.inspection.reading import ReadSet, SampledRow, prompts_as
from chord_megatron.inspection.visible import ending
from chord_megatron.planning.rewards import reward_settings
from chord_megatron.rewards import build_reward_function
from chord_megatron.rewards.answers import AnswerFormat, final_answer, without_thoughts
from chord_megatron.rewards.functions import RewardFunctions
from chord_megatron.rewards.scoring import completion_text
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample, Prompt, RolloutSample

_MOST_EXAMPLES = 5
_PENALTIES = ("soft_overlong",)  # whose best reward is 0


@dataclass(frozen=True)
class FunctionScores:
    """Of one reward function over all answers that were scored."""

    name: str
    rejected: int  # answers with a reward of 0 or less; of a penalty, below 0
    unscorable: int
    mean: float | None
    smallest: float | None
    largest: float | None


@dataclass(frozen=True)
class RejectedAnswer:
    """An example."""

    place: str
    functions: tuple[str, ...]  # that reject it
    reference: str
    read_as: str | None  # the final answer, by rewards.answer_format; None: it has no such mark
    answer: str  # its end


@dataclass(frozen=True)
class ExpertRewards:
    """What became of the sampled expert rows that a run would learn."""

    by_prompt: int  # scored against the reference of the prompt with the same question
    by_own: int  # scored against a reference column of their own
    without_reference: int
    rejected: int  # answers that some function rejects
    functions: tuple[FunctionScores, ...]
    examples: tuple[RejectedAnswer, ...]
    error: str | None  # why a function could not be asked
    reference_column: str | None  # as the configuration names it; None: one of the usual names

    @property
    def scored(self) -> int:
        return self.by_prompt + self.by_own


class _Case(NamedTuple):
    place: str
    completion: str
    tokens: list[int]
    prompt: Prompt  # whose text, reference and columns the functions get


def score_experts(config: Config, turns: Turns, tokenizer: object, found: Sequence[ReadSet]) -> ExpertRewards:
    """Ask the configured functions about the sampled answers of all experts, as in training."""
    experts = [read for read in found if read.source.kind == "experts"]
    find = _Matching(turns, [read for read in found if read.source.kind == "prompts"], config)
    cases, by_own = [], 0
    for read in experts:
        of = f"{read.source.name} " * (len(experts) > 1)
        for expert in read.kept:
            prompt, is_own = find.prompt_of(expert)
            if prompt is not None:
                by_own += is_own
                cases.append(_case(of + read.bad.place(expert.index), expert, prompt, tokenizer))
    functions: tuple[FunctionScores, ...] = ()
    rejected: dict[int, tuple[str, ...]] = {}
    error = None
    if cases:
        try:
            rewards = _ask(config, cases)
        except UserError as failure:
            error = str(failure)
        else:
            functions = tuple(_scores(name, values) for name, values in rewards.items())
            rejected = _rejected(rewards, len(cases))
    return ExpertRewards(
        by_prompt=len(cases) - by_own,
        by_own=by_own,
        without_reference=sum(len(read.kept) for read in experts) - len(cases),
        rejected=len(rejected),
        functions=functions,
        examples=tuple(
            _example(cases[place], names, config.rewards.answer_format)
            for place, names in [*rejected.items()][:_MOST_EXAMPLES]
        ),
        error=error,
        reference_column=config.data.reference_column,
    )


class _Matching:
    """Finds what an expert's answer is to be compared with."""

    def __init__(self, turns: Turns, prompts: Sequence[ReadSet], config: Config) -> None:
        self._turns = turns
        self._own = prompts_as(config, "prompts", "", "")
        asked = [(read, question) for read in reversed(prompts) for question in reversed(read.questions)]
        self._rows = {question.normalised: (read, question.row) for read, question in asked}
        self._rows |= {question.exact: (read, question.row) for read, question in asked}  # the first of each

    def prompt_of(self, expert: SampledRow) -> tuple[Prompt | None, bool]:
        """The prompt that asks the same, or the row itself as a prompt (True)."""
        question = question_of(expert.index, expert.conversation)
        found = self._rows.get(question.exact, self._rows.get(question.normalised))
        if found is not None and (prompt := self._read(*found)):
            return prompt, False
        try:
            conversation = read_conversation(expert.row, self._own.keys)
            if conversation.other == FINAL:  # the answer itself, which agrees with itself
                return None, False
            own = self._own.make(expert.index, expert.row, conversation, expert.turn)
        except BadRow:
            return None, False
        assert isinstance(own, Prompt)
        return own, True

    def _read(self, prompts: ReadSet, index: int) -> Prompt | None:
        try:
            conversation = prompts.conversation(index)
            turn = self._turns.open(conversation, prompts.source.limit[1])
            prompt = prompts.source.make(index, prompts.rows[index], conversation, turn)
        except BadRow:
            return None
        assert isinstance(prompt, Prompt)
        return prompt


def _case(place: str, expert: SampledRow, prompt: Prompt, tokenizer: object) -> _Case:
    """The answer as if the model had drawn it."""
    sample = expert.sample
    assert isinstance(sample, ExpertSample)
    tokens = torch.tensor(sample.tokens, dtype=torch.int32)
    mask = torch.arange(len(tokens)) >= sample.prompt_length
    drawn = RolloutSample(expert.index, 0, tokens, mask, torch.zeros(len(tokens)), 0, "stop")
    begun = Prompt(expert.index, expert.turn.text, expert.turn.tokens, prompt.reference, prefill=expert.turn.prefill)
    return _Case(place, completion_text(begun, drawn, tokenizer), drawn.response_tokens, prompt)


def _ask(config: Config, cases: Sequence[_Case]) -> dict[str, list[float]]:
    """The rewards by function; as many answers at a time as a step of training has. Raises UserError."""
    asked = build_reward_function(
        **reward_settings(config),
        columns=columns_of([case.prompt for case in cases]),
        reference_column=config.data.reference_column,
    )
    try:
        size = config.train.global_batch_size or len(cases)
        parts = [_ask_at_once(asked, cases[start : start + size]) for start in range(0, len(cases), size)]
    finally:
        asked.close()
    return {name: [reward for part in parts for reward in part[name]] for name in parts[0]}


def _ask_at_once(asked: RewardFunctions, cases: Sequence[_Case]) -> dict[str, list[float]]:
    return asked(
        [case.prompt.text for case in cases],
        [case.completion for case in cases],
        [case.prompt.reference for case in cases],
        [case.prompt.columns for case in cases],
        completion_ids=[case.tokens for case in cases],
    ).by_function


def _rejects(name: str, reward: float) -> bool:
    return reward < 0 if name in _PENALTIES else reward <= 0  # False of NaN


def _rejected(rewards: dict[str, list[float]], count: int) -> dict[int, tuple[str, ...]]:
    """Place -> the functions that reject the answer, where any does."""
    by_place = {
        place: tuple(name for name, values in rewards.items() if _rejects(name, values[place]))
        for place in range(count)
    }
    return {place: names for place, names in by_place.items() if names}


def _scores(name: str, rewards: Sequence[float]) -> FunctionScores:
    known = [reward for reward in rewards if not math.isnan(reward)]
    return FunctionScores(
        name=name,
        rejected=sum(_rejects(name, reward) for reward in rewards),
        unscorable=len(rewards) - len(known),
        mean=math.fsum(known) / len(known) if known else None,
        smallest=min(known, default=None),
        largest=max(known, default=None),
    )


def _example(case: _Case, functions: tuple[str, ...], answer_format: AnswerFormat) -> RejectedAnswer:
    read_as = final_answer(without_thoughts(case.completion), answer_format)
    return RejectedAnswer(
        place=case.place,
        functions=functions,
        reference=ending(case.prompt.reference),
        read_as=None if read_as is None else ending(read_as),
        answer=ending(case.completion),
    )
