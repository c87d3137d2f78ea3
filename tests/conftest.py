"""What all tests share: one thread per process, and the databases."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is printed must not depend on the terminal that the tests are run from.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)

pytest_plugins = ["databases"]
