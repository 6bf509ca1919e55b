"""The schedule of mu, the weight of the expert loss (CHORD, arXiv 2508.11408, section 4.1)."""

import math


def mu_schedule(step: int, *, peak: float, valley: float, warmup_steps: int, decay_steps: int) -> float:
    """mu at a 0-based optimizer step: linear warm-up to `peak`, cosine decay to `valley`, then `valley`."""
    if step < warmup_steps:
        return peak * step / warmup_steps
    if step < warmup_steps + decay_steps:
        peak_share = (1 + math.cos(math.pi * (step - warmup_steps) / decay_steps)) / 2
        return peak * peak_share + valley * (1 - peak_share)  # exactly `peak` where the decay begins
    return valley
