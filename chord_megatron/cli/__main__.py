"""`python -m chord_megatron.cli`, where the command is not on PATH."""

from chord_megatron.cli import app

app()
