"""Telling the data of a run from others."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence

from chord_megatron.types import ExpertSample, Prompt


def fingerprint(samples: Sequence[Prompt] | Sequence[ExpertSample]) -> str:
    """SHA-256 of the rows in their order: tokens, and the reference or where the answer begins and what it weighs."""
    digest = hashlib.sha256()
    for sample in samples:
        rest = sample.reference if isinstance(sample, Prompt) else _answer(sample)
        encoded = rest.encode("utf-8", errors="surrogatepass")
        for part in (array("q", sample.tokens).tobytes(), encoded):
            digest.update(len(part).to_bytes(8, "little"))  # so that nothing moves from one part to the next
            digest.update(part)
    return digest.hexdigest()


def _answer(sample: ExpertSample) -> str:
    return str(sample.prompt_length) + ("" if sample.token_weights is None else f" {sample.token_weights}")
