"""A policy loss and an expert weight of the user's own: loaded, tried on a few tokens before anything starts, and held
to their shapes. They get copies: what they change in place, the loss, the metrics and a second pass still need."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from chord_megatron.algorithm.expert_weights import ExpertWeight
from chord_megatron.algorithm.policy_losses import PolicyLoss, PolicyTokens, TokenLoss, token_log_ratios
from chord_megatron.algorithm.sequences import Sequences
from chord_megatron.system.errors import UserError
from chord_megatron.system.user_functions import failures_named, load_user_function

_KEY = "grpo.policy_loss"
_WEIGHT_KEY = "chord.expert_weight"


def load_policy_loss(name: str) -> PolicyLoss:
    """The function `PolicyTokens -> TokenLoss` that `path.py:function` names. Raises UserError, when called, too."""
    function = load_user_function(_KEY, name, arguments=1)
    loss = partial(_checked, name, function)
    _try(name, loss, torch.tensor([False, True, True, True, True, False, False, True, False]))
    _try(name, loss, torch.zeros(9, dtype=torch.bool))  # a micro-batch without rollouts
    return loss


def _checked(name: str, function: Callable[[PolicyTokens], Any], tokens: PolicyTokens) -> TokenLoss:
    log_probs, log_ratios, advantages, mask, sequences = tokens
    copies = PolicyTokens(log_probs.clone(), log_ratios.clone(), advantages.clone(), mask.clone(), sequences)
    with failures_named(_KEY, name):
        result = function(copies)
    if not isinstance(result, TokenLoss):
        raise UserError(f"{_KEY}={name} must return a TokenLoss, not {type(result).__name__}")
    loss, *is_clipped = result
    shape = tokens.log_probs.shape
    if not isinstance(loss, Tensor) or loss.shape != shape or not loss.is_floating_point():
        raise UserError(f"{_KEY}={name} must return a loss of each token, {_form(tokens.log_probs)}, not {_form(loss)}")
    if tokens.log_probs.requires_grad and not loss.requires_grad:
        raise UserError(f"{_KEY}={name} returns a loss without gradient; make it of log_probs or log_ratios")
    for held in is_clipped:
        if held is not None and not (isinstance(held, Tensor) and held.shape == shape and held.dtype == torch.bool):
            raise UserError(
                f"{_KEY}={name} must return is_clipped_low and is_clipped_high as {_form(tokens.mask)} or None, not "
                f"{_form(held)}"
            )
    return result


def _try(name: str, loss: PolicyLoss, mask: Tensor) -> None:
    """Sequences of 4, 3 and 1 tokens and padding; good, bad and idle ones, likelier now and less likely."""
    log_probs = torch.tensor([-0.5, -2.0, -0.01, -3.0, -1.0, -0.7, -5.0, -0.2, -1.0], requires_grad=True)
    old_log_probs = log_probs.detach() + torch.tensor([0.0, 0.5, -0.5, 0.0, -0.1, 0.0, 0.0, 0.3, 0.0])
    advantages = torch.where(mask, torch.tensor([1.5, 1.5, 1.5, 1.5, -0.5, -0.5, -0.5, 0.0, 0.0]), 0.0)
    sequences = Sequences(torch.tensor([0, 4, 7, 8, 9], dtype=torch.int32))
    log_ratios = token_log_ratios(log_probs, old_log_probs, mask, sequences)
    with failures_named(_KEY, name):
        values = loss(PolicyTokens(log_probs, log_ratios, advantages, mask, sequences)).loss
        (gradient,) = torch.autograd.grad(values.sum(), log_probs)
    if not (values.isfinite().all() and gradient.isfinite().all()):
        among = "rollout tokens" if mask.any() else "none that are a rollout's"
        raise UserError(
            f"{_KEY}={name} has a NaN or infinite loss or gradient on a few tokens, {among} among them; the loss must "
            "be finite outside `mask`, too"
        )


def load_expert_weight(name: str) -> ExpertWeight:
    """The function `(log_probs, entropy) -> weights` that `path.py:function` names; it leaves no gradient.

    Raises UserError, when called, too.
    """
    weight = partial(_checked_weight, name, load_user_function(_WEIGHT_KEY, name, arguments=2))
    weights = weight(torch.tensor([0.0, -0.1, -0.7, -2.0, -20.0]), torch.tensor([0.0, 0.3, 0.7, 2.0, 8.0]))
    if not weights.isfinite().all():
        raise UserError(
            f"{_WEIGHT_KEY}={name} returns a NaN or infinite weight for one of a few tokens, of which one is certain "
            "(p = 1)"
        )
    return weight


def _checked_weight(name: str, function: Callable[[Tensor, Tensor], Any], log_probs: Tensor, entropy: Tensor) -> Tensor:
    with failures_named(_WEIGHT_KEY, name):
        weights = function(log_probs.clone(), entropy.clone())
    if not isinstance(weights, Tensor) or weights.shape != log_probs.shape:
        raise UserError(
            f"{_WEIGHT_KEY}={name} must return a weight of each token, {_form(log_probs)}, not {_form(weights)}"
        )
    return weights.detach().to(log_probs.dtype)


def _form(value: Any) -> str:
    return f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
