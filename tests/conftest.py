"""What all tests share: one thread per process, and the databases."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

pytest_plugins = ["databases"]
