"""Convert checkpoints between Hugging Face and Megatron: `chord-megatron convert` without the installed command.

python tools/convert_checkpoint.py hf-to-megatron SRC DST
python tools/convert_checkpoint.py megatron-to-hf SRC DST
"""

from chord_megatron.cli.convert import app

if __name__ == "__main__":
    app()
