"""Recordings: what is written reads back as it was, and what is no recording is one sentence with file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from chord_megatron.rollout.recorded_routing import RoutingForm, encode
from chord_megatron.rollout.replay import ReplayRollout, RolloutRecorder
from chord_megatron.system.errors import UserError
from chord_megatron.types import LIVE, Prompt, RolloutRequest, RolloutSample, SamplingParams

VOCABULARY = 50
PROMPTS = (Prompt(3, "", (5, 6), ""), Prompt(8, "", (7,), ""))
LINES = [
    {
        "step": 0,
        "prompt_id": 3,
        "sample_index": 0,
        "tokens": [5, 6, 11, 49],
        "response_mask": [False, False, True, True],
        "rollout_log_probs": [0.0, 0.0, -0.5, -0.25],
        "policy_version": 0,
        "finish_reason": "stop",
    },
    {
        "step": 0,
        "prompt_id": 8,
        "sample_index": 1,
        "tokens": [7, 12],
        "response_mask": [False, True],
        "rollout_log_probs": [0.0, -1.5],
        "policy_version": 0,
        "finish_reason": "length",
    },
]


def write(path: Path, lines: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def request(max_completion_length: int = 8) -> RolloutRequest:
    params = SamplingParams(max_completion_length=max_completion_length)
    return RolloutRequest(PROMPTS, params, num_generations=1, step=0, policy_version=0)


def replayed(path: Path, **settings: int) -> list[RolloutSample]:
    return ReplayRollout(path, vocab_size=VOCABULARY).generate(request(**settings))


def refusal(path: Path, **settings: int) -> str:
    with pytest.raises(UserError) as error:
        replayed(path, **settings)
    return str(error.value)


def test_a_recording_reads_back_by_hand(tmp_path: Path):
    first, second = replayed(write(tmp_path / "r.jsonl", LINES[::-1]))  # the order of the lines does not matter
    assert first.tokens.dtype == torch.int32 and first.tokens.tolist() == [5, 6, 11, 49]
    assert first.response_mask.dtype == torch.bool and first.response_mask.tolist() == [False, False, True, True]
    assert first.rollout_log_probs.dtype == torch.float32
    assert first.rollout_log_probs.tolist() == [0.0, 0.0, -0.5, -0.25]
    assert (first.prompt_id, first.sample_index, first.policy_version, first.finish_reason) == (3, 0, 0, "stop")
    assert (second.prompt_id, second.sample_index, second.finish_reason) == (8, 1, "length")


def test_what_json_cannot_hold_is_written_as_null_and_read_as_nan(tmp_path: Path):
    """Byte for byte: a replayed run that records again writes the same file."""
    rows = [math.nan, math.inf, -math.inf]
    samples = [
        RolloutSample(
            prompt_id=3,
            sample_index=0,
            tokens=torch.tensor([5, 6, 1, 2, 3, 4], dtype=torch.int32),
            response_mask=torch.arange(6) >= 2,
            rollout_log_probs=torch.tensor([0.0, 0.0, *rows, -0.1]),
            policy_version=0,
            finish_reason="length",
        ),
        replayed(write(tmp_path / "other.jsonl", LINES))[1],
    ]
    for name in ("first.jsonl", "second.jsonl"):
        recorder = RolloutRecorder(tmp_path / name, resume_step=None)
        recorder.write(0, samples)
        recorder.close()
        samples = replayed(tmp_path / name)
        assert samples[0].rollout_log_probs.isnan().tolist() == [False, False, True, True, True, False]
        assert samples[0].rollout_log_probs[5] == torch.tensor(-0.1)
    line = json.loads((tmp_path / "first.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert line["rollout_log_probs"][2:5] == [None, None, None]
    assert (tmp_path / "first.jsonl").read_bytes() == (tmp_path / "second.jsonl").read_bytes()


@pytest.mark.parametrize("literal", ["NaN", "Infinity", "-Infinity", "1e999", "null"])
def test_a_log_prob_that_is_no_number_is_read_as_one(literal: str, tmp_path: Path):
    """What Python's json writes for it, too."""
    text = "".join(json.dumps(line) + "\n" for line in LINES).replace("-0.5", literal)
    (tmp_path / "r.jsonl").write_text(text, encoding="utf-8")
    assert replayed(tmp_path / "r.jsonl")[0].rollout_log_probs.isfinite().tolist() == [True, True, False, True]


