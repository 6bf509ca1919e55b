"""Write the tables of keys into docs/configuration.md: `python tools/make_reference.py`."""

from __future__ import annotations

from pathlib import Path

from chord_megatron.config.reference import with_tables

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


def main() -> None:
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
