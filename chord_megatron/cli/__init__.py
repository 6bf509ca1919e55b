"""The command line. A file per command; main.py puts them together."""

from chord_megatron.cli.main import app

__all__ = ["app"]
