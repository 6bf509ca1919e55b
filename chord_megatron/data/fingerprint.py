"""Telling the data of a run from others."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable, Sequence

from chord_megatron.data.samples import Sample, Samples
from chord_megatron.types import ExpertSample, Prompt


def fingerprint(samples: Sequence[Sample]) -> str:
    """SHA-256 of the rows in their order: tokens, and the reference or where the answer begins and what it weighs."""
    if isinstance(samples, Samples):
        return samples.fingerprint
    return fingerprint_of((array("q", sample.tokens).tobytes(), rest_of(sample)) for sample in samples)


def fingerprint_of(rows: Iterable[tuple[bytes, str]]) -> str:
    """rows: the tokens of each as integers of 64 bits, and the rest of it."""
    digest = hashlib.sha256()
    for tokens, rest in rows:
        for part in (tokens, rest.encode("utf-8", errors="surrogatepass")):
            digest.update(len(part).to_bytes(8, "little"))  # so that nothing moves from one part to the next
            digest.update(part)
    return digest.hexdigest()


def fingerprint_of_parts(fingerprints: Sequence[str]) -> str:
    """Of several sources, in their order."""
    return hashlib.sha256("\n".join(fingerprints).encode()).hexdigest()


def rest_of(sample: Prompt | ExpertSample) -> str:
    """What makes a row the same as another, beside its tokens."""
    if isinstance(sample, Prompt):
        return sample.reference
    return str(sample.prompt_length) + ("" if sample.token_weights is None else f" {sample.token_weights}")
