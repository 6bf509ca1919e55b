"""`torchrun -m chord_megatron.train CONFIG.yaml [key=value ...]`: one process of a run."""

import sys

from chord_megatron.training.main import main

if __name__ == "__main__":
    sys.exit(main())
