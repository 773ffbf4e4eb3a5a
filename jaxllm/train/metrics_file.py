"""RUN/metrics.jsonl: one JSON object a line, `{"kind": "train" | "eval", "step": ..., ...}`, each step once."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxllm.errors import InputError


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a resume found in the file.

    Attributes:
      records: those of the steps up to the checkpoint, in order.
      dropped: number of records of later steps that were removed.
      half_written: whether the last line had been cut off, as a kill or a crash does.
    """

    records: list[dict[str, Any]]
    dropped: int
    half_written: bool


class MetricsFile:
    """The file, open for appending."""

    def __init__(self, path: Path):
        """Open or create the file."""
        self._path = path
        self._file = open(path, "ab")  # noqa: SIM115

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one line; it survives the death of the process from here on (but a power cut only after `sync`)."""
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Put what was written on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def resume_at(self, step: int) -> Kept:
        """Drop the records of steps after `step` (for step 0: all) and a half-written last line, atomically.

        Raises InputError naming the line for anything else that is no record.
        """
        records, half_written = _parse(self._path)
        kept = [record for record in records if 0 < record["step"] <= step]
        dropped = len(records) - len(kept)
        if dropped or half_written:
            self._file.close()
            write_atomically(self._path, b"".join(map(_line, kept)))
            self._file = open(self._path, "ab")  # noqa: SIM115
        return Kept(kept, dropped, half_written)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Read all records; a half-written last line is left out.

    Raises InputError if the file is missing or a line is no record.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected the records of a training run")
    return _parse(path)[0]


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file so that a crash leaves either the old or the new content, never a part."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _line(record: Mapping[str, Any]) -> bytes:
    """Encode with floats that read back to the same bits; JSON has no NaN, so those become strings."""
    safe = {key: str(value) if _is_not_finite(value) else value for key, value in record.items()}
    return json.dumps(safe, allow_nan=False).encode() + b"\n"


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _parse(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Return (records, whether the last line was half-written)."""
    lines = path.read_bytes().split(b"\n")
    tail = lines.pop()
    records = [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    return records, bool(tail)


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError(f"{place}: expected one JSON object a line, found {line[:60]!r}") from error
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        raise InputError(f"{place}: expected a record with a step, found {line[:60]!r}")
    return record