FORM = RoutingForm(num_layers=3, top_k=2, num_experts=300)


def routed_lines(**changes: Any) -> list[dict[str, Any]]:
    """LINES with the routing of each; `changes` are the second line's."""
    generator = torch.Generator().manual_seed(0)
    rows = [torch.rand(len(line["tokens"]), 3, 300, generator=generator).topk(2).indices.short() for line in LINES]
    for row in rows:
        row[-1] = LIVE
    first, second = ({**line, "routing": encode(row)} for line, row in zip(LINES, rows))
    return [first, {**second, **changes}]


def test_the_routing_of_completions_reads_back(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", routed_lines())
    samples = ReplayRollout(path, vocab_size=VOCABULARY, routing=FORM).generate(request())
    for sample, line in zip(samples, routed_lines(), strict=True):
        assert sample.routing is not None and sample.routing.dtype == torch.int16
        assert sample.routing.shape == (len(line["tokens"]), 3, 2) and sample.routing.max() > 255
        assert (sample.routing[-1] == LIVE).all() and (sample.routing[:-1] >= 0).all()
        assert encode(sample.routing) == line["routing"]
    recorder = RolloutRecorder(tmp_path / "again.jsonl", resume_step=None)
    recorder.write(0, samples)
    recorder.close()
    assert (tmp_path / "again.jsonl").read_text() == path.read_text()


def test_routing_that_nobody_asks_for_is_left_out(tmp_path: Path):
    """Also a recording's that would be refused."""
    path = write(tmp_path / "r.jsonl", routed_lines(routing=7))
    assert [sample.routing for sample in replayed(path)] == [None, None]


NOT_OF_THIS_FORM = "'routing' is not what a recording holds of 2 tokens with 2 experts in each of 3 layers"
NOT_EXPERTS = "'routing' names something else than 2 of the model's 300 experts"


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        (..., "lacks 'routing' for rollout.router_replay=sampler"),
        (None, NOT_OF_THIS_FORM),
        ([[[0, 1]] * 3] * 2, NOT_OF_THIS_FORM),
        ("", NOT_OF_THIS_FORM),
        ("no base64", NOT_OF_THIS_FORM),
        (encode(torch.zeros(2, 3, 1, dtype=torch.int16)), NOT_OF_THIS_FORM),  # of another model
        (encode(torch.zeros(2**22, 3, 2, dtype=torch.int16)), NOT_OF_THIS_FORM),  # 25 MB out of 33 kB
        (encode(torch.full((2, 3, 2), 7, dtype=torch.int16)), NOT_EXPERTS),  # one of them twice
        (encode(torch.tensor([[[0, 300]] * 3] * 2, dtype=torch.int16)), NOT_EXPERTS),
        (encode(torch.tensor([[[0, LIVE]] * 3] * 2, dtype=torch.int16)), NOT_EXPERTS),
        (encode(torch.tensor([[[-2, -2]] * 3] * 2, dtype=torch.int16)), NOT_EXPERTS),
    ],
)
def test_damaged_routing_is_named(value: Any, sentence: str, tmp_path: Path):
    lines = [{k: v for k, v in line.items() if v is not ...} for line in routed_lines(routing=value)]
    path = write(tmp_path / "r.jsonl", lines)
    with pytest.raises(UserError) as error:
        ReplayRollout(path, vocab_size=VOCABULARY, routing=FORM)
    assert str(error.value) == f"{path}:2: {sentence}{AGAIN}"


