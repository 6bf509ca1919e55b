"""The rows of each system, as prompts and as experts: looked at, and three steps on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import read_lines, read_metrics, succeeded, train_here, write_rows
from typer.testing import CliRunner

from chord_megatron.cli import app

pytestmark = pytest.mark.e2e

FILES = Path(__file__).parents[1] / "data" / "formats"
# The keys that a file needs beyond its name, and a part of its line in the log.
FORMATS: dict[str, tuple[tuple[str, ...], str]] = {
    "ms_swift": ((), "2 rows read as messages: messages (chat messages), solution"),
    "ms_swift_query": ((), "1 row read as ms-swift: query (chat messages), response"),
    "ms_swift_pairs": ((), "1 row read as ShareGPT: conversation (chat messages), final assistant message"),
    "alpaca": ((), "2 rows read as Alpaca: instruction (text), output"),
    "sharegpt": ((), "2 rows read as ShareGPT: conversations (chat messages), final assistant message"),
    "verl": (
        ("chord.chord_sft_answer_column=extra_info.answer",),
        "2 rows read as verl RL: prompt (chat messages), reward_model.ground_truth",
    ),
    "verl_sft": ((), "2 rows read as verl SFT: messages (chat messages), final assistant message"),
    "slime": (("chord.chord_sft_answer_column=label",), "1 row read as slime: input (text), label"),
    "slime_turns": ((), "1 row read as slime: messages (chat messages), label"),
    "nemo_rl": ((), "2 rows read as NeMo-RL: input (text), output"),
    "trl": ((), "1 row read as TRL: prompt (text), completion"),
    "prime_rl": (
        ("data.format=prime_rl", "chord.chord_sft_format=prime_rl"),
        "1 row read as prime-rl: messages (chat messages), final assistant message",
    ),
    "trinity": ((), "2 rows read as Trinity: prompt (text), response"),
    "roll": (
        ("chord.chord_sft_answer_column=ground_truth",),
        "2 rows read as ROLL: messages (chat messages in JSON text), ground_truth",
    ),
    "trl_text": (
        ("data.prompt_format=text", "data.dataset={assets}/prompts.jsonl", "chord.chord_sft_max_rows=1"),
        "1 row read as TRL: text (a text of its own), text",
    ),
    "areal": (("chord.chord_sft_answer_column=answer",), "2 rows read as messages: messages (chat messages), answer"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_three_steps_on_the_rows_of_each_system(name, config, tmp_path, assets):
    keys, line = FORMATS[name]
    source = FILES / f"{name}.jsonl"
    overrides = [
        f"data.dataset={source}",
        f"chord.chord_sft_dataset={source}",
        "data.max_prompt_length=96",
        "chord.chord_sft_max_length=128",
        "train.train_iters=3",
        "train.save_steps=3",
        *(key.format(assets=assets) for key in keys),
    ]
    looked = CliRunner().invoke(app, ["data", "show", str(config), *overrides])
    assert looked.exit_code == 0 and line.split(" read as ")[1].split(":")[0] in looked.output
    run = train_here(config, *overrides)
    told = "".join(succeeded(run).stdout.split())
    assert "".join(line.split()) in told
    steps = [row for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(steps) == 3
    assert all(row["loss_expert"] > 0 for row in steps)
    assert {row["reference"] for row in read_lines(tmp_path / "run" / "completions.jsonl")}


@pytest.mark.parametrize(
    ("row", "keys", "sentence"),
    [
        (
            {"prompt": "a", "messages": [{"role": "user", "content": "b"}], "answer": "1"},
            (),
            "columns 'messages' and 'prompt' may each be the question; name one in data.prompt_column",
        ),
        ({"messages": "what is 1+1?", "ground_truth": "2"}, (), "column 'messages' must hold chat messages, not 'what"),
        ({"prompt": "a", "answer": "1"}, ("data.format=verl",), "data.format=verl: no row of that format, which has"),
    ],
)
def test_a_row_that_is_not_what_it_seems_is_one_sentence(row, keys, sentence, config, tmp_path):
    source = write_rows(tmp_path / "rows.jsonl", [row])
    run = train_here(config, f"data.dataset={source}", *keys)
    assert run.code == 2
    (error,) = run.errors
    assert f"rows.jsonl:1: {sentence}" in error
    assert not (tmp_path / "run").exists()
