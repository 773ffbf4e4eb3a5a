"""Files of sampled answers: rows to fine-tune on, and the journal of what is not finished yet."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxllm.errors import InputError
from jaxllm.files import atomic_file

Row = dict[str, Any]
"""The best answer to a prompt: "messages", maybe "tools", "score", "scores" of all, "parts", "round" and "origin"."""


def best_of(rows: Iterable[Row]) -> list[Row]:
    """Return the row with the highest score of each prompt, in the order of the prompts; of equal ones the first."""
    best: dict[str, Row] = {}
    for row in rows:
        key = _key(row["messages"][:-1], row.get("tools"))
        if key not in best or row["score"] > best[key]["score"]:
            best[key] = row
    return list(best.values())


def read_rows(path: Path) -> list[Row]:
    """Read the output of a round.

    Raises:
      InputError: it cannot be read, or a row is not one of an output.
    """
    rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error}); expected the output of an earlier round") from error
    for number, line in enumerate(lines, 1):
        row = _parsed(line)
        if row is None or not row.get("messages") or not isinstance(row.get("score"), int | float):
            raise InputError(f"{path}:{number}: found no row with 'messages' and 'score'; expected an earlier output")
        rows.append(row)
    return rows


class Journal:
    """What was answered so far: a file beside the output, one line for what it belongs to and one for each prompt."""

    def __init__(self, output: Path, identity: str):
        self._path = output.with_name(f"{output.name}.partial")
        self._identity = identity
        self._rows: list[Row] = []
        self._file: IO[bytes] | None = None

    def open(self) -> None:
        """Read what is there and get ready to append; a line that a kill cut short is dropped."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.is_file() else []
        found = [_parsed(line) for line in lines]
        if found and (found[0] is None or found[0].get("identity") != self._identity):
            raise InputError(
                f"{self._path}: was begun with another configuration, other weights or another round; finish that one "
                "with what it was begun with, or delete the file"
            )
        whole = list(itertools.takewhile(lambda row: row is not None, found))
        self._rows = whole[1:]
        self._file = open(self._path, "r+b" if lines else "wb")  # noqa: SIM115
        self._file.seek(sum(len(line) + 1 for line in lines[: len(whole)]))
        self._file.truncate()
        if not whole:
            self._append([{"identity": self._identity}])

    def add(self, rows: Sequence[Row]) -> None:
        """Append rows in process 0 and wait until they lie on the disk; the others remember them."""
        self._rows += rows
        if self._file is not None:
            self._append(rows)

    def rows(self) -> list[Row]:
        """Return what was answered, by prompt."""
        return self._rows

    def close(self) -> None:
        """Close the file, which stays for those who go on with it."""
        if self._file is not None:
            self._file.close()

    def remove(self) -> None:
        """Delete the file."""
        self._path.unlink()

    def _append(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())


def _key(messages: Sequence[Mapping[str, Any]], tools: Any) -> str:
    return json.dumps([messages, tools], sort_keys=True)


def _parsed(line: str | bytes) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def write_rows(output: Path, rows: Iterable[Row]) -> int:
    """Write an output, all or nothing, and return how many rows it has; raises InputError where that cannot be."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(output) as file:
            file.writelines(lines)
    except OSError as error:
        raise InputError(f"{output}: could not be written: {error.strerror or error}") from error
    return len(lines)
