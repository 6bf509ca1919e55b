"""What may change when a run resumes, what may not, and how the data are told from others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chord_megatron.config import Config, known_keys, load_config, to_yaml
from chord_megatron.data.fingerprint import fingerprint
from chord_megatron.planning.resuming import MAY_CHANGE, STAYS, changes
from chord_megatron.system.errors import UserError
from chord_megatron.training.beginning import finished
from chord_megatron.types import ExpertSample, Prompt

MINIMAL: dict[str, Any] = {
    "model": {"path": "m"},
    "data": {"dataset": "d.jsonl"},
    "train": {"output_dir": "runs/x", "global_batch_size": 8, "train_iters": 4},
}


@pytest.fixture
def config(tmp_path: Path) -> Config:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(MINIMAL), encoding="utf-8")
    return load_config(path, ["optimizer.lr=1e-6"])


def settings(config: Config) -> dict[str, Any]:
    """As a run's config.yaml has them."""
    groups = yaml.safe_load(to_yaml(config))
    return {f"{group}.{key}": value for group, leaves in groups.items() for key, value in leaves.items()}


def test_every_key_may_change_or_may_not():
    leaves = {key for key in known_keys() if "." in key}
    assert leaves == MAY_CHANGE | STAYS
    assert not MAY_CHANGE & STAYS


def test_the_documentation_lists_what_stays():
    text = (Path(__file__).parents[2] / "docs" / "configuration.md").read_text(encoding="utf-8")
    table = text.partition("## What may change when a run resumes")[2].partition("All others may change")[0]
    rows = [re.findall(r"`([a-z_]+)`", line) for line in table.splitlines() if line.startswith("| `")]
    assert {f"{group}.{key}" for group, *keys in rows for key in keys} == STAYS


def test_nothing_has_changed(config: Config):
    assert changes(settings(config), config, "runs/x") == []


def test_what_may_change_is_said(config: Config):
    before = settings(config) | {
        "optimizer.lr": 5e-7,
        "rollout.num_generations": 16,
        "train.save_steps": 2,
        "train.output_dir": "runs/before/it/was/moved",
        "rewards.reward_funcs": ["format"],
        "model.recompute": True,
        "rollout.engine": "vllm",
    }
    assert changes(before, config, "runs/x") == [
        "model.recompute true -> false",
        'rewards.reward_funcs ["format"] -> ["accuracy"]',
        "rollout.engine vllm -> megatron",
        "rollout.num_generations 16 -> 8",
        "optimizer.lr 5e-07 -> 1e-06",
        "train.save_steps 2 -> null",
    ]


@pytest.mark.parametrize("key", sorted(STAYS))
def test_what_may_not_change_is_refused(key: str, config: Config):
    before = settings(config) | {key: "another"}
    now = settings(config)[key]
    with pytest.raises(UserError) as error:
        changes(before, config, "runs/x")
    shown = now if isinstance(now, str) else json.dumps(now)
    assert str(error.value) == (
        f"runs/x holds a run with {key}=another, but this one has {shown}; restore it, or choose another "
        "train.output_dir"
    )


def test_keys_that_one_of_two_releases_does_not_know_are_not_compared(config: Config):
    before = settings(config) | {"train.of_another_release": 3, "future.key": 1}
    del before["train.seed"], before["optimizer.lr"]
    assert changes(before, config, "runs/x") == []
    assert changes({}, config, "runs/x") == []


PROMPTS = [Prompt(0, "a", (1, 2), "x"), Prompt(1, "b", (3,), "y")]
EXPERTS = [ExpertSample(0, (1, 2, 3), 2)]


def test_a_fingerprint_is_the_same_everywhere():
    one, two = (number.to_bytes(8, "little") for number in (1, 2))
    eight, three, sixteen = ((number).to_bytes(8, "little") for number in (8, 3, 16))
    prompts = sixteen + one + two + one + b"x" + eight + three + one + b"y"
    assert fingerprint(PROMPTS) == hashlib.sha256(prompts).hexdigest()
    experts = (24).to_bytes(8, "little") + one + two + three + one + b"2"
    assert fingerprint(EXPERTS) == hashlib.sha256(experts).hexdigest()
    assert fingerprint([]) == hashlib.sha256().hexdigest()


@pytest.mark.parametrize(
    "others",
    [
        PROMPTS[::-1],
        [PROMPTS[0]],
        [PROMPTS[0], dataclasses.replace(PROMPTS[1], tokens=(4,))],
        [PROMPTS[0], dataclasses.replace(PROMPTS[1], reference="z")],
        [dataclasses.replace(PROMPTS[0], tokens=(1,)), dataclasses.replace(PROMPTS[1], tokens=(2, 3))],
        [dataclasses.replace(PROMPTS[0], reference="xy"), dataclasses.replace(PROMPTS[1], reference="")],
        EXPERTS,
    ],
)
def test_other_rows_have_another_fingerprint(others: list[Any]):
    assert fingerprint(others) != fingerprint(PROMPTS)


def test_where_the_answer_begins_counts():
    assert fingerprint([dataclasses.replace(EXPERTS[0], prompt_length=1)]) != fingerprint(EXPERTS)


def test_what_no_step_reads_does_not_count():
    assert fingerprint([dataclasses.replace(each, id=7, columns={"a": 1}) for each in PROMPTS]) == fingerprint(PROMPTS)


def finished_directory(config: Config, tmp_path: Path) -> Config:
    directory = tmp_path / "run"
    now = config.model_copy(update={"train": config.train.model_copy(update={"output_dir": str(directory)})})
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "checkpoints" / "finished").write_text("4\n", encoding="utf-8")
    (directory / "config.yaml").write_text(to_yaml(now), encoding="utf-8")
    return now


def changed(config: Config, group: str, **keys: Any) -> Config:
    return config.model_copy(update={group: getattr(config, group).model_copy(update=keys)})


def test_a_finished_run_says_so_and_what_is_other_now(config: Config, tmp_path: Path):
    now = finished_directory(config, tmp_path)
    directory = now.train.output_dir
    assert finished(changed(now, "train", train_iters=5)) is None
    assert finished(now) == f"{directory} is finished; raise train.train_iters to train on"
    others = changed(changed(now, "rewards", reward_funcs=["format"]), "rollout", num_generations=4)
    assert finished(others) == (
        f'{directory} is finished (with other settings than now: rewards.reward_funcs ["accuracy"] -> ["format"], '
        "rollout.num_generations 8 -> 4); raise train.train_iters to train on"
    )


@pytest.mark.parametrize(
    ("key", "value", "shown"),
    [
        ("dataset", "other.jsonl", "data.dataset=d.jsonl, but this one has other.jsonl"),
        ("dataset", ["d.jsonl", "e.jsonl"], 'data.dataset=d.jsonl, but this one has ["d.jsonl", "e.jsonl"]'),
        ("reference_column", "solution", "data.reference_column=null, but this one has solution"),
    ],
)
def test_a_finished_run_of_other_data_is_not_this_one(key: str, value: Any, shown: str, config: Config, tmp_path: Path):
    now = finished_directory(config, tmp_path)
    with pytest.raises(UserError) as error:
        finished(changed(now, "data", **{key: value}))
    assert str(error.value) == (
        f"{now.train.output_dir} holds a run with {shown}; restore it, or choose another train.output_dir"
    )
