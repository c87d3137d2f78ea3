"""A stand-in for `python -m droptune worker start`: a real process that does as it is told.

`make_fake_python(folder)` writes an executable that a launcher takes as its `python`. Each start
of a worker appends what it was given to `starts.jsonl` and takes the next word of the plan
(`plans/<worker>`, or `plan`; the last word is repeated):

    0, 75, 78, 1, …   end at once with this exit code
    interval:CODE     finish an interval, then end
    same:CODE         end at once, with the same last words at every start
    wait              until TERM, USR2, HUP or INT, then hand back and end with 75
    work:SECONDS      finish an interval every 0.2 s, end with 0 after so many seconds of all
                      starts together; on a signal hand back and end with 75
    deaf              ignore every signal that can be ignored
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "MLFLOW_TRACKING_URI",
    "DROPTUNE_MIRROR",
    "DROPTUNE_IDLE_SECONDS",
    "SLURM_RESTART_COUNT",
)


def make_fake_python(folder: Path, *plan: str) -> Path:
    """The executable; it keeps its plan and its notes in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plan").write_text("\n".join(plan))
    script = folder / "python"
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    program += f"from fake_worker import main; main({str(folder)!r})\n"
    script.write_text(f"#!{sys.executable} -IS\n{program}")
    script.chmod(0o755)
    return script


def starts(folder: Path) -> list[dict]:
    """What each start of a worker found, in order."""
    path = folder / "starts.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def events(folder: Path) -> list[str]:
    """What happened, in order: `TERM 3`, `exit 75 3` with the number of the start."""
    path = folder / "events"
    return path.read_text().splitlines() if path.exists() else []


def main(folder_name: str) -> None:
    import signal
    import time

    folder = Path(folder_name)
    job = os.environ.get("DROPTUNE_JOB", "")
    worker = job.replace("/", "-").replace(" ", "-")
    mine = folder / f"count-{worker}"
    with mine.open("a") as count:
        count.write("x")
    number = mine.stat().st_size
    words = (folder / "plan").read_text().split("\n")
    action, _, detail = words[min(number, len(words)) - 1].partition(":")
    got: list[str] = []

    def note(signal_number: int, _frame: object) -> None:
        name = signal.Signals(signal_number).name[3:]
        got.append(name)
        _append(folder / "events", f"{name} {number}")

    for name in ("SIGTERM", "SIGUSR2", "SIGHUP", "SIGINT"):
        signal.signal(getattr(signal, name), note)
    _append(folder / "starts.jsonl", json.dumps(_found(job, number)))
    done = folder / f"done-{worker}"
    while action in ("wait", "deaf", "work"):
        time.sleep(0.05 if action != "work" else 0.2)
        if action == "work" and not got:
            _interval()
            _append(done, "x")
            if done.stat().st_size / 2 * 0.2 >= float(detail):
                _end(folder, 0, number)
        if got and action != "deaf":
            _end(folder, 75, number)
    if action == "interval":
        _interval()
    words = "a bug" if action == "same" else f"words of start {number}"
    print(f"12:00:{number:02d} last {words}", flush=True)
    _end(folder, int(detail or action), number)


def _found(job: str, number: int) -> dict:
    variables = {key: os.environ[key] for key in VARIABLES if key in os.environ}
    url_file = os.environ.get("DROPTUNE_STORAGE_FILE")
    storage = Path(url_file).read_text().strip() if url_file else os.environ["DROPTUNE_STORAGE"]
    found = {"argv": sys.argv[1:], "job": job, "start": number, "storage": storage}
    return {**found, "pid": os.getpid(), "folder": os.getcwd(), **variables}


def _interval() -> None:
    Path(os.environ["DROPTUNE_PROGRESS_FILE"]).touch()


def _append(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def _end(folder: Path, code: int, number: int) -> None:
    _append(folder / "events", f"exit {code} {number}")
    sys.exit(code)
