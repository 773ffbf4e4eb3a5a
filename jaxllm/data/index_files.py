"""Files of a prepared data set: an index in JSON, and plain .npy files written in constant memory."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.errors import InputError

INDEX = "index.json"


def read_json(path: Path, format: str, version: int, what: str) -> dict[str, Any]:
    """Return the fields of an index; raises InputError when it is missing, damaged or of another format."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); expected {what}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}); expected the index of {what.split(' of ')[-1]}") from error
    found = (index.pop("format", None), index.pop("version", None)) if isinstance(index, dict) else None
    if found != (format, version):
        raise InputError(f"{path}: found format and version {found}, expected {(format, version)}")
    return index


def write_json(path: Path, format: str, version: int, index: Any) -> None:
    """Write a dataclass as an index, and wait until it lies on the disk."""
    text = json.dumps({"format": format, "version": version, **dataclasses.asdict(index)}, indent=1, ensure_ascii=False)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text + "\n")
        file.flush()
        os.fsync(file.fileno())


def from_json(record: type, fields: Any, where: str) -> Any:
    """Build a dataclass from a JSON object that must hold exactly its fields, with values of their types."""
    types = {field.name: field.type.partition("[")[0] for field in dataclasses.fields(record)}
    found = sorted(fields) if isinstance(fields, dict) else fields
    if found != sorted(types):
        raise InputError(f"{where}: found {found}, expected an object of the fields {sorted(types)}")
    for name, value in fields.items():
        if type(value).__name__ != types[name]:
            raise InputError(f"{where}: {name} is {value!r}, expected {types[name]}")
    return record(**fields)


def open_array(path: Path, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    """Map a .npy file into memory, read only; raises InputError when it is not whole or of another dtype or shape."""
    expected = f"expected {dtype} {list(shape)} as the index says"
    try:
        array = np.lib.format.open_memmap(path, mode="r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {expected}") from error
    except ValueError as error:
        size = path.stat().st_size
        raise InputError(f"{path}: truncated or no .npy file ({size} bytes: {error}); {expected}") from error
    if array.dtype != np.dtype(dtype) or array.shape != shape:
        raise InputError(f"{path}: found {array.dtype} {list(array.shape)}, {expected}")
    # As a plain array: slicing the memmap class costs ten times more.
    return np.asarray(array)


class NpyWriter:
    """Write a .npy file of unknown length, in constant memory."""

    def __init__(self, path: Path, dtype: str, row_shape: tuple[int, ...]):
        self.path = path
        self.file = open(path, "wb")  # noqa: SIM115
        self.length = 0
        self._dtype = np.dtype(dtype)
        self._row_shape = row_shape
        self._write_header()

    def append(self, rows: Any) -> None:
        """Write rows, an array [n, *row_shape] or what makes one."""
        rows = np.ascontiguousarray(rows, dtype=self._dtype)
        self.file.write(rows.data)
        self.length += len(rows)

    def finish(self) -> None:
        """Write the final length, and put the file on the disk."""
        # numpy pads the header for a first axis of up to 21 digits, so the final one takes the same room.
        self.file.seek(0)
        self._write_header()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()

    def _write_header(self) -> None:
        header = {"descr": self._dtype.str, "fortran_order": False, "shape": (self.length, *self._row_shape)}
        np.lib.format.write_array_header_1_0(self.file, header)