AGAIN = "; record it again with rollout.record_to"
# The second line's changes, and the sentence behind FILE:2.
DAMAGE: dict[str, tuple[dict[str, Any], str]] = {
    "no tokens": ({"tokens": ...}, "lacks 'tokens'"),
    "no prompt": ({"prompt_id": ...}, "lacks 'prompt_id'"),
    "text as a token": ({"tokens": [7, "12"]}, "'tokens' holds '12', which is no integer"),
    "a fraction as a token": ({"tokens": [7, 1.5]}, "'tokens' holds 1.5, which is no integer"),
    "a boolean as a token": ({"tokens": [7, True]}, "'tokens' holds True, which is no integer"),
    "null as a token": ({"tokens": [7, None]}, "'tokens' holds None, which is no integer"),
    "a negative token": ({"tokens": [7, -1]}, "token -1 is not one of the model's 50"),
    "a token beyond the vocabulary": ({"tokens": [7, 50]}, "token 50 is not one of the model's 50"),
    "a huge token": ({"tokens": [7, 2**70]}, f"token {2**70} is not one of the model's 50"),
    "tokens that are no list": ({"tokens": {"0": 7}}, "'tokens' is no list"),
    "nested tokens": ({"tokens": [[7, 12]]}, "'tokens' holds [7, 12], which is no integer"),
    "no tokens at all": (
        {"tokens": [], "response_mask": [], "rollout_log_probs": []},
        "'response_mask' is not false on a prompt, then true on its completion",
    ),
    "other lengths": (
        {"response_mask": [False, True, True]},
        "'tokens', 'response_mask' and 'rollout_log_probs' are of different lengths",
    ),
    "a mask of numbers": ({"response_mask": [0, 1]}, "'response_mask' holds 0, which is no boolean"),
    "a mask of the prompt": (
        {"response_mask": [True, False]},
        "'response_mask' is not false on a prompt, then true on its completion",
    ),
    "a mask without a prompt": (
        {"response_mask": [True, True]},
        "'response_mask' is not false on a prompt, then true on its completion",
    ),
    "a mask with a hole": (
        {"tokens": [7, 1, 2], "response_mask": [False, True, False], "rollout_log_probs": [0, -1, -1]},
        "'response_mask' is not false on a prompt, then true on its completion",
    ),
    "text as a log-prob": ({"rollout_log_probs": [0.0, "x"]}, "'rollout_log_probs' holds 'x', which is no number"),
    "a boolean as a log-prob": (
        {"rollout_log_probs": [0.0, True]},
        "'rollout_log_probs' holds True, which is no number",
    ),
    "an integer that no float holds": ({"rollout_log_probs": [0, -(10**400)]}, "int too large to convert to float"),
    "a probability above 1": (
        {"rollout_log_probs": [0.0, 0.5]},
        "log-prob 0.5 is above 0: these are not logarithms of probabilities",
    ),
    "another end": ({"finish_reason": "eos"}, "'finish_reason' is 'eos', not one of 'stop', 'length'"),
    "no end": ({"finish_reason": None}, "'finish_reason' is None, not one of 'stop', 'length'"),
    "a boolean as a place": ({"sample_index": True}, "'sample_index' is True, which is no integer from 0 on"),
    "a negative place": ({"sample_index": -1}, "'sample_index' is -1, which is no integer from 0 on"),
    "a fraction as a version": ({"policy_version": 0.5}, "'policy_version' is 0.5, which is no integer from 0 on"),
    "text as a prompt": ({"prompt_id": "8"}, "'prompt_id' is '8', which is no integer from 0 on"),
    "a place twice": ({"sample_index": 0}, "repeats completion 0 of step 0, which is on line 1"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_line_is_named(name: str, tmp_path: Path):
    changes, sentence = DAMAGE[name]
    line = {key: value for key, value in {**LINES[1], **changes}.items() if value is not ...}
    path = write(tmp_path / "r.jsonl", [LINES[0], line])
    assert refusal(path) == f"{path}:2: {sentence}{AGAIN}"


@pytest.mark.parametrize("step", ["0", 0.0, None, True, -1, 2**60, [0], ...])
def test_a_line_without_a_step_is_named(step: Any, tmp_path: Path):
    line = {key: value for key, value in {**LINES[1], "step": step}.items() if value is not ...}
    path = write(tmp_path / "r.jsonl", [LINES[0], line])
    assert refusal(path) == f"line 2 of {path} has no step (an integer from 0 on); remove that line"


@pytest.mark.parametrize("text", ["[" * 100_000, "{" * 100_000, "1" * 5000, "\x00", "[1]"])
def test_a_line_that_is_no_object_is_named(text: str, tmp_path: Path):
    path = tmp_path / "r.jsonl"
    path.write_text(f"{json.dumps(LINES[0])}\n{text}\n{json.dumps(LINES[1])}\n", encoding="utf-8")
    assert refusal(path) == f"line 2 of {path} is not a JSON object; remove that line"


def test_the_first_value_that_is_wrong_is_short(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", [{**LINES[0], "finish_reason": "x" * 10_000}])
    assert len(refusal(path)) < 300


def test_a_gap_is_named(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", [LINES[0], {**LINES[1], "sample_index": 2}])
    assert refusal(path) == f"{path} holds no completion 1 of step 0{AGAIN}"


@pytest.mark.parametrize(
    "change",
    [
        {"prompt_id": 9},
        {"tokens": [9, 12]},
        {"tokens": [7, 12, 13], "response_mask": [False, False, True], "rollout_log_probs": [0, 0, -1]},
    ],
)
def test_another_prompt_is_named(change: dict[str, Any], tmp_path: Path):
    """Also where the mask counts a token of the prompt, or the other way round."""
    path = write(tmp_path / "r.jsonl", [LINES[0], {**LINES[1], **change}])
    assert refusal(path) == (
        f"{path}:2: completion 1 of step 0 answers prompt {change.get('prompt_id', 8)}, but this run asks prompt 8; "
        "use the data, tokenizer and seed of the run that recorded it"
    )


def test_a_completion_above_the_limit_is_named(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", LINES)
    assert refusal(path, max_completion_length=1) == (
        f"{path}:1: completion 0 of step 0 has 2 tokens, above rollout.max_completion_length=1; raise it"
    )


def test_what_cannot_be_read_is_a_sentence(tmp_path: Path):
    assert refusal(tmp_path / "none.jsonl") == (
        f"rollout.replay_from: {tmp_path / 'none.jsonl'} does not exist; record one with rollout.record_to"
    )
    assert refusal(tmp_path) == f"rollout.replay_from: {tmp_path} is a directory; name the file in it"


def recording(path: Path, resume_step: int | None = None) -> str:
    with pytest.raises(UserError) as error:
        RolloutRecorder(path, resume_step=resume_step)
    return str(error.value)


@pytest.mark.parametrize("resume_step", [None, 0, 3])
def test_a_directory_to_record_to_is_not_another_run(resume_step: int | None, tmp_path: Path):
    (tmp_path / "file").touch()
    assert recording(tmp_path, resume_step) == (
        f"rollout.record_to: {tmp_path} is a directory; name a file in it, such as {tmp_path / 'rollouts.jsonl'}"
    )


def test_a_place_that_cannot_be_written_is_a_sentence(tmp_path: Path):
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "rollouts.jsonl"
    assert recording(path).startswith(f"rollout.record_to: {path} cannot be written (")
    assert recording(path).endswith("); name another file")


def test_a_foreign_file_is_not_cut_on_resuming(tmp_path: Path):
    path = write(tmp_path / "r.jsonl", [{"prompt": "1 + 1"}, {"prompt": "2 + 2"}])
    before = path.read_bytes()
    assert recording(path, resume_step=1) == (f"line 1 of {path} has no step (an integer from 0 on); remove that line")
    assert path.read_bytes() == before
