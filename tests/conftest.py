"""One thread per test process: two processes at a time, whose waiting threads would spin otherwise."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported
