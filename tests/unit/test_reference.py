"""The reference of configuration keys: one source for the page, the command and the schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator
from typer.testing import CliRunner

from chord_megatron.cli import app
from chord_megatron.config import known_keys
from chord_megatron.config.reference import all_keys, find_keys, json_schema, with_tables
from chord_megatron.system.errors import UserError

ROOT = Path(__file__).parents[2]
NO_RECIPES = {"kubernetes", "experiment.yaml", "claims.yaml"}
RECIPES = sorted(path for path in ROOT.glob("examples/**/*.yaml") if not NO_RECIPES & {*path.parts})


def test_the_page_is_what_the_keys_say():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == with_tables(page), "run python tools/make_reference.py"


def test_every_key_has_a_description_and_a_row():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    keys = all_keys()
    assert [key.name for key in keys] == [key for key in known_keys() if "." in key]
    assert [key.name for key in keys if not key.description] == []
    assert [key.name for key in keys if f"| `{key.name}` |" not in page] == []


def test_a_key_is_found_without_its_group():
    assert [key.name for key in find_keys("lr")] == ["optimizer.lr"]
    assert find_keys("grpo.epsilon")[0].default == "0.2"
    assert find_keys("train.output_dir")[0].default == "required"
    assert {key.name.split(".")[0] for key in find_keys("train")} == {"train"}
    with pytest.raises(UserError, match=r"no configuration key is called 'optimizer.lrr'; did you mean 'optimizer.lr'"):
        find_keys("optimizer.lrr")


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_schema_takes_our_recipes(recipe: Path):
    Draft202012Validator(json_schema()).validate(yaml.safe_load(recipe.read_text(encoding="utf-8")))


@pytest.mark.parametrize(
    "wrong",
    [{"grpo": {"epsilom": 0.2}}, {"grpo": {"epsilon": 1.0}}, {"grpo": {"loss_type": "grop"}}, {"train": {"seed": -1}}],
)
def test_the_schema_refuses_what_is_wrong(wrong: dict[str, dict[str, object]]):
    right: dict[str, dict[str, object]] = {
        "model": {"path": "m"},
        "train": {"output_dir": "o", "global_batch_size": 8, "train_iters": 1},
    }
    validator = Draft202012Validator(json_schema())
    assert validator.is_valid(right)
    assert not validator.is_valid(right | {group: right.get(group, {}) | keys for group, keys in wrong.items()})


def test_the_command():
    run = CliRunner().invoke
    assert run(app, ["config", "--explain", "loss_type"]).stdout.startswith("grpo.loss_type  (default: dapo)\n")
    assert json.loads(run(app, ["config", "--schema"]).stdout) == json_schema()
    assert len(json.loads(run(app, ["config", "--json"]).stdout)) == len(all_keys())
    assert run(app, ["config", "--explain", "nothing"]).exit_code == 2


def test_words_of_links_say_where_they_lead():
    (path,), (dataset,) = find_keys("model.path"), find_keys("data.dataset")
    assert path.plain_description.endswith("(how it is fetched [docs/configuration.md#a-model-of-the-hub])")
    assert "where it has subsets (which [docs/data.md#files])" in dataset.plain_description


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optimizer.lr"),  # of another trainer
        ("chord_mu_pek", "chord.chord_mu_peak"),
        ("grpo.lr", "optimizer.lr"),
        ("optimiser", "optimizer"),
    ],
)
def test_another_name_is_refused_with_the_key_that_is_meant(name: str, meant: str):
    with pytest.raises(UserError, match=rf"^no configuration key is called '{name}'; did you mean '{meant}'\?$"):
        find_keys(name)
