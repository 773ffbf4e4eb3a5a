"""Write training checkpoints in the background: atomic, checked, and with old ones removed."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import sys
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from jaxllm.checkpoint.manifest import write_manifest
from jaxllm.checkpoint.reader import (
    DATA_NAME,
    META_NAME,
    CheckpointReader,
    array_table,
    new_array_handler,
    state_trees,
)
from jaxllm.errors import InputError
from jaxllm.files import sync_to_disk
from jaxllm.sharding.processes import OtherProcessError, gather, is_main, on_main, together
from jaxllm.types import TrainState

_SAVING, _FAILED, _REPLACED, _DELETING = ".saving", ".failed", ".replaced", ".deleting"
_UNFINISHED = re.compile(r"([0-9]+)(\.saving.*|\.failed|\.replaced|\.deleting)")
_TIMEOUT_SECONDS = 3600
_ROOM = 1.02  # bytes needed per byte of arrays: orbax adds indices


class CheckpointManager(CheckpointReader):
    """Save and restore the checkpoints of one run; every process of the run makes one.

    The folder must be on a file system that all processes share. `notes` holds sentences for the log: what was
    cleaned up at the start, which abandoned checkpoints were removed.
    """

    def __init__(self, folder: str | Path, *, keep_last: int, keep_every: int | None):
        """Open `folder`, creating it if needed, and remove what interrupted saves left behind.

        Args:
          folder: the run's checkpoints/.
          keep_last: newest checkpoints kept, at least 1.
          keep_every: checkpoints whose step is a multiple of this are kept as well; None: no others.

        Raises:
          InputError: the folder cannot be written, or is not shared by all processes.
        """
        super().__init__(folder)
        if keep_last < 1:
            raise InputError(f"checkpoint.keep_last: expected at least 1, found {keep_last}")
        self.notes: list[str] = []
        self._keep_last = keep_last
        self._keep_every = keep_every
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._writer: Any = None
        self._barrier: Any = None
        on_main(self._prepare)
        together(self._require_shared_folder)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *exception: object) -> None:
        if error_type is None:
            self.close()
        else:
            self._release()

    def save(self, state: TrainState, *, data_state: dict, meta: dict) -> None:
        """Copy the state to the host and write it in the background as checkpoint `state.step`.

        Blocks for the copy only, unless the save before is still being written. The buffers of `state` may be
        donated as soon as this returns. A checkpoint of the same step is replaced; once this one is committed,
        later steps are removed (the run went back to an earlier one).

        Args:
          state: what to save; arrays may be sharded over all processes.
          data_state: position in the data, JSON values, the same in all processes.
          meta: what else a reader must know (config, spec, versions), JSON values.

        Raises:
          InputError: the save before this one failed, or there is too little free disk space.
        """
        self.wait()
        step = int(state.step)
        trees = state_trees(state)
        together(lambda: self._require_space(trees))
        texts = {DATA_NAME: _to_json(data_state), META_NAME: _to_json(meta)}
        try:
            self._start(step, trees)
            self._pending = self._pool.submit(self._commit, step, texts, array_table(trees))
        except InputError as error:
            self._pending = Future()
            self._pending.set_exception(error)
        if any(gather(self._pending.done() and self._pending.exception() is not None)):
            self.wait()

    def _start(self, step: int, trees: dict[str, Any]) -> None:
        """Copy the arrays to the host and let orbax write them to the staging folder in its threads."""
        import orbax.checkpoint as ocp  # slow to import, and not needed before the first save

        if self._writer is None:
            from jaxllm.checkpoint.save_barrier import SaveBarrier

            _quieten_orbax()
            self._barrier = SaveBarrier(_TIMEOUT_SECONDS)
            options = ocp.AsyncOptions(barrier_sync_fn=self._barrier, timeout_secs=_TIMEOUT_SECONDS)
            self._writer = ocp.AsyncCheckpointer(new_array_handler(), async_options=options)
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        self._barrier.begin(self._failed(step))
        with self._explained(step), self._barrier.attended(lambda: self._mark_failed(step)):
            self._writer.save(self._staging(step), args=ocp.args.Composite(**items))

    def wait(self) -> None:
        """Block until the last save is committed.

        Raises:
          InputError: it failed; the checkpoints before it are untouched.
        """
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            together(pending.result)
        except InputError:
            self._discard_unfinished()
            raise

    def close(self) -> None:
        """Wait for the last save and release the background threads."""
        try:
            self.wait()
        finally:
            self._release()

    def _release(self) -> None:
        self._pool.shutdown()
        if self._writer is not None:
            self._writer.close()
            self._discard_unfinished()

    def _commit(self, step: int, texts: dict[str, str], arrays: dict[str, str]) -> None:
        """Finish a save; runs in the background, in every process."""
        with self._explained(step):
            with self._barrier.attended(lambda: self._mark_failed(step)):
                self._writer.wait_until_finished()
            if is_main():
                staging = self._staging(step)
                for name, text in texts.items():
                    (staging / name).parent.mkdir(exist_ok=True)
                    (staging / name).write_text(text)
                write_manifest(staging, arrays)
                self._publish(step)
                self._remove_old(step)

    def _publish(self, step: int) -> None:
        """Give a finished checkpoint its name; a kill between the two renames is repaired at the next start."""
        final, replaced = self.folder / str(step), self.folder / f"{step}{_REPLACED}"
        if final.exists():
            final.rename(replaced)
        self._staging(step).rename(final)
        sync_to_disk(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _remove_old(self, newest: int) -> None:
        steps = self.steps()
        abandoned = [step for step in steps if step > newest]
        past = [step for step in steps if step <= newest]
        kept = set(past[-self._keep_last :])
        if self._keep_every is not None:
            kept |= {step for step in past if step % self._keep_every == 0}
        for step in sorted({*past, *abandoned} - kept):
            self._remove(step)
        if abandoned:
            self.notes.append(f"removed checkpoints {abandoned}: the run went back to an earlier step")

    def _remove(self, step: int) -> None:
        """Rename first, so that a half-removed checkpoint never bears a step's name."""
        doomed = self.folder / f"{step}{_DELETING}"
        (self.folder / str(step)).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)

    def _require_shared_folder(self) -> None:
        if not self.folder.is_dir():
            raise InputError(f"{self.folder}: not seen by process {jax.process_index()}; use a folder that all share")

    def _prepare(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._clean_up()
        except OSError as error:
            raise InputError(f"{self.folder}: checkpoints cannot be written here: {error}") from error

    def _clean_up(self) -> None:
        """Undo what a killed process left half-done."""
        for path in sorted(self.folder.iterdir()):
            match = _UNFINISHED.fullmatch(path.name)
            if not match:
                continue
            step, state = match.groups()
            final = self.folder / step
            if state == _REPLACED and not final.exists():
                path.rename(final)
                continue
            _remove(path)
            if state.startswith((_SAVING, _FAILED)):
                self.notes.append(f"removed {path.name}: the save of step {step} was interrupted")

    def _discard_unfinished(self) -> None:
        """Free the space of a failed save, as far as orbax's threads do not still write to it."""
        if is_main():
            for path in self._unfinished():
                _remove(path, ignore_errors=True)

    def _unfinished(self) -> list[Path]:
        paths = [path for mark in (_SAVING, _FAILED) for path in self.folder.glob(f"*{mark}*")]
        return [path for path in paths if _UNFINISHED.fullmatch(path.name)]

    def _mark_failed(self, step: int) -> None:
        """Leave a mark; where the disk has no room even for that, the unfinished files become the mark."""
        try:
            self._failed(step).touch()
        except OSError:
            for path in self._unfinished():
                path.rename(self._failed(step))

    def _require_space(self, trees: dict[str, Any]) -> None:
        needed = _ROOM * sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trees))
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise InputError(
                f"checkpoint needs {needed / 1e9:.3g} GB, {self.folder} has {free / 1e9:.3g} GB free; "
                f"free some space, or keep fewer checkpoints (checkpoint.keep_last is {self._keep_last})"
            )

    def _staging(self, step: int) -> Path:
        return self.folder / f"{step}{_SAVING}"

    def _failed(self, step: int) -> Path:
        return self.folder / f"{step}{_FAILED}"

    @contextlib.contextmanager
    def _explained(self, step: int) -> Iterator[None]:
        """Turn what goes wrong while saving into one clear error."""
        try:
            yield
        except OtherProcessError:
            raise
        except (OSError, ValueError, RuntimeError) as error:
            latest = self.latest_step()
            kept = "there is no checkpoint yet" if latest is None else f"the newest checkpoint is {latest}"
            raise InputError(f"{self.folder}: step {step} could not be saved: {_reason(error)}; {kept}") from error


@functools.cache
def _quieten_orbax() -> None:
    """Keep a failed save to one message.

    Orbax logs a traceback in each of its threads before it raises the same error to us, and the writes that were
    still in flight then complain that nobody waits for them any more.
    """

    previous = sys.unraisablehook

    def is_news(record: logging.LogRecord) -> bool:
        message = record.getMessage()
        if not record.exc_info and "Task was destroyed" not in message:
            return True
        told = [record.pathname, message, *traceback.format_exception(*(record.exc_info or (None,)))]
        return not any("orbax" in text for text in told)

    def report(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            previous(unraisable)

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_news)
    sys.unraisablehook = report


def _remove(path: Path, *, ignore_errors: bool = False) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors)
    else:
        path.unlink(missing_ok=True)


def _reason(error: Exception) -> str:
    """Name the system's error where tensorstore wraps it in a long text."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return os.strerror(int(code[1])) if code else str(error)


def _to_json(value: dict) -> str:
    return json.dumps(value, indent=1, allow_nan=False)
