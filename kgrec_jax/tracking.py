"""What a run tells: progress on the terminal, metrics in JSONL and TensorBoard (and W&B where it is installed)."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import pathlib
import secrets
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

NPZ_ERRORS = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)  # of reading a damaged .npz
_SECONDS_BETWEEN_LINES = 1.0  # of a log file: what is over in a blink needs no lines


def is_main_process() -> bool:
    """True on the process that speaks for the run; asks JAX only where several processes were started."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def write_json(path: str | os.PathLike, obj: Any) -> None:
    """Writes `obj` as JSON so that the file is either the old one or the whole new one.

    NumPy scalars and arrays become numbers and lists; NaN and infinities become null, which JSON lacks.
    """
    path = pathlib.Path(path)
    write_text(path, json.dumps(to_json(obj), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def write_npz(path: pathlib.Path, **arrays: Any) -> None:
    """Writes arrays as .npz so that the file is either the old one or the whole new one; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp.npz")
    np.savez(temporary, **arrays)
    temporary.replace(path)


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes UTF-8 text so that the file is either the old one or the whole new one; makes the folder."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def to_json(obj: Any) -> Any:
    """`obj` with everything that JSON does not know turned into what it knows."""
    if isinstance(obj, Mapping):
        return {str(k): to_json(v) for k, v in obj.items()}
    if isinstance(obj, np.ndarray):
        return to_json(obj.tolist())
    if isinstance(obj, (list, tuple)):
        return [to_json(v) for v in obj]
    if isinstance(obj, np.generic):
        return to_json(obj.item())
    if isinstance(obj, float) and not math.isfinite(obj):
        return None
    if isinstance(obj, pathlib.PurePath):
        return str(obj)
    return obj


def cut_back(path: pathlib.Path, step: int) -> None:
    """Drops the rows of a JSONL file that belong to steps after `step`, and a last line that a kill cut in two."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if row["step"] <= step:
            kept.append(line + "\n")
    write_text(path, "".join(kept))


class Tracker:
    """The voice of a run. Everything goes to stderr, so that stdout holds results alone.

    `workdir` receives metrics.jsonl and tensorboard/; `at(folder)` gives a tracker with the same voice that writes
    elsewhere. All methods do nothing on processes other than the first.
    """

    def __init__(self, workdir: str | os.PathLike, quiet: bool = False):
        from rich.console import Console

        self.workdir = pathlib.Path(workdir)
        self.quiet = quiet
        self._console = Console(stderr=True, highlight=False, markup=False, emoji=False)
        self._jsonl = self._board = self._wandb = None
        self._purge_step: int | None = None

    def at(self, workdir: str | os.PathLike) -> Tracker:
        """A tracker with this one's voice that writes into another folder."""
        other = Tracker(workdir, self.quiet)
        other._console = self._console
        return other

    def say(self, text: str) -> None:
        """One line for the reader of the terminal."""
        if not self.quiet and is_main_process():
            self._console.print(text, soft_wrap=True)

    def resume_from(self, step: int) -> None:
        """Forgets what was logged after `step`: the run goes on from there, and no step is told twice."""
        self.close()
        if is_main_process():
            cut_back(self.workdir / "metrics.jsonl", step)
        self._purge_step = step + 1

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Appends one row {"step": …, name: value, …}; a value that is not finite is written as null."""
        if not is_main_process():
            return
        if self._jsonl is None:
            self._open()
        values = {name: float(value) for name, value in values.items()}
        self._jsonl.write(json.dumps(to_json({"step": int(step), **values}), ensure_ascii=False) + "\n")
        self._jsonl.flush()
        for name, value in values.items():
            self._board.add_scalar(name, value, int(step))
        if self._wandb is not None:
            self._wandb.log(values, step=int(step))

    @contextlib.contextmanager
    def progress(self, label: str, total: int, start: int = 0) -> Iterator[Progress]:
        """A bar with the time left on a terminal, a plain line about every tenth of the way elsewhere."""
        bar = Progress(self, label, total, start)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        """Closes the files; a later `metrics` opens them again."""
        if self._jsonl is not None:
            self._jsonl.close()
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()
        self._jsonl = self._board = self._wandb = None

    def _open(self) -> None:
        from tensorboardX import SummaryWriter

        self.workdir.mkdir(parents=True, exist_ok=True)
        self._jsonl = open(self.workdir / "metrics.jsonl", "a", encoding="utf-8")
        self._board = SummaryWriter(str(self.workdir / "tensorboard"), purge_step=self._purge_step)
        project = os.environ.get("WANDB_PROJECT")
        if project and importlib.util.find_spec("wandb"):
            import wandb

            name, identity = f"{self.workdir.parent.name}-{self.workdir.name}", self.workdir / "wandb_id"
            if not identity.is_file():
                write_text(identity, secrets.token_hex(8))
            self._wandb = wandb.init(project=project, name=name, id=identity.read_text(), dir=str(self.workdir),
                                     resume="allow")


class Progress:
    """How far something is; made by `Tracker.progress`."""

    def __init__(self, tracker: Tracker, label: str, total: int, start: int):
        self._tracker, self._label, self._total, self._done, self._start = tracker, label, total, start, start
        self._began = self._told_at = time.monotonic()
        self._told = _tenth(start, total)
        self._bar = self._task = None
        if tracker.quiet or not is_main_process() or not tracker._console.is_terminal:
            return
        from rich import progress as rich_progress

        self._bar = rich_progress.Progress(
            rich_progress.TextColumn("{task.description}", markup=False), rich_progress.BarColumn(bar_width=30),
            rich_progress.MofNCompleteColumn(), rich_progress.TimeElapsedColumn(), rich_progress.TextColumn("left"),
            rich_progress.TimeRemainingColumn(), rich_progress.TextColumn("{task.fields[postfix]}", markup=False),
            console=tracker._console)
        self._task = self._bar.add_task(label, total=total, completed=start, postfix="")
        self._bar.start()

    def advance(self, n: int = 1, **postfix: float | str) -> None:
        """`n` more are done; `postfix` are the numbers to show beside them."""
        self._done += n
        if self._bar is not None:
            shown = {"postfix": _shown(postfix)} if postfix else {}
            self._bar.update(self._task, advance=n, **shown)
            return
        tenth, now = _tenth(self._done, self._total), time.monotonic()
        over = self._done >= self._total > self._done - n
        if over or (tenth > self._told and now - self._told_at >= _SECONDS_BETWEEN_LINES):
            self._told, self._told_at, seconds = tenth, now, now - self._began
            left = seconds / max(self._done - self._start, 1) * (self._total - self._done)
            text = f"{self._label}: {self._done} of {self._total}, {_clock(seconds)} gone, {_clock(left)} left"
            self._tracker.say(f"{text}{', ' if postfix else ''}{_shown(postfix)}")

    def close(self) -> None:
        """Leaves the bar on the terminal as it stands."""
        if self._bar is not None:
            self._bar.stop()


def _tenth(done: int, total: int) -> int:
    return 10 * done // max(total, 1)


def _shown(postfix: Mapping[str, float | str]) -> str:
    return ", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in postfix.items())


def _clock(seconds: float) -> str:
    seconds = int(round(seconds))
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02}:{seconds % 60:02}" if hours else f"{minutes}:{seconds % 60:02}"
