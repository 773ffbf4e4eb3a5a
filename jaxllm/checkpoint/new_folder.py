"""Folders that appear all at once, or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from jaxllm.checkpoint.manifest import sync_to_disk
from jaxllm.errors import InputError


def require_new(folder: Path) -> None:
    """Raise InputError unless `folder` does not exist or is empty."""
    try:
        is_new = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    except OSError as error:
        raise InputError(f"{folder}: cannot be used as output folder: {error.strerror}") from error
    if not is_new:
        raise InputError(f"{folder}: exists and is not empty; refusing to mix two checkpoints")


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """Let SIGTERM end the process as an exception does, so that what was begun is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: Any) -> None:
        del frame
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Give a folder to write into that becomes `folder` when all went well, and vanishes when not.

    Raises:
      InputError: `folder` is not empty or cannot be written.
    """
    require_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with _terminating():
                yield temporary
            for path in (*temporary.rglob("*"), temporary):
                sync_to_disk(path)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
            sync_to_disk(folder.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder}: could not be written: {error}") from error
