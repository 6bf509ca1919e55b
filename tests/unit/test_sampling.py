"""Sampling: the inverse of the cumulative distribution, top-k and top-p by hand, and frozen uniform numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from chord_megatron.ops.sampling import sample_tokens, seed_number, uniform_numbers
from chord_megatron.system.errors import UserError

LAST = 1 - 2**-53  # the largest float64 below 1
PROBABILITIES = [0.1, 0.4, 0.2, 0.3]  # sorted: tokens 1, 3, 2, 0 with the cumulative sums 0.4, 0.7, 0.9, 1


def logits_of(probabilities: list[float], temperature: float = 1.0) -> Tensor:
    """Logits with those probabilities at that temperature, and an offset that must not matter."""
    return (temperature * torch.tensor(probabilities).log() + 3.0)[None]


def draw(logits: Tensor, uniforms: list[float] | Tensor, **settings) -> tuple[list[int], list[float]]:
    uniforms = torch.as_tensor(uniforms, dtype=torch.float64)
    tokens, log_probs = sample_tokens(logits.expand(len(uniforms), -1), uniforms, **settings)
    return tokens.tolist(), log_probs.tolist()


# --- uniform numbers ------------------------------------------------------------------------------------------------


def test_uniform_numbers_are_frozen():
    """Golden values: a rollout is reproducible across versions only as long as these hold."""
    assert uniform_numbers([0], 3).tolist() == [0.6369616873214543, 0.2697867137638703, 0.04097352393619469]
    assert uniform_numbers([1, 2, 3], 3).tolist() == [0.6704722626516632, 0.1110146366693816, 0.5115090823948739]


def test_uniform_numbers_depend_on_the_seed_only():
    expected = uniform_numbers([4, 5], 10)
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(uniform_numbers((4, 5), 10), expected)
    assert torch.equal(uniform_numbers([4, 5], 4), expected[:4])  # a shorter limit does not move the others
    assert not torch.equal(uniform_numbers([5, 4], 10), expected)
    assert expected.dtype == torch.float64 and (expected >= 0).all() and (expected < 1).all()


def test_seed_numbers_are_frozen():
    """Golden values of 63 bits, for the same reason."""
    assert seed_number([0]) == 7896617691693857887
    assert [seed_number([1, 2, 3]), seed_number((3, 2, 1))] == [6498626229777268288, 4404663168949438663]
    numbers = [seed_number([seed]) for seed in range(200)]
    assert len(set(numbers)) == 200 and 2**62 < max(numbers) < 2**63


# --- drawing --------------------------------------------------------------------------------------------------------


def test_temperature_zero_takes_the_largest():
    logits = torch.tensor([[0.5, 2.0, -1.0], [7.0, 7.5, 8.0]])
    tokens, log_probs = sample_tokens(logits, torch.tensor([0.0, LAST], dtype=torch.float64), temperature=0)
    assert tokens.tolist() == [1, 2]
    # The log-probs of temperature 1: -log sum e^(z - max).
    expected = [-math.log(math.exp(-1.5) + 1 + math.exp(-3)), -math.log(math.exp(-1) + math.exp(-0.5) + 1)]
    assert log_probs.tolist() == pytest.approx(expected, rel=4 * 2**-24)


def test_inverse_cumulative_distribution_by_hand():
    uniforms = [0.0, 0.39, 0.41, 0.69, 0.71, 0.89, 0.91, LAST]
    assert draw(logits_of(PROBABILITIES), uniforms, temperature=1.0)[0] == [1, 1, 3, 3, 2, 2, 0, 0]


def test_ties_fall_to_the_lower_token():
    assert draw(torch.zeros(1, 4), [0.0, 0.26, 0.51, 0.76, LAST], temperature=1.0)[0] == [0, 1, 2, 3, 3]


def test_a_boundary_belongs_to_the_token_above_it():
    # Two equal tokens: 1/2 of the mass is exactly the first cumulative sum, and the intervals are half open.
    assert draw(torch.zeros(1, 2), [0.5 - 2**-40, 0.5], temperature=1.0)[0] == [0, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_over_a_grid_equal_the_probabilities(temperature: float):
    """A grid of n uniforms puts n p +- 1 of them into an interval of length p."""
    count = 20_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(6)) * 2
    grid = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    tokens, _ = draw(logits, grid, temperature=temperature)
    frequencies = torch.bincount(torch.tensor(tokens), minlength=12).double() / count
    expected = torch.softmax(logits[0].double() / temperature, dim=0)
    assert (frequencies - expected).abs().max().item() <= 1.01 / count


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({"top_k": 1}, [1]),
        ({"top_k": 2}, [1, 3]),
        ({"top_k": 9}, [1, 3, 2, 0]),
        ({"top_p": 0.3}, [1]),  # the first is kept even where it exceeds top_p
        ({"top_p": 0.5}, [1, 3]),  # the token that crosses the threshold is kept
        ({"top_p": 0.8}, [1, 3, 2]),
        ({"top_p": 0.95}, [1, 3, 2, 0]),
        ({"top_p": 1e-9}, [1]),
        ({"top_p": 0.8, "top_k": 2}, [1, 3]),
        ({"top_p": 0.3, "top_k": 3}, [1]),
    ],
)
def test_top_k_and_top_p_by_hand(settings: dict[str, float], allowed: list[int]):
    count = 1000
    tokens, _ = draw(
        logits_of(PROBABILITIES),
        [*((torch.arange(count, dtype=torch.float64) + 0.5) / count).tolist(), 0.0, LAST],
        temperature=1.0,
        **settings,
    )
    mass = sum(PROBABILITIES[token] for token in allowed)
    assert set(tokens) == set(allowed)
    for token in allowed:  # renormalised over what is kept
        assert abs(tokens[:count].count(token) / count - PROBABILITIES[token] / mass) <= 1.01 / count


def test_top_p_is_of_what_top_k_leaves():
    """Tokens 1 and 3 hold 0.4 and 0.3: of the two alone 4/7 and 3/7, of all 0.4 and 0.3."""
    assert draw(logits_of(PROBABILITIES), [LAST], temperature=1.0, top_p=0.5, top_k=2)[0] == [1]
    assert draw(logits_of(PROBABILITIES), [LAST], temperature=1.0, top_p=0.6, top_k=2)[0] == [3]
    assert draw(logits_of(PROBABILITIES), [LAST], temperature=1.0, top_p=0.5)[0] == [3]


def warped(logits: Tensor, temperature: float, top_p: float, top_k: int) -> Tensor:
    """[vocab] float64: the probabilities that transformers draws from."""
    scores = torch.log_softmax(logits.float() / temperature, dim=-1).double()  # in float64 its sums do not round
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    return scores.softmax(dim=-1)[0]


VOCABULARY = 24
LOGITS = {
    "spread": 2 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(3)),
    "flat": 0.1 * torch.randn(1, VOCABULARY, generator=torch.Generator().manual_seed(4)),
    "one": torch.nn.functional.one_hot(torch.tensor([5]), VOCABULARY) * 2.0,
}


@pytest.mark.parametrize("temperature", [0.7, 1.0])
@pytest.mark.parametrize("top_k", [0, 1, 2, 3, 6, 23, 24, 99])
@pytest.mark.parametrize("top_p", [5e-324, 0.05, 0.3, 0.5, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("name", ["spread", "flat"])
def test_draws_have_the_distribution_of_transformers(name: str, top_p: float, top_k: int, temperature: float):
    """Each token from where the inverse of the cumulative distribution enters it to where it leaves it."""
    logits = LOGITS[name]
    sizes, order = warped(logits, temperature, top_p, top_k).sort(descending=True, stable=True)
    support = order[sizes > 0].tolist()
    ends = sizes.cumsum(0)[: len(support)].tolist()
    inside = 1e-12
    uniforms = [u for start, end in zip([0.0, *ends], ends) for u in (start + inside, end - inside)]
    settings = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    tokens, _ = draw(logits, uniforms, **settings)
    assert tokens == [token for token in support for _ in range(2)]
    assert draw(logits, [0.0, LAST], **settings)[0] == [support[0], support[-1]]


@pytest.mark.parametrize("top_k", [1, 2, 3, 5])
@pytest.mark.parametrize("top_p", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("logits", [LOGITS["one"], torch.zeros(1, VOCABULARY), LOGITS["spread"].round()])
def test_of_equal_tokens_at_the_edge_as_many_are_kept_as_top_k_says(logits: Tensor, top_p: float, top_k: int):
    """The lower ones. transformers keeps all that equal the last one, so that nothing outside its support is drawn."""
    grid = (torch.arange(500, dtype=torch.float64) + 0.5) / 500
    drawn = set(draw(logits, grid, temperature=1.0, top_p=top_p, top_k=top_k)[0])
    assert drawn <= set(torch.nonzero(warped(logits, 1.0, 1.0, top_k)).flatten().tolist())
    first = logits[0].argsort(descending=True, stable=True)[:top_k].tolist()
    assert drawn <= set(first) and (top_p < 1 or drawn == set(first))


def test_tokens_after_a_mass_of_exactly_top_p_are_dropped():
    half = torch.log_softmax(torch.zeros(2), 0)[0].double().exp().item()
    assert draw(torch.zeros(1, 2), [LAST], temperature=1.0, top_p=half)[0] == [0]
    assert draw(torch.zeros(1, 2), [LAST], temperature=1.0, top_p=half + 2**-40)[0] == [1]


def test_log_probs_are_those_before_top_p_and_top_k():
    tokens, log_probs = draw(
        logits_of(PROBABILITIES, temperature=0.7), [0.0, LAST], temperature=0.7, top_p=0.5, top_k=3
    )
    assert tokens == [1, 3]
    assert log_probs == pytest.approx([math.log(0.4), math.log(0.3)], rel=1e-6)


def test_log_probs_are_at_the_temperature():
    # Probabilities 1/3, 2/3 at temperature 1 become 1/5, 4/5 at temperature 1/2.
    tokens, log_probs = draw(torch.tensor([[0.0, math.log(2)]]), [0.0, LAST], temperature=0.5)
    assert tokens == [1, 0]
    assert log_probs == pytest.approx([math.log(0.8), math.log(0.2)], rel=1e-6)


def test_a_row_does_not_depend_on_its_batch():
    logits = torch.randn(6, 40, generator=torch.Generator().manual_seed(7))
    uniforms = uniform_numbers([8], 6)
    together = sample_tokens(logits, uniforms, temperature=0.9, top_p=0.9)
    for row in range(6):
        alone = sample_tokens(logits[row : row + 1], uniforms[row : row + 1], temperature=0.9, top_p=0.9)
        assert alone[0].item() == together[0][row].item()
        assert alone[1].item() == together[1][row].item()


def test_tokens_of_probability_zero_are_never_drawn():
    """Whatever the rounding of the sums, the largest uniform number stays within the possible tokens."""
    logits = 3 * torch.randn(200, 64, generator=torch.Generator().manual_seed(0))
    logits[:, 40:] = -torch.inf
    for top_p in (1.0, 0.999999):
        tokens, log_probs = sample_tokens(
            logits, torch.full((200,), LAST, dtype=torch.float64), temperature=1.0, top_p=top_p
        )
        assert (tokens < 40).all() and log_probs.isfinite().all()


def test_top_p_one_is_off():
    """Float32 log-probs of many tokens sum to more than 1: the tail beyond 1 is still drawn."""
    logits = 4 * torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0))
    tokens, _ = sample_tokens(logits, torch.full((8,), LAST, dtype=torch.float64), temperature=1.0, top_p=1.0)
    assert tokens.tolist() == logits.argmin(dim=1).tolist()
    tokens, _ = sample_tokens(logits, torch.full((8,), LAST, dtype=torch.float64), temperature=1.0, top_k=3)
    assert tokens.tolist() == logits.topk(3).indices[:, 2].tolist()


def test_bfloat16_logits_are_worked_on_in_float32():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(9)).bfloat16()
    uniforms = uniform_numbers([1], 3)
    half, full = (sample_tokens(z, uniforms, temperature=1.0) for z in (logits, logits.float()))
    assert torch.equal(half[0], full[0]) and torch.equal(half[1], full[1]) and half[1].dtype == torch.float32


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_stop_the_run(temperature: float):
    logits = torch.zeros(2, 3)
    logits[1, 2] = torch.nan
    message = "^the model's logits are not finite, so the weights have diverged; lower optimizer.lr .* checkpoint$"
    with pytest.raises(UserError, match=message):
        sample_tokens(logits, torch.zeros(2, dtype=torch.float64), temperature=temperature)


@pytest.mark.parametrize("spread", [0.0, 0.001, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("digits", [0, 1, 6])  # few: many ties, and slices of their own
def test_a_draw_from_all_tokens_is_the_inverse_of_the_sorted_distribution(spread: float, digits: int):
    """Of every token, low and high in its interval, so that none is left out or has another's place."""
    generator = torch.Generator().manual_seed(11)
    logits = (spread * torch.randn(1, 300, generator=generator)).round(decimals=digits)
    logits[0, 7] = -torch.inf
    sizes, order = torch.log_softmax(logits, dim=-1).double().exp()[0].sort(descending=True, stable=True)
    ends = sizes.cumsum(0)
    uniforms, expected = [], []
    for start, end, token in zip([0.0, *ends.tolist()], ends.tolist(), order.tolist()):
        if end - start > 1e-12:
            uniforms += [(start + (end - start) * share) / ends[-1].item() for share in (0.01, 0.99)]
            expected += [token, token]
    assert len(set(expected)) > (250 if spread < 3 else 1)
    assert draw(logits, uniforms, temperature=1.0)[0] == expected


def test_rows_of_a_batch_have_slices_of_their_own():
    """Rows whose slices hold one token, many, and all of them."""
    logits = torch.stack([torch.zeros(500), torch.linspace(0, 30, 500), 1e-3 * torch.arange(500).float()])
    uniforms = torch.tensor([0.501, 0.9, 0.1], dtype=torch.float64)
    together, _ = sample_tokens(logits, uniforms, temperature=1.0)
    alone = [sample_tokens(logits[i : i + 1], uniforms[i : i + 1], temperature=1.0)[0].item() for i in range(3)]
    assert together.tolist() == alone and alone[0] == 250
