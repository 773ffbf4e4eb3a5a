"""Count the pieces of text files, in several processes: the part of training a tokenizer that grows with the text."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from os import PathLike
from types import FrameType
from typing import Literal

from jaxllm.data.sources import BadRows, read_documents
from jaxllm.errors import InputError
from jaxllm.tokenizers.train import Progress, count_pieces

_BATCH_CHARACTERS = 1 << 21
"""Half a second's work: long against the cost of sending it, short against the patience of who interrupts."""


@dataclasses.dataclass
class PieceCounts:
    """The pieces of some texts.

    Attributes:
      pieces: how often each occurs.
      num_documents, num_bytes: size of the texts (UTF-8, before normalization).
    """

    pieces: Counter[str]
    num_documents: int = 0
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class _Cut:
    """Count the pieces of a batch; a worker process gets this object and calls it."""

    pattern: str
    normalization: Literal["NFC"] | None

    def __call__(self, texts: Sequence[str]) -> PieceCounts:
        pieces = count_pieces(texts, pattern=self.pattern, normalization=self.normalization)
        return PieceCounts(pieces, len(texts), sum(len(text.encode()) for text in texts))


def count_pieces_of_files(
    paths: Sequence[str | PathLike[str]],
    *,
    pattern: str,
    normalization: Literal["NFC"] | None,
    text_key: str = "text",
    num_workers: int = 1,
    progress: Progress | None = None,
) -> PieceCounts:
    """Count the pieces that a pattern cuts the documents of files into, whichever process counts them.

    The files are read here, so a bad row is the same error with any number of workers. More than one worker starts
    fresh Python processes: a script that asks for them must do its work under `if __name__ == "__main__":`.

    Args:
      paths: files, globs or folders that `jaxllm.data.sources` can read.
      pattern, normalization: as for `jaxllm.tokenizers.train.count_pieces`.
      text_key: name of the text field in jsonl and parquet rows.
      num_workers: processes that count.
      progress: called as `progress(documents counted, bytes counted)`.

    Raises:
      InputError: a bad file or row; a worker that was killed.
    """
    total = PieceCounts(Counter())
    batches = _batches(texts_of(paths, text_key))
    with contextlib.closing(_map(_Cut(pattern, normalization), batches, num_workers)) as parts:
        for part in parts:
            total.pieces.update(part.pieces)
            total.num_documents += part.num_documents
            total.num_bytes += part.num_bytes
            if progress:
                progress(total.num_documents, total.num_bytes)
    return total


def texts_of(paths: Sequence[str | PathLike[str]], text_key: str) -> Iterator[str]:
    """Yield the texts of files, globs or folders; a bad row raises InputError."""
    for path in paths:
        for document in read_documents(path, text_key=text_key, bad_rows=BadRows()):
            yield document.text


def usable_cpus() -> int:
    """Return the number of processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARACTERS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _map(
    work: Callable[[list[str]], PieceCounts], batches: Iterator[list[str]], num_workers: int
) -> Iterator[PieceCounts]:
    """Yield the result of each batch in order; a batch that is alone is not worth a process."""
    first = list(itertools.islice(batches, 2))
    batches = itertools.chain(first, batches)
    if num_workers == 1 or len(first) < 2:
        yield from map(work, batches)
        return
    # Forking is unsafe where other libraries run threads, so processes start afresh on every system.
    context = multiprocessing.get_context("spawn")
    # It would be started with the first worker, and lets interrupts through again.
    resource_tracker.ensure_running()
    with _interrupts_held():
        workers = [_Worker(context, work) for _ in range(num_workers)]
    try:
        idle, busy = deque(workers), deque[_Worker]()
        for batch in batches:
            if not idle:
                idle.append(busy.popleft())
                yield idle[0].receive()
            idle[0].send(batch)
            busy.append(idle.popleft())
        while busy:
            yield busy.popleft().receive()
    finally:
        for worker in workers:
            worker.end()


class _Worker:
    """A process that works on one batch after another.

    It has a pipe of its own: in a queue that several share, one that is killed leaves a lock or half of a result
    behind, and all wait for ever.
    """

    def __init__(self, context: BaseContext, work: Callable[[list[str]], PieceCounts]):
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def send(self, batch: list[str]) -> None:
        """Give it a batch, when the result of the one before was received."""
        with self._told_if_it_ends():
            self._pipe.send(batch)

    def receive(self) -> PieceCounts:
        """Return the result of the batch that it was sent."""
        with self._told_if_it_ends():
            return self._pipe.recv()

    def end(self) -> None:
        """End the process."""
        self._pipe.close()
        self._process.terminate()
        self._process.join()

    @contextlib.contextmanager
    def _told_if_it_ends(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, ConnectionError) as error:
            self._process.join()
            if self._process.exitcode > 0:
                raise RuntimeError("a worker process failed; what it said stands above") from error
            raise InputError("a worker process was killed (for want of memory?); try fewer workers") from error


def _serve(pipe: Connection, work: Callable[[list[str]], PieceCounts]) -> None:
    """Work on what comes until the parent has ended."""
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pipe.send(work(pipe.recv()))


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Put off Ctrl-C while processes are started, and keep it from them for good: only the parent hears it.

    Blocking the signal here is for the processes, which inherit it. The parent may have threads that do not block it,
    so there the handler waits too.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    held: list[tuple[int, FrameType | None]] = []
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    handler = signal.signal(signal.SIGINT, lambda *call: held.append(call))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, handler)
        if held and callable(handler):
            handler(*held[0])
