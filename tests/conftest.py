"""For all tests: one compute thread a process, since several processes run at a time."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
