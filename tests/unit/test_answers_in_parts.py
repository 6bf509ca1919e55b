"""Expert answers whose parts weigh differently: which token gets which weight, under real templates and tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from chord_megatron.batching.packing import BatchLayout, build_global_batch
from chord_megatron.batching.samples import expert_training_samples
from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.bad_rows import BadRow
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.data.load import RunData, load_run_data
from chord_megatron.data.segments import Segment, TokenWeights, read_segments
from chord_megatron.data.turns import Answer, Turn
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample
from tests.unit.chat_templates import LLAMA31, MISTRAL, QWEN3, QWEN25, R1_DISTILL, tokenizer_of

MODELS = {"QWEN25": QWEN25, "QWEN3": QWEN3, "LLAMA31": LLAMA31, "MISTRAL": MISTRAL, "R1_DISTILL": R1_DISTILL}
TOKENIZERS = {name: tokenizer_of(model) for name, model in MODELS.items()}
REPEATABLE = settings(derandomize=True, database=None, deadline=None, max_examples=60)


def words() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges, which takes the spaces off its tokens' places, as Llama 3's does."""
    vocabulary = ["<end>", *sorted(pre_tokenizers.ByteLevel.alphabet()), "is", "Ġis", "Ġt", "Ġtw", "Ġtwo", "it"]
    merges = [("i", "s"), ("Ġ", "is"), ("Ġ", "t"), ("Ġt", "w"), ("Ġtw", "o"), ("i", "t")]
    model = models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=merges)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def load(folder: Path, tokenizer: Any, *rows: dict[str, Any], **data: Any) -> RunData:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"reference": "2", "prompt": "1+1?", **row}) + "\n" for row in rows))
    settings = {"dataset": str(path), "reference_column": "reference", "max_prompt_length": 500, **data}
    return load_run_data(
        DataConfig(**settings), ChordConfig(chord_sft_dataset=str(path)), tokenizer, expert_max_length=1000
    )


def weighed(expert: ExpertSample, tokenizer: Any) -> list[tuple[str, float]]:
    """The text of each token of the answer with its weight."""
    assert expert.token_weights is not None and len(expert.token_weights) == len(expert.tokens)
    assert not any(expert.token_weights[: expert.prompt_length])
    ids = expert.tokens[expert.prompt_length :]
    texts = [tokenizer.decode([token]) for token in ids]
    return list(zip(texts, expert.token_weights[expert.prompt_length :]))


def runs(pairs: list[tuple[str, float]]) -> list[tuple[str, float]]:
    """Neighbouring tokens of one weight joined."""
    joined: list[tuple[str, float]] = []
    for text, weight in pairs:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


# --- which token gets which weight ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([["it is", 0.5], [" two", 2]], [("it", 0.5), (" is", 0.5), (" two", 2.0), ("<end>", 2.0)]),
        # The token " two" begins with the space, whichever part that is in.
        ([["it is ", 0.5], ["two", 2]], [("it", 0.5), (" is", 0.5), (" two", 0.5), ("<end>", 2.0)]),
        ([["it is t", 0.5], ["wo", 2]], [("it", 0.5), (" is", 0.5), (" two", 0.5), ("<end>", 2.0)]),
        ([["it i", 0], ["s two", 1]], [("it", 0.0), (" is", 0.0), (" two", 1.0), ("<end>", 1.0)]),
        ([["it", 1], ["", 7], [" is two", 0]], [("it", 1.0), (" is", 0.0), (" two", 0.0), ("<end>", 0.0)]),
        ([["it is two", 3]], [("it", 3.0), (" is", 3.0), (" two", 3.0), ("<end>", 3.0)]),
        # An answer that carries its end token already.
        ([["it is", 1], [" two<end>", 0.25]], [("it", 1.0), (" is", 1.0), (" two", 0.25), ("<end>", 0.25)]),
        ([["it is two", 1], ["<end>", 0.25]], [("it", 1.0), (" is", 1.0), (" two", 1.0), ("<end>", 0.25)]),
    ],
)
@pytest.mark.parametrize("form", ["pairs", "objects"])
def test_a_token_weighs_what_the_part_of_its_first_character_does(
    parts: list[list[Any]], expected: list[tuple[str, float]], form: str, tmp_path: Path
):
    tokenizer = words()
    answer = parts if form == "pairs" else [{"text": text, "weight": weight} for text, weight in parts]
    (expert,) = load(tmp_path, tokenizer, {"answer": answer}, prompt_format="text").experts
    assert weighed(expert, tokenizer) == expected


def test_characters_of_several_tokens(tmp_path: Path):
    """Byte by byte: each belongs to the character that it is a part of."""
    tokenizer = words()
    answer = [["é", 1], ["€x", 2], ["\n\n", 3]]
    (expert,) = load(tmp_path, tokenizer, {"answer": answer}, prompt_format="text").experts
    assert expert.token_weights[expert.prompt_length :] == (1, 1, 2, 2, 2, 2, 3, 3, 3)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("answer", ["It is 2", " It is \n 2 \n", "It is\n\n2"])
