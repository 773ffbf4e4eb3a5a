"""Documents from txt, jsonl and parquet files; what is wrong with a file or row is said by path and line."""

from __future__ import annotations

import contextlib
import difflib
import glob
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.file_chunks import first_line, read_chunks
from jaxllm.errors import InputError, missing_extra

SUFFIXES = {".txt": "txt", ".jsonl": "jsonl", ".jsonl.gz": "jsonl", ".jsonl.zst": "jsonl", ".parquet": "parquet"}
_UTF8_MARK = b"\xef\xbb\xbf"


class Document(NamedTuple):
    """One text and where it came from; `line` counts from 1 (the row number in parquet, 1 in txt)."""

    text: str
    file: str
    line: int


class BadRows:
    """Count the rows that had to be skipped, and refuse the data when they exceed the budget."""

    KEPT_EXAMPLES = 3

    def __init__(self, budget: int = 0, count: int = 0, examples: Sequence[str] = ()):
        self.budget = budget
        self.count = count
        self.examples = list(examples)

    def add(self, problem: str) -> None:
        """Record one bad row, described as "path:line: what is wrong"; raises InputError over the budget."""
        self.count += 1
        if len(self.examples) < self.KEPT_EXAMPLES:
            self.examples.append(problem)
        self.check()

    @contextlib.contextmanager
    def from_errors(self, where: str) -> Iterator[None]:
        """Record an InputError of the block as the bad row at "path:line"; raises InputError over the budget."""
        try:
            yield
        except InputError as problem:
            self.add(f"{where}: {problem}")

    def check(self) -> None:
        """Raise InputError over the budget."""
        if self.count > self.budget:
            raise InputError(self.summary())

    def summary(self) -> str:
        """Say how many rows were bad out of how many allowed, and name the first few, a line each."""
        rows = "1 bad row" if self.count == 1 else f"{self.count} bad rows"
        more = ["..."] if self.count > len(self.examples) else []
        return "\n  ".join([f"{rows} (max_bad_rows allows {self.budget})", *self.examples, *more])


class _BadRow(Exception):
    """What is wrong with the row at hand; becomes an entry of BadRows."""


def find_files(path: str | os.PathLike, format: str = "auto") -> list[tuple[Path, str]]:
    """List the files that a source path means, in sorted order, each with its format.

    Args:
      path: a file, a glob, or a folder, which is searched at any depth for the known suffixes (hidden files are not).
      format: "auto" decides by suffix; otherwise "txt", "jsonl" or "parquet".

    Raises:
      InputError: nothing is there, or a file's format cannot be told.
    """
    if format not in ("auto", *SUFFIXES.values()):
        raise InputError(f"{path}: format {format!r} is unknown here, expected auto, txt, jsonl or parquet")
    root = Path(path).expanduser()
    if root.is_file():
        return [(root, _format_of(root, format))]
    if root.is_dir():
        return _files_in_folder(root, format)
    if not glob.has_magic(str(root)):
        raise InputError(f"{path}: no such file or folder")
    matches = sorted(match for match in map(Path, glob.glob(str(root), recursive=True)) if match.is_file())
    if not matches:
        raise InputError(f"{path}: the pattern matches no file")
    return [(match, _format_of(match, format)) for match in matches]


def read_documents(path: str | os.PathLike, *, text_key: str = "text", bad_rows: BadRows) -> Iterator[Document]:
    """Yield the documents of a file, glob or folder, file after file in sorted order.

    A txt file is one document. Rows that are no documents go to `bad_rows`; lines of jsonl that are blank hold no row.

    Args:
      text_key: the field or column that holds the text.
      bad_rows: counts the skipped rows and refuses them beyond its budget.

    Raises:
      InputError: a file is missing, empty, truncated or of another format, or the bad rows exceed the budget.
    """
    for file, format in find_files(path):
        yield from read_file(file, format, text_key=text_key, bad_rows=bad_rows)


def read_file(file: Path, format: str, *, text_key: str, bad_rows: BadRows) -> Iterator[Document]:
    """Yield the documents of one file of a known format; see `read_documents`."""
    _refuse_empty(file)
    if format == "txt":
        yield Document(_read_text(file), str(file), 1)
        return
    rows = _jsonl_rows(file) if format == "jsonl" else _parquet_texts(file, text_key)
    number = 0
    for number, row in rows:
        try:
            text = _text_of_json(row, text_key) if format == "jsonl" else _checked_text(row, text_key)
        except _BadRow as problem:
            bad_rows.add(f"{file}:{number}: {problem}")
        else:
            yield Document(text, str(file), number)
    if number == 0:
        raise InputError(f"{file}: the file holds no rows")


