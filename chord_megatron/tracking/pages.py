"""Self-contained HTML pages from templates/: nothing is fetched, everything is escaped, only our own script may run."""

from __future__ import annotations

import base64
import hashlib
from typing import Any, NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from chord_megatron.tracking.drawing import DARK, LIGHT, NUM_HUES, Panel, draw_panel

_ENVIRONMENT = Environment(
    loader=PackageLoader("chord_megatron.tracking", "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
# `tojson` writes <, > and & as escapes, so that no text ends the script that holds it.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"separators": (",", ":")}


class Figure(NamedTuple):
    """A panel in both themes, as `data:` addresses."""

    title: str
    light: str
    dark: str


def figure_of(panel: Panel) -> Figure:
    """Draw a panel for a page."""
    return Figure(panel.title, *map(_data_address, draw_panel(panel)))


def render(template: str, *, script: str | None = None, **values: Any) -> bytes:
    """The bytes of a page. `script` is the file in templates/ that it runs; its hash lets it, and no other, run."""
    style = _ENVIRONMENT.get_template("style.css").render(light=LIGHT, dark=DARK, num_hues=NUM_HUES)
    code = None if script is None else _ENVIRONMENT.get_template(script).render()
    page = _ENVIRONMENT.get_template(template).render(
        style=Markup(style),
        style_hash=_hash(style),
        script=None if code is None else Markup(code),
        script_hash=None if code is None else _hash(code),
        **values,
    )
    # HTML has no NUL, UTF-8 no lone surrogates.
    return page.replace("\0", "\ufffd").encode("utf-8", errors="replace")


def _hash(text: str) -> Markup:
    """What a Content-Security-Policy calls an inline text."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")


def _data_address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"
