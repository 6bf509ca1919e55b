"""The two streams of the loss, and what weighs them."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from chord_megatron.algorithm.advantages import AdvantageEstimator, Scale
from chord_megatron.algorithm.importance import ImportanceSamplingMode
from chord_megatron.algorithm.policy_losses import ImportanceSamplingLevel, KLEstimator, LossType
from chord_megatron.algorithm.presets import Preset
from chord_megatron.config.base import Group
from chord_megatron.config_types import (
    LARGEST_NUMBER,
    DataFormat,
    DataSet,
    Fraction,
    NonNegative,
    NonNegativeNumber,
    Number,
    PathName,
    Positive,
    PositiveNumber,
    Sharpness,
    Text,
)


class GRPOConfig(Group):
    loss_type: LossType = "dapo"
    """surrogate and mean of the rollout stream ([below](#policy-losses))"""
    policy_loss: PathName | None = None
    """`path.py:function`, a [loss of your own](#a-policy-loss-of-your-own) in place of the surrogate; the mean stays
    that of `loss_type`
    """
    importance_sampling_level: ImportanceSamplingLevel = "token"
    """the ratio of each token; `sequence`: its geometric mean over the completion (GSPO); `sequence_token`: the same
    with each token's own gradient
    """
    epsilon: float = Field(default=0.2, ge=0, lt=1)
    """clip range of the ratio, from 1 - epsilon; for sequences far smaller (the GSPO paper: 3e-4); `gmpo`: bound of
    the log-ratio
    """
    epsilon_high: NonNegativeNumber | None = None
    """clip range of the ratio, to 1 + epsilon_high; `null` = epsilon. `cispo`: the largest ratio itself, required"""
    delta: float | None = Field(default=None, gt=1, le=LARGEST_NUMBER)
    """two-sided clip: the largest ratio where the advantage is negative, above 1 + epsilon_high; verl's dual clip
    `clip_ratio_c`; `null` = none, under `chord.semantics: trinity` 3
    """
    tau_pos: Sharpness = 1.0
    """`sapo`: sharpness of the gate where the advantage is positive"""
    tau_neg: Sharpness = 1.05
    """`sapo`: and elsewhere"""
    vespo_k_pos: float = Field(default=2.0, ge=0, le=10)
    """`vespo`: k of the weight where the advantage is not negative"""
    vespo_lambda_pos: float = Field(default=3.0, ge=0.1, le=10)
    """`vespo`: lambda there"""
    vespo_k_neg: float = Field(default=3.0, ge=0, le=10)
    """`vespo`: k of the weight where the advantage is negative"""
    vespo_lambda_neg: float = Field(default=2.0, ge=0.1, le=10)
    """`vespo`: lambda there"""
    off_policy_sequence_mask_delta: NonNegativeNumber | None = None
    """nats a token: completions with a negative advantage have no policy loss where the mean of log pi_sampler - log
    pi is above it; denominators, KL penalty and entropy bonus stay
    """
    entropy_coef: NonNegativeNumber = 0.0
    """times the entropy, with the mean of `loss_type`, is taken from the rollout loss"""
    top_entropy_quantile: float = Field(default=1.0, gt=0, le=1)
    """the share of a step's rollout tokens, those of the highest entropy when they were drawn, that have a policy
    loss; denominators, KL penalty and entropy bonus stay; below 1 it takes one more forward pass on-policy
    """
    beta: NonNegativeNumber = 0.0
    """KL coefficient against the reference model, which is the initial one, frozen; 0 = none"""
    kl_estimator: KLEstimator = "k3"
    """of the penalty in the loss: with d = log pi_ref - log pi, `k1` is -d, `k2` d^2 / 2, `k3` e^d - d - 1; `k1` has
    no gradient on average
    """
    kl_in_reward: bool = False
    """instead of that, beta times the sum of k1 over the completion is taken from its reward before the advantages;
    `reward_mean` stays without it
    """
    advantage_estimator: AdvantageEstimator = "grpo"
    """the baseline: `grpo` the group's mean, `rloo` the mean of the others in the group, `reinforce_plus_plus` the
    group's mean with the spread of the whole batch, `opo` the group's mean weighted by length, `pass_at_k` the best
    of the group is paid what it is above the second
    """
    scale_rewards: Scale | None = None
    """what advantages are divided by: `group` or `batch` standard deviation, `none`, or `gdpo` (each reward function
    normalised in its group, weighted, summed, normalised over the batch); `null` = `group` for `grpo` and
    `pass_at_k`, `batch` for `reinforce_plus_plus`, `none` for `rloo` and `opo`
    """
    overlong_filter: bool = False
    """completions without an end token do not count in the loss; their rewards do in their group"""
    filtered_count: Literal["drop", "keep"] | None = None
    """whether these completions still count in the denominators: `drop`, `keep`; `null` = `drop`, under
    `chord.semantics: ms-swift` `keep` but for `bnpo`; needs `overlong_filter`
    """
    old_log_probs: Literal["trainer", "sampler"] = "trainer"
    """whose are the log-probs of pi_old in the ratio: the trainer's, computed before the weights change; `sampler`:
    those recorded with the completions, without a forward pass ([what that
    changes](concepts.md#when-the-sampler-is-not-the-trainer)); not with `rollout_importance_sampling_mode`
    """
    steps_per_generation: Positive = 1
    """optimizer steps that a generation batch is split into"""
    num_iterations: Positive = 1
    """passes over a generation batch"""
    rollout_importance_sampling_mode: ImportanceSamplingMode | None = None
    """weights against the sampler's log-probs: `token_truncate`, `token_mask`, `sequence_truncate` or `sequence_mask`
    ([what they do](concepts.md#when-the-sampler-is-not-the-trainer))
    """
    rollout_importance_sampling_threshold: float = Field(default=2.0, gt=1, le=LARGEST_NUMBER)
    """above 1; the upper bound of the weight or, for `sequence_mask`, of the sequence's ratio"""


class ChordConfig(Group):
    semantics: Preset = "paper"
    """`paper`: exact means over the step; `ms-swift`, `trinity`: that trainer's numbers ([what
    differs](concepts.md#the-numbers-of-other-trainers))
    """
    chord_sft_dataset: DataSet | None = None
    """expert answers, as `data.dataset`, of one source or several; `null` asks for mu = 0 throughout"""
    chord_sft_dataset_split: Text = "train"
    """as `data.dataset_split`"""
    chord_sft_format: DataFormat = "auto"
    """as `data.format`"""
    chord_sft_max_rows: Positive | None = None
    """of each source the first N; `null` = all"""
    chord_sft_prompt_column: Text | None = None
    """of the expert rows, as `data.prompt_column`"""
    chord_sft_answer_column: Text | None = None
    """the worked solution, not only its result"""
    chord_sft_max_length: Positive | None = None
    """tokens of prompt and answer; longer rows are dropped and counted; `null` = what the model reads"""
    chord_sft_global_batch_size: Positive | None = None
    """expert rows of an optimizer step; or the next key"""
    chord_sft_per_device_train_batch_size: Positive | None = None
    """as in ms-swift: x DP x gradient accumulation steps"""
    mu_schedule: Literal["cosine", "linear", "constant", "reward", "gradient_ratio"] = "cosine"
    """or `linear`: warm-up from 0 to the peak, decay to the valley; `constant`: warm-up, then the peak (no decay, no
    valley); closed loops `reward` and `gradient_ratio` ([what they hold](concepts.md#how-much-of-the-experts))
    """
    mu_target: Number | None = None
    """`reward`: mu = target - mean reward; `gradient_ratio`: the expert stream's share of the gradient, 0.001 to 0.999
    """
    mu_start: Fraction | None = None
    """closed loops: mu before the first measurement; `null` = the peak"""
    mu_smoothing: float = Field(default=0.9, ge=0, lt=1)
    """closed loops: share of the moving average that each new value leaves; 0 = the last value alone"""
    mu_update_steps: Positive = 10
    """`gradient_ratio`: measure every N steps, each for two more backward passes"""
    chord_mu_peak: Fraction = 0.5
    """mu where the decay begins; the upper bound of closed loops"""
    chord_mu_valley: Fraction = 0.05
    """mu where the decay ends; the lower bound of closed loops"""
    chord_mu_warmup_steps: NonNegative = 0
    """steps from 0 to the peak; with no decay either, mu is the valley throughout (under `constant` the peak); not for
    closed loops
    """
    chord_mu_decay_steps: NonNegative = 0
    """steps from the peak to the valley; not for closed loops, nor for `constant`"""
    chord_enable_phi_function: bool = False
    """ms-swift's spelling of `chord.expert_weight: phi`"""
    expert_weight: Text | None = None
    """of each expert token, of probability p, without gradient: `uniform` 1, `phi` p (1 - p), `probability` p (SFT-IS,
    DFT), `luffy` g p / (p + g)^2, `entropy` exp(-H) / 2 (SRFT), or `path.py:function` of (log_probs, entropy);
    `null` = `uniform`
    """
    expert_weight_cutoff: float | None = Field(default=None, gt=0, lt=1)
    """for `phi`: tokens of p above it are not learnt"""
    luffy_gamma: PositiveNumber = 0.1
    """g of `luffy`"""
