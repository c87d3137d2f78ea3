"""What all tests share: one thread per process, and the databases."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
# What is printed must not depend on the terminal that the tests are run from.
for name in ("COLUMNS", "LINES"):
    os.environ.pop(name, None)
# Started in the background by a script, this process and all that it starts would ignore Ctrl-C,
# and under nohup a hang-up.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

pytest_plugins = ["databases"]

if os.environ.get("DROPTUNE_TEST_DEVICE") == "sim":
    import tempfile
    from pathlib import Path

    import accelerator

    accelerator.load(Path(os.environ.get("DROPTUNE_TEST_BUILD", tempfile.gettempdir())))