def read_rows(file: Path, format: str, *, bad_rows: BadRows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line from 1, row) for the objects of a jsonl file, or the rows of a parquet file with all their columns.

    Raises:
      InputError: a txt file, or as `read_documents`.
    """
    _refuse_empty(file)
    if format == "txt":
        raise InputError(f"{file}: a txt file is one document and has no rows; expected jsonl or parquet")
    number = 0
    for number, row in _jsonl_rows(file) if format == "jsonl" else _parquet_rows(file):
        if format == "parquet":
            yield number, row
            continue
        try:
            fields = _object_of_json(row)
        except _BadRow as problem:
            bad_rows.add(f"{file}:{number}: {problem}")
        else:
            yield number, fields
    if number == 0:
        raise InputError(f"{file}: the file holds no rows")


def _format_of(file: Path, format: str) -> str:
    if format != "auto":
        return format
    for suffix, known in SUFFIXES.items():
        if file.name.lower().endswith(suffix):
            return known
    raise InputError(f"{file}: cannot tell the format from the name; expected {_suffixes()}, or set the format")


def _files_in_folder(folder: Path, format: str) -> list[tuple[Path, str]]:
    wanted = tuple(suffix for suffix, known in SUFFIXES.items() if format in ("auto", known))
    visible = [p for p in folder.rglob("*") if not any(part.startswith(".") for part in p.relative_to(folder).parts)]
    files = sorted(p for p in visible if p.is_file() and p.name.lower().endswith(wanted))
    if not files:
        raise InputError(f"{folder}: the folder holds no file that ends in {_suffixes(wanted)}")
    return [(file, _format_of(file, format)) for file in files]


def _suffixes(suffixes: Sequence[str] = tuple(SUFFIXES)) -> str:
    return " or ".join(suffixes)


def _refuse_empty(file: Path) -> None:
    try:
        size = file.stat().st_size
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error
    if size == 0:
        raise InputError(f"{file}: the file is empty (0 bytes)")


def _read_text(file: Path) -> str:
    data = b"".join(read_chunks(file)).removeprefix(_UTF8_MARK)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InputError(f"{file}:{line}: found byte 0x{data[error.start]:02x}, expected UTF-8 text") from error
    if not text.strip():
        raise InputError(f"{file}: the file holds nothing but blanks")
    return text


def _jsonl_rows(file: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (line number from 1, line) for the lines that are not blank."""
    for number, line in enumerate(_lines(file), 1):
        if number == 1:
            line = line.removeprefix(_UTF8_MARK)
        if line.strip():
            yield number, line


def _lines(file: Path) -> Iterator[bytes]:
    tail = b""
    for chunk in read_chunks(file):
        lines = (tail + chunk).split(b"\n")
        tail = lines.pop()
        yield from lines
    if tail:
        yield tail


def _text_of_json(line: bytes, text_key: str) -> str:
    row = _object_of_json(line)
    if text_key not in row:
        raise _BadRow(_missing_key("field", text_key, list(row)))
    return _checked_text(row[text_key], text_key)


def _object_of_json(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        problem = f"found byte 0x{line[error.start]:02x} at byte {error.start + 1} of the line, expected UTF-8"
        raise _BadRow(problem) from error
    except json.JSONDecodeError as error:
        raise _BadRow(f"invalid JSON: {error.msg}: column {error.colno}; expected one object a line") from error
    except (ValueError, RecursionError) as error:
        # Numbers of thousands of digits and absurdly deep nesting.
        raise _BadRow(f"unreadable JSON: {error}") from error
    if not isinstance(row, dict):
        raise _BadRow(f"found {kind_of(row)}, expected a JSON object")
    return row


def _checked_text(text: object, text_key: str) -> str:
    if not isinstance(text, str):
        raise _BadRow(f"{text_key!r} is {kind_of(text)}, expected a string")
    if not text.strip():
        raise _BadRow(f"{text_key!r} is {'blank' if text else 'empty'}, expected text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = f"\\u{ord(text[error.start]):04x}"
        raise _BadRow(f"{text_key!r} holds half of a surrogate pair ({found}), which is no text") from error
    return text


def _missing_key(what: str, key: str, found: list[str]) -> str:
    shown = ", ".join(map(repr, found[:8])) + (", ..." if len(found) > 8 else "") if found else "none"
    near = difflib.get_close_matches(key, found, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    return f"no {what} {key!r}; found {shown}{hint}; text_key names the one that holds the text"


def kind_of(value: object) -> str:
    """Say what kind of JSON value this is."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    names = {str: "a string", int: "a number", float: "a number", list: "a list", dict: "an object"}
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    return names.get(type(value), type(value).__name__)


def _parquet_texts(file: Path, text_key: str) -> Iterator[tuple[int, object]]:
    """Yield (row number from 1, value of the text column)."""
    number = 0
    with _opened_parquet(file) as table:
        _check_text_column(file, table.schema_arrow, text_key)
        for batch in table.iter_batches(batch_size=1024, columns=[text_key]):
            for value in batch.column(0):
                number += 1
                yield number, _as_text(value)


def _parquet_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (row number from 1, values of all columns)."""
    number = 0
    with _opened_parquet(file) as table:
        for batch in table.iter_batches(batch_size=256):
            for row in batch.to_pylist():
                number += 1
                yield number, row


@contextlib.contextmanager
def _opened_parquet(file: Path) -> Iterator[Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise missing_extra("pyarrow", "data", f"reading {file}") from error
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            yield table
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read as parquet (truncated or damaged?): {first_line(error)}") from error


def _as_text(value) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        return value.cast("binary").as_py()


def _check_text_column(file: Path, schema, text_key: str) -> None:
    if text_key not in schema.names:
        raise InputError(f"{file}: {_missing_key('column', text_key, schema.names)}")
    from pyarrow import types

    found = schema.field(text_key).type
    text = found.value_type if types.is_dictionary(found) else found
    if not (types.is_string(text) or types.is_large_string(text) or types.is_string_view(text)):
        raise InputError(f"{file}: column {text_key!r} is of type {found}, expected string")
