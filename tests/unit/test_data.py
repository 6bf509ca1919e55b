"""Sources, prompts, expert samples and cursors, on files and a character-level tokenizer made here."""

from __future__ import annotations

import json

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from chord_megatron.config import ChordConfig, DataConfig
from chord_megatron.data.bad_rows import BadRows
from chord_megatron.data.cursor import ShuffledCursor
from chord_megatron.data.load import load_run_data
from chord_megatron.data.sources import Rows
from chord_megatron.data.sources import load_rows as load_rows_with
from chord_megatron.system.errors import UserError
from chord_megatron.types import ExpertSample

CHARACTERS = [chr(code) for code in range(32, 127)] + ["\n"]
SPECIAL = ["[unk]", "<s>", "<|user|>", "<|system|>", "<|assistant|>", "<|end|>"]
BOS, USER, SYSTEM, ASSISTANT, END = 1, 2, 3, 4, 5
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(chat_template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    vocabulary = {token: index for index, token in enumerate(SPECIAL + CHARACTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=chat_template, eos_token="<|end|>")


def ids(text: str) -> tuple[int, ...]:
    return tuple(len(SPECIAL) + CHARACTERS.index(character) for character in text)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


def load_rows(source: str, split: str) -> Rows:
    return load_rows_with(source, split, BadRows(source, "stop"))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """Writes rows to toy.jsonl and loads them, as prompts and, with `experts`, as experts."""
    monkeypatch.chdir(tmp_path)

    def load(rows, tokenizer, *, experts=False, max_length=100, **data):
        (tmp_path / "toy.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"dataset": "toy.jsonl", "max_prompt_length": 100, **data}
        chord = ChordConfig(chord_sft_dataset="toy.jsonl" if experts else None)
        return load_run_data(DataConfig(**settings), chord, tokenizer, expert_max_length=max_length)

    return load


@pytest.fixture
def prompts_of(toy):
    return lambda rows, tokenizer, **data: toy(rows, tokenizer, **data).prompts


@pytest.fixture
def experts_of(toy):
    """Of rows that need no reference."""

    def load(rows, tokenizer, **changes):
        rows = [{"reference": "1", **row} for row in rows]
        return toy(rows, tokenizer, experts=True, **{"reference_column": "reference", **changes}).experts

    return load


# sources


def test_jsonl_rows_keep_their_order_and_blank_lines_are_skipped(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n{"a": "\\u00e9"}\r\n')
    assert load_rows(str(path), "train") == [{"a": 1}, {"a": "é"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"rows\.jsonl:2: not valid JSON: Expecting value"),
        (b'{"a": 1}\n\n[1]\n', r"rows\.jsonl:3: no JSON object but a JSON list"),
        (b'{"a": "\xff"}\n', r"rows\.jsonl:1: not UTF-8"),
        (b"\n", r"rows\.jsonl has no rows"),
    ],
)
def test_bad_jsonl_names_file_and_line(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        load_rows(str(tmp_path / "rows.jsonl"), "train")


def test_parquet_rows(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.parquet"
    Dataset.from_list([{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]).to_parquet(str(path))
    rows = load_rows(str(path), "train")
    assert list(rows) == [{"prompt": "a", "answer": 1}, {"prompt": "b", "answer": 2}]
    path.write_bytes(b"not parquet at all")
    with pytest.raises(UserError, match=r"rows\.parquet is not a readable parquet file"):
        load_rows(str(path), "train")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent.jsonl", r"cannot read absent\.jsonl: No such file"),
        ("absent.parquet", r"cannot read absent\.parquet: no such file"),
        ("absent.csv", r"cannot read absent\.csv: No such file"),
        ("rows.txt", r"cannot read rows\.txt: data files must end in \.jsonl, \.json, \.csv"),
    ],
)
def test_unreadable_files_name_the_remedy(source, message):
    with pytest.raises(UserError, match=message):
        load_rows(source, "train")


def test_hub_name_and_subset_reach_datasets_and_failures_are_one_sentence(monkeypatch):
    calls = []

    def load_dataset(name, subset, split):
        calls.append((name, subset, split))
        if name == "org/data-v1.5":
            raise ConnectionError("no route\nto host")
        return Dataset.from_list([{"a": 1}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(load_rows("openai/gsm8k:main", "test")) == [{"a": 1}]
    with pytest.raises(UserError, match=r"'org/data-v1.5' .*check the name and the network.*no route to host"):
        load_rows("org/data-v1.5", "train")
    assert calls == [("openai/gsm8k", "main", "test"), ("org/data-v1.5", None, "train")]


# prompts


def test_chat_prompt_is_the_template_without_further_special_tokens(prompts_of, tokenizer):
    rows = [{"prompt": "1+1?", "answer": 2, "level": "easy"}]
    (prompt,) = prompts_of(rows, tokenizer)
    assert prompt.text == "<|user|>1+1?<|end|><|assistant|>"
    assert prompt.tokens == (USER, *ids("1+1?"), END, ASSISTANT)
    assert (prompt.id, prompt.reference, prompt.columns) == (0, "2", {"answer": 2, "level": "easy"})


def test_text_prompt_has_the_tokenizers_own_special_tokens(prompts_of, tokenizer):
    rows = [{"prompt": "1+1=", "answer": "2"}]
    (prompt,) = prompts_of(rows, tokenizer, prompt_format="text")
    assert prompt.tokens == (BOS, *ids("1+1="))
    (prompt,) = prompts_of(rows, tokenizer, prompt_format="text", system_prompt="Add.")
    assert prompt.text == "Add.\n\n1+1="


def test_system_prompt_yields_to_the_rows_own(prompts_of, tokenizer):
    own = [{"role": "system", "content": "own"}, {"role": "user", "content": "b"}]
    rows = [{"prompt": "a", "answer": "1"}, {"prompt": own, "answer": "1"}]
    (first, second) = prompts_of(rows, tokenizer, system_prompt="ours")
    assert first.text == "<|system|>ours<|end|><|user|>a<|end|><|assistant|>"
    assert second.text == "<|system|>own<|end|><|user|>b<|end|><|assistant|>"


def test_messages_rows_drop_the_final_assistant_message(prompts_of, tokenizer):
    question = [{"role": "user", "content": "a"}]
    answer = {"role": "assistant", "content": "worked"}
    rows = [{"messages": [*question, answer], "solution": "1"}, {"messages": question, "solution": "2"}]
    prompts = prompts_of(rows, tokenizer, reference_column="solution")
    assert [prompt.text for prompt in prompts] == ["<|user|>a<|end|><|assistant|>"] * 2
    assert [prompt.reference for prompt in prompts] == ["1", "2"]
    assert prompts[0].columns == {"solution": "1"}


def test_reference_pattern_takes_group_one(prompts_of, tokenizer):
    rows = [{"prompt": "a", "answer": "6 * 12 = 72\n#### 72 "}]
    (prompt,) = prompts_of(rows, tokenizer, reference_pattern=r"####\s*(.+)")
    assert prompt.reference == "72"


def test_long_prompts_are_dropped_and_counted_and_ids_stay_row_numbers(toy, tokenizer):
    rows = [{"prompt": "a" * 20, "answer": "1"}, {"prompt": "a" * 7, "answer": "1"}]
    data = toy(rows, tokenizer, max_prompt_length=10)
    assert [(prompt.id, len(prompt.tokens)) for prompt in data.prompts] == [(1, 10)]
    assert data.notes[1] == "toy.jsonl: dropped 1 rows above data.max_prompt_length=10"
    with pytest.raises(UserError, match=r"all 2 usable rows of toy.jsonl .* data.max_prompt_length=9"):
        toy(rows, tokenizer, max_prompt_length=9)


USER_A = {"role": "user", "content": "a"}


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"question": "a", "answer": "1"}, {}, r":2: no column 'prompt'; it has 'question', 'answer'"),
        ({"prompt": "a"}, {}, r"toy.jsonl:2: no column 'answer'; it has 'prompt'"),
        ({"prompt": "a", "answer": None}, {}, r":2: column 'answer' is empty"),
        ({"prompt": "a", "answer": "  "}, {}, r":2: column 'answer' is empty"),
        (
            {"prompt": "", "answer": "1"},
            {},
            r":2: column 'prompt' must hold text or chat messages, not ''",
        ),
        ({"prompt": 3, "answer": "1"}, {}, r"must hold text or chat messages, not 3"),
        ({"prompt": [], "answer": "1"}, {}, r":2: column 'prompt' holds no messages"),
        (
            {"prompt": [{"role": "user"}], "answer": "1"},
            {},
            r":2: .* needs messages of 'role' and 'content'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "a"}], "answer": "1"},
            {},
            r"nothing before the assist",
        ),
        (
            {"prompt": [USER_A], "answer": "1"},
            {"prompt_format": "text"},
            r":2: .* data.prompt_format: chat",
        ),
        ({"prompt": [{"role": "tool", "content": "a"}], "answer": "1"}, {}, r":2: .*refuses .*: no tools"),
        ({"prompt": "a", "answer": "no"}, {"reference_pattern": r"(\d)"}, r":2: .* finds nothing in 'no'"),
    ],
)
def test_unusable_rows_are_named(prompts_of, tokenizer, row, changes, message):
    with pytest.raises(UserError, match=message):
        prompts_of([{"prompt": "fine", "answer": "1"}, row], tokenizer, **changes)


def test_no_rows_and_no_chat_template(prompts_of, experts_of, tokenizer):
    with pytest.raises(UserError, match=r"toy.jsonl has no rows"):
        prompts_of([], tokenizer)
    with pytest.raises(UserError, match=r"toy.jsonl has no rows"):
        experts_of([], tokenizer)
    with pytest.raises(UserError, match=r"no chat template; set data.prompt_format: text"):
        prompts_of([{"prompt": "a", "answer": "1"}], make_tokenizer(chat_template=None))


# experts


@pytest.mark.parametrize("prompt_format", ["chat", "text"])
@pytest.mark.parametrize("system_prompt", [None, "Think."])
def test_expert_tokens_are_the_prompt_tokens_then_the_answer(
    prompts_of, experts_of, tokenizer, prompt_format, system_prompt
):
    rows = [{"prompt": "1+1?", "answer": "It is 2"}]
    same = {"prompt_format": prompt_format, "system_prompt": system_prompt}
    (prompt,) = prompts_of(rows, tokenizer, **same)
    (expert,) = experts_of(rows, tokenizer, **same)
    assert expert == ExpertSample(0, (*prompt.tokens, *ids("It is 2"), END), len(prompt.tokens))


def test_end_token_is_not_doubled(experts_of, tokenizer):
    (expert,) = experts_of([{"prompt": "a", "answer": "b<|end|>"}], tokenizer)
    assert expert.tokens == (USER, *ids("a"), END, ASSISTANT, *ids("b"), END)


def test_messages_rows_answer_with_the_final_assistant_message(experts_of, tokenizer):
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    rows = [{"messages": [{"role": role, "content": content} for role, content in turns]}]
    (expert,) = experts_of(rows, tokenizer)
    history = (USER, *ids("a"), END, ASSISTANT, *ids("b"), END, USER, *ids("c"), END, ASSISTANT)
    assert expert == ExpertSample(0, (*history, *ids("d"), END), len(history))


def test_long_experts_are_dropped_and_counted(toy, tokenizer):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "a", "answer": "bc"}]
    data = toy(rows, tokenizer, experts=True, max_length=6)
    assert [(expert.id, len(expert.tokens)) for expert in data.experts] == [(0, 6)]
    assert data.notes[1] == "toy.jsonl: dropped 1 rows above chord.chord_sft_max_length=6"
    with pytest.raises(UserError, match=r"all 2 usable rows of toy.jsonl .* chord.chord_sft_max_length=5"):
        toy(rows, tokenizer, experts=True, max_length=5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "answer": ""}, r"toy.jsonl:1: column 'answer' is empty"),
        ({"messages": [USER_A]}, r":1: column 'messages' does not end with an assistant's answer"),
        ({"messages": [USER_A, {"role": "assistant", "content": " "}]}, r"does not end with an assistant's"),
        ({"prompt": "a"}, r":1: no column 'answer'; it has 'reference', 'prompt'"),
    ],
)
def test_experts_without_an_answer_are_named(experts_of, tokenizer, row, message):
    with pytest.raises(UserError, match=message):
        experts_of([row], tokenizer)


