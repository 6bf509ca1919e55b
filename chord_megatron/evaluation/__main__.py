"""`python -m chord_megatron.evaluation REQUEST`: one process that `chord-megatron evaluate` starts."""

import sys

from chord_megatron.system.processes import end_with_launcher

if __name__ == "__main__":
    end_with_launcher()  # before what takes long to import
    from chord_megatron.evaluation.main import main

    sys.exit(main())
