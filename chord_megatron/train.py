"""`torchrun -m chord_megatron.train CONFIG.yaml [key=value ...]`: one process of a run."""

import sys

from chord_megatron.system.processes import end_before_the_run, end_with_launcher, stop_signals_to

if __name__ == "__main__":
    end_with_launcher()  # before what takes long to import
    with stop_signals_to(end_before_the_run):
        from chord_megatron.training.main import main
    sys.exit(main())