# cursor


def test_epochs_are_different_permutations_that_depend_on_the_seed():
    cursor = ShuffledCursor(size=7, seed=3)
    epochs = [cursor.next(7) for _ in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert ShuffledCursor(size=7, seed=4).next(7) != epochs[0]


def test_the_order_is_frozen():
    # A change here would change which rows a resumed run sees.
    assert ShuffledCursor(size=8, seed=0).next(10) == [0, 2, 1, 4, 7, 6, 5, 3, 6, 5]


def test_draws_do_not_depend_on_their_size():
    whole = ShuffledCursor(size=5, seed=1).next(23)  # more than four epochs at once
    cursor = ShuffledCursor(size=5, seed=1)
    assert [row for count in (0, 1, 4, 5, 13) for row in cursor.next(count)] == whole


@pytest.mark.parametrize("drawn", [0, 3, 5, 12])  # 5: exactly the end of an epoch
def test_a_resumed_cursor_goes_on_with_the_same_rows(drawn):
    cursor = ShuffledCursor(size=5, seed=1)
    cursor.next(drawn)
    state = json.loads(json.dumps(cursor.state_dict()))
    resumed = ShuffledCursor(size=5, seed=1)
    resumed.next(2)
    resumed.load_state_dict(state)
    assert resumed.next(11) == cursor.next(11)
    assert resumed.state_dict() == cursor.state_dict()


@pytest.mark.parametrize(("size", "seed", "name"), [(6, 1, "size was 5, now 6"), (5, 2, "seed was 1, now 2")])
def test_a_cursor_of_other_data_is_refused(size, seed, name):
    state = ShuffledCursor(size=5, seed=1).state_dict()
    with pytest.raises(UserError, match=f"data set or the seed changed since the checkpoint: {name}"):
        ShuffledCursor(size=size, seed=seed).load_state_dict(state)
