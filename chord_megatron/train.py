"""`torchrun -m chord_megatron.train CONFIG.yaml [key=value ...]`: one process of a run."""

import sys

from chord_megatron.system.processes import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before what takes long to import
    from chord_megatron.training.main import main

    sys.exit(main())
