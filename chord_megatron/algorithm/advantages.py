"""Group-normalised advantages (GRPO, arXiv 2402.03300, section 4.1)."""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Normalise each group's rewards: `(r - mean) / (std + 1e-6)`, unbiased std over the whole group.

    rewards: [num_prompts * num_generations], a prompt's completions side by side. Returns the same shape.
    A group of one, or whose rewards are all equal, has advantage 0.
    """
    assert rewards.is_floating_point()
    groups = rewards.double().view(-1, num_generations)
    if num_generations == 1:
        return torch.zeros_like(rewards)
    centred = groups - groups.mean(dim=1, keepdim=True)
    # Tested on the rewards and not on the std: rounding of the mean can leave a std of 1e-17.
    varies = (groups != groups[:, :1]).any(dim=1, keepdim=True)
    advantages = torch.where(varies, centred / (groups.std(dim=1, keepdim=True) + 1e-6), 0.0)
    return advantages.view(-1).to(rewards.dtype)


def zero_std_fraction(rewards: Tensor, num_generations: int) -> float:
    """The share of groups whose rewards are all equal: they teach the policy nothing."""
    groups = rewards.view(-1, num_generations)
    return (groups == groups[:, :1]).all(dim=1).double().mean().item()
