"""Files and folders that appear all at once, or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import InputError


class OutputExistsError(InputError):
    """There is something already where an output was to be."""


def sync_to_disk(path: Path) -> None:
    """Force a file's content, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Give a file to write that takes the place of `path` when the block succeeds, and is removed when it fails.

    Args:
      mode: "w", UTF-8 text, or "wb".

    Raises:
      OSError: it cannot be written.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def require_new_file(path: Path) -> None:
    """Raise OutputExistsError where a file, or anything else, is already there."""
    if path.exists():
        raise OutputExistsError(f"{path}: exists already; expected a new file")


def require_new_folder(folder: Path) -> None:
    """Raise OutputExistsError unless `folder` does not exist or is empty; InputError where that cannot be told."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            raise OutputExistsError(f"{folder}: exists and is not empty; expected a new or empty folder")
        if folder.exists() and not folder.is_dir():
            raise OutputExistsError(f"{folder}: found a file, expected a new or empty folder")
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder: {error.strerror}") from error


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder` when the block succeeds, and vanishes when it fails.

    Raises:
      OutputExistsError: `folder` is not empty, or another process made it meanwhile.
      InputError: it cannot be written.
    """
    require_new_folder(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with _ended_by_sigterm():
                yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync_to_disk(path)
            temporary.chmod(0o755)
            _rename(temporary, folder)
            sync_to_disk(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        raise InputError(f"{folder}: could not be written: {error.strerror or error}") from error


def _rename(temporary: Path, folder: Path) -> None:
    try:
        os.replace(temporary, folder)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise OutputExistsError(f"{folder}: another process made it meanwhile") from error


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM, where nobody listens to it, end the process as an exception does, so that what was begun goes."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: Any) -> None:
        del frame
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
