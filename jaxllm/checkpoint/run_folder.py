"""The run folder: where each file of a run lies, who may write it, and when a start resumes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import IO

from jaxllm.errors import InputError
from jaxllm.files import atomic_file

_LOCK_NAME = ".lock"
_UNFINISHED = "config.yaml.*.tmp"
_LISTED = 5


class RunFolder:
    """Paths of a run folder. Reading needs no lock; `open_run` makes one that may write.

    Attributes:
      path: the folder itself.
      config, spec, metrics, loss_plot, log: files.
      tokenizer, checkpoints, tensorboard: folders.
      notes: sentences for the log.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.spec = self.path / "spec.json"
        self.tokenizer = self.path / "tokenizer"
        self.checkpoints = self.path / "checkpoints"
        self.metrics = self.path / "metrics.jsonl"
        self.tensorboard = self.path / "tb"
        self.loss_plot = self.path / "training_loss.svg"
        self.log = self.path / "log.txt"
        self.notes: list[str] = []
        self._lock: IO[str] | None = None

    def lock(self) -> None:
        """Become the folder's only writer until `close`; the system releases the lock of a killed process.

        Raises:
          InputError: another process writes this run.
        """
        file = (self.path / _LOCK_NAME).open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another process"
            file.close()
            raise InputError(f"{self.path}: this run is being written by {owner}; stop that one first") from None
        except OSError as error:  # some cluster file systems are mounted without locks
            self.notes.append(f"{self.path}: not protected against a second writer: {error.strerror}")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        self._lock = file

    def close(self) -> None:
        """Give up the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None


def open_run(path: str | Path, *, config_text: str, differences: Callable[[str], list[str]]) -> RunFolder:
    """Create a run folder, or open the one that holds this run already, for its only writer.

    When a run has several processes, process 0 alone calls this; the others use RunFolder(path).

    Args:
      path: new, empty, or the folder of a run.
      config_text: the resolved config as YAML; written to config.yaml (also when resuming, since some keys,
        such as the number of steps, may change).
      differences: takes the YAML of the run that is there and returns a line for each key that differs and must
        not.

    Raises:
      InputError: the folder holds another run or other files, another process writes it, or it cannot be written.
    """
    run = RunFolder(path)
    with contextlib.ExitStack() as undo:
        try:
            _refuse_foreign(run)
            run.path.mkdir(parents=True, exist_ok=True)
            undo.callback(run.close)
            run.lock()
            _refuse_other_config(run, differences)
            for left in run.path.glob(_UNFINISHED):
                left.unlink()
            with atomic_file(run.config) as file:
                file.write(config_text)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{run.path}: cannot be used as run folder: {error}") from error
        undo.pop_all()
    return run


def _refuse_foreign(run: RunFolder) -> None:
    """Accept a new folder, a run, or what a start that was killed before it wrote config.yaml leaves behind."""
    if not run.path.exists() or run.config.is_file():
        return
    others = sorted(
        entry.name for entry in run.path.iterdir() if entry.name != _LOCK_NAME and not entry.match(_UNFINISHED)
    )
    if others:
        shown = ", ".join(others[:_LISTED]) + (", ..." if len(others) > _LISTED else "")
        raise InputError(f"{run.path}: output folder holds other files ({shown}); use a new or empty folder")


def _refuse_other_config(run: RunFolder, differences: Callable[[str], list[str]]) -> None:
    if not run.config.is_file():
        return
    if lines := differences(run.config.read_text(encoding="utf-8")):
        listed = "".join(f"\n  {line}" for line in lines)
        raise InputError(
            f"{run.path}: output folder holds a run with another config; use another folder, or undo:{listed}"
        )
