"""What keys are: for `chord-megatron config`, for editors, and for the tables of docs/configuration.md."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from chord_megatron.config.groups import Config
from chord_megatron.config.loading import nearest_key
from chord_megatron.system.errors import UserError
from chord_megatron.system.sentences import shown
from chord_megatron.system.yaml_text import write_yaml

_LINK = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
_BLOCK = re.compile(r"(<!-- keys of (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


@dataclass(frozen=True)
class Key:
    """A key of the configuration."""

    name: str  # with its group
    default: str  # as YAML; "required" without one
    description: str  # Markdown
    schema: dict[str, Any]  # JSON Schema of its values

    @property
    def plain_description(self) -> str:
        """With the page that a link leads to behind its words: "how it is fetched" alone says nothing."""
        return _LINK.sub(lambda link: f"{link[1]} [docs/{_page(link[2])}]", self.description)


def _page(target: str) -> str:
    """Descriptions stand in configuration.md."""
    return f"configuration.md{target}" if target.startswith("#") else target


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a configuration file, for editors that complete YAML."""
    schema = Config.model_json_schema()
    schema["$defs"]["TrainConfig"]["required"].remove("train_iters")  # which num_train_epochs may stand for
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema, "title": "chord_megatron"}


def all_keys() -> list[Key]:
    """Every leaf, in the order of the configuration."""
    definitions = json_schema()["$defs"]
    keys = []
    for group, field in Config.model_fields.items():
        model: Any = field.annotation
        for leaf, leaf_field in model.model_fields.items():
            default = "required" if leaf_field.is_required() else write_yaml(leaf_field.default).removesuffix("...\n")
            schema = definitions[model.__name__]["properties"][leaf]
            keys.append(Key(f"{group}.{leaf}", default.strip(), " ".join(leaf_field.description.split()), schema))
    return keys


def find_keys(name: str) -> list[Key]:
    """The key of that name, those of a group, or those of any group that end so. Raises UserError."""
    found = [key for key in all_keys() if name in (key.name, key.name.split(".")[0], key.name.split(".")[1])]
    if not found:
        raise UserError(f"no configuration key is called {shown(name)}{nearest_key(name)}")
    return found


def with_tables(page: str) -> str:
    """A page whose blocks `<!-- keys of GROUP -->` hold the tables of their groups."""

    def table(block: re.Match[str]) -> str:
        rows = [f"| `{key.name}` | `{key.default}` | {key.description} |" for key in find_keys(block[2])]
        return "\n".join([block[1] + "| key | default | |", "|---|---|---|", *rows, block[3]])

    return _BLOCK.sub(table, page)