def test_under_templates_parts_make_the_tokens_of_the_whole(name: str, answer: str, tmp_path: Path):
    """Templates strip, and add a thought in front; only where the parts meet is asked for here."""
    if name == "R1_DISTILL":
        answer = f"add\n</think>\n\n{answer}"
    tokenizer, at = TOKENIZERS[name], answer.index("is")
    data = load(tmp_path, tokenizer, {"answer": answer}, {"answer": [[answer[:at], 0.5], [answer[at:], 2.0]]})
    whole, parts = data.experts
    assert parts.tokens == whole.tokens and whole.token_weights is None
    first, second = runs(weighed(parts, tokenizer))
    assert (first[1], second[1]) == (0.5, 2.0)
    assert first[0].endswith(answer[:at].lstrip()) and second[0].startswith(answer[at:].rstrip())


@pytest.mark.parametrize("name", TOKENIZERS)
@REPEATABLE
@given(texts=st.lists(st.text("ab1.<é \n", min_size=1, max_size=6), min_size=1, max_size=4))
def test_any_parts_make_the_tokens_of_the_whole(name: str, texts: list[str], tmp_path_factory: pytest.TempPathFactory):
    if not "".join(texts).strip():
        return
    if name == "R1_DISTILL":
        texts = ["a</think>", *texts]
    answer = [[text, weight + 1] for weight, text in enumerate(texts)]
    data = load(tmp_path_factory.getbasetemp(), TOKENIZERS[name], {"answer": "".join(texts)}, {"answer": answer})
    whole, parts = data.experts
    assert parts.tokens == whole.tokens
    weights = parts.token_weights[parts.prompt_length :]
    assert list(weights) == sorted(weights)  # in the order of the parts
    assert weights[-1] == len(texts)


def test_a_prompt_that_has_begun_the_answer(tmp_path: Path):
    """The template opens the thought, and the answer brings its own opening, which is not learnt twice."""
    tokenizer = TOKENIZERS["R1_DISTILL"]
    answer = [["<think>\nadd\n</think>\n\n", 0.5], ["It is 2", 2.0]]
    (expert,) = load(tmp_path, tokenizer, {"answer": answer}).experts
    assert runs(weighed(expert, tokenizer)) == [
        ("add\n</think>\n\n", 0.5),
        ("It is 2" + tokenizer.eos_token, 2.0),
    ]


# --- messages -------------------------------------------------------------------------------------------------------


def messages(**flags: Any) -> dict[str, Any]:
    answer = {"role": "assistant", "content": "It is 2", **flags}
    return {"prompt": None, "messages": [{"role": "user", "content": "1+1?"}, answer]}


def load_messages(folder: Path, *rows: dict[str, Any], **data: Any) -> RunData:
    path = folder / "messages.jsonl"
    lines = [{"reference": "2", **{key: value for key, value in row.items() if value is not None}} for row in rows]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    settings = {"dataset": str(path), "reference_column": "reference", "max_prompt_length": 500, **data}
    chord = ChordConfig(chord_sft_dataset=str(path))
    return load_run_data(DataConfig(**settings), chord, TOKENIZERS["QWEN25"], expert_max_length=1000)


@pytest.mark.parametrize("flags", [{}, {"loss": True}, {"loss_scale": 1}, {"loss_scale": None}, {"loss": None}])
def test_an_answer_that_is_learnt_as_ever(flags: dict[str, Any], tmp_path: Path):
    (expert,) = load_messages(tmp_path, messages(**flags)).experts
    assert expert.token_weights is None


@pytest.mark.parametrize("flags", [{"loss_scale": 0.25}, {"loss": True, "loss_scale": 0.25}])
def test_the_loss_scale_of_the_final_answer_is_the_weight_of_its_tokens(flags: dict[str, Any], tmp_path: Path):
    plain, scaled = load_messages(tmp_path, messages(), messages(**flags)).experts
    assert scaled.tokens == plain.tokens
    assert scaled.token_weights == (0.0,) * plain.prompt_length + (0.25,) * (len(plain.tokens) - plain.prompt_length)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"loss": False}, "column 'messages' leaves every answer out of the loss"),
        ({"loss_scale": 0}, "column 'messages' leaves every answer out of the loss"),
        (
            {"loss_scale": -1},
            "column 'messages': the 'loss_scale' of its final answer is not a number from 0 to 1e.30: -1",
        ),
        ({"loss_scale": "high"}, "the 'loss_scale' of its final answer is not a number from 0 to 1e.30: 'high'"),
        ({"loss_scale": True}, "the 'loss_scale' of its final answer is not a number from 0 to 1e.30: True"),
    ],
)
def test_other_flags_are_refused(flags: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=rf"messages\.jsonl:2: .*{message}"):
        load_messages(tmp_path, messages(), messages(**flags))


