"""RUN/metrics.jsonl: one JSON object a line, `{"kind": "train" | "eval", "step": ..., ...}`, in order of steps."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.errors import InputError


class Dropped(NamedTuple):
    """What a resume removed: whole records of later steps, and a last line cut off by a kill or a crash."""

    records: int
    half_lines: int


class MetricsFile:
    """The file, open for appending."""

    def __init__(self, path: Path):
        """Open or create the file."""
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; it survives the death of the process from here on, a power cut only after `sync`."""
        self._file.write(_encode(record))
        self._file.flush()

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def resume_at(self, step: int) -> Dropped:
        """Cut off the records of steps after `step` (for step 0: all) and a half-written last line.

        Raises InputError naming the line for anything else that is no record.
        """
        end = records = half_lines = 0
        for line, record in _lines(self.path):
            if record is None:
                half_lines = 1
            elif 0 < record["step"] <= step:
                end += len(line)
            else:
                records += 1
        # One system call: a kill leaves either the old length or the new one.
        self._file.truncate(end)
        self.sync()
        return Dropped(records, half_lines)


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Read the records one by one; a half-written last line is left out.

    Raises InputError if the file is missing or a line is no record.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the records of a training run")
    return (record for _, record in _lines(path) if record is not None)


def _encode(record: Mapping[str, Any]) -> bytes:
    """Encode with floats that read back to the same bits; JSON has no NaN or infinity, so those become strings."""
    safe = {key: str(value) if _is_not_finite(value) else value for key, value in record.items()}
    return json.dumps(safe, allow_nan=False).encode() + b"\n"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Yield each line with its record, None for a half-written last line."""
    with open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            yield line, _record(line, f"{path}:{number}") if line.endswith(b"\n") else None


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: expected one JSON object a line, found {line[:60]!r}") from error
    if not isinstance(record, dict) or not {"kind", "step", "loss"} <= record.keys():
        raise InputError(f"{place}: expected a record with kind, step and loss, found {line[:60]!r}")
    return record