# --- rows that cannot be used ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([["a", -1]], r"column 'answer': a part's weight is not a number from 0 to 1e\+30: -1;"),
        ([["a", 1], ["b", None]], r"a part's weight is not a number from 0 to 1e\+30: None;"),
        ([["a", "1"]], r"a part's weight is not a number from 0 to 1e\+30: '1';"),
        ([["a", True]], r"a part's weight is not a number from 0 to 1e\+30: True;"),
        ([["a", 1e31]], r"a part's weight is not a number from 0 to 1e\+30: 1e\+31;"),
        ([["a", 1], ["b"]], r"parts of an answer are \[text, weight\] or .*, but part 1 is \['b'\];"),
        ([["a", 1, 2]], r"but part 0 is \['a', 1, 2\];"),
        ([[1, "a"]], r"but part 0 is \[1, 'a'\];"),
        ([{"text": "a"}], r"but part 0 is \{'text': 'a'\};"),
        ([{"text": "a", "weight": 1, "label": 2}], r"but part 0 is \{'label': 2, 'text': 'a', 'weight': 1\};"),
        ([["a", 0], ["b", 0]], r"every part of the answer has the weight 0; leave such rows out;"),
        ([[" ", 1], ["\n", 2]], r"column 'answer' is empty;"),
        ([["a<end>b", 1]], r"the answer holds its end token in its middle: '<end>';"),
        ([], r"column 'answer' holds a list, not text or a number: \[\];"),
        (["a", "b"], r"column 'answer' holds a list, not text or a number: \['a', 'b'\];"),
        ([["a", 1], "b"], r"column 'answer' holds a list, not text or a number:"),
    ],
)
def test_rows_are_refused_with_their_reason(answer: Any, message: str, tmp_path: Path):
    fine = {"answer": [["a", 1], ["b", 2]]}
    with pytest.raises(UserError, match=rf"rows\.jsonl:2: .*{message}"):
        load(tmp_path, words(), fine, {"answer": answer}, prompt_format="text")
    data = load(tmp_path, words(), fine, {"answer": answer}, fine, prompt_format="text", on_bad_row="skip")
    assert [expert.id for expert in data.experts] == [0, 2]


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -0.5])
def test_what_parquet_may_hold_is_refused(weight: float):
    with pytest.raises(BadRow, match=r"a part's weight is not a number from 0 to 1e\+30: "):
        read_segments([["a", weight]], "answer")


def test_a_template_that_rewrites_the_answer_is_refused(tmp_path: Path):
    marked = "message.content + ('!' if '2' in message.content else '') + '<|"
    template = QWEN25.template.replace("message.content + '<|", marked)
    tokenizer = tokenizer_of(QWEN25._replace(template=template))
    load(tmp_path, tokenizer, {"answer": "It is 2"}, {"answer": [["It is", 1], [" 3", 2]]})
    with pytest.raises(UserError, match="the chat template changes an answer in parts, so that they cannot be found"):
        load(tmp_path, tokenizer, {"answer": [["It is", 1], [" 2", 2]]})


def test_a_tokenizer_without_places_is_refused():
    slow = SimpleNamespace(is_fast=False)
    turn, answer = Turn("", (), "", "", 2), Answer((0, 2), "a", "a")
    with pytest.raises(BadRow, match="answers in parts need a tokenizer that says where its tokens are"):
        TokenWeights(slow).of([Segment("a", 0.5)], answer, turn)


# --- in a batch -----------------------------------------------------------------------------------------------------


def test_weights_multiply_and_only_zeros_leave_the_count():
    samples = expert_training_samples(
        [
            ExpertSample(0, (1, 2, 3, 4, 5), 2, (0.0, 0.0, 2.0, 0.0, 0.5)),
            ExpertSample(1, (6, 7), 1),
        ]
    )
    assert [sample.loss_mask.tolist() for sample in samples] == [
        [False, False, True, False, True],
        [False, True],
    ]
    batch = build_global_batch(samples, BatchLayout(), micro_batch_size=2)
    assert batch.num_expert_tokens == 3
    third = 1 / 3
    expected = torch.tensor([0.0, 2 * third, 0.0, 0.5 * third, 0.0, third, 0.0])
    torch.testing.assert_close(batch.micro_batches[0].expert_weights, expected)


def test_weights_are_part_of_the_fingerprint():
    plain = ExpertSample(0, (1, 2, 3), 1)
    weights = [None, (0.0, 1.0, 1.0), (0.0, 1.0, 2.0)]
    assert len({fingerprint([ExpertSample(0, (1, 2, 3), 1, weight)]) for weight in weights}) == 3
    assert fingerprint([plain]) == fingerprint([ExpertSample(5, (1, 2, 3), 1, None)])
