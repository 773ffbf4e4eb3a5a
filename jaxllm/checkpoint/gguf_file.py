"""The container format GGUF: metadata and tensors of one file, mapped into memory.

Layout (specification of ggml): "GGUF", version, number of tensors, number of metadata entries, the entries, a
description of each tensor, and from the next multiple of the alignment the tensors themselves. All little-endian.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.errors import InputError, missing_extra

_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_SCALARS = {
    number: np.dtype(name)
    for number, name in {
        **{0: "u1", 1: "i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"},
        **{10: "<u8", 11: "<i8", 12: "<f8"},
    }.items()
}
_MAX_DIMS = 4


@dataclasses.dataclass(frozen=True)
class _Encoding:
    """How a tensor type lays out a row: blocks of `block` numbers in `nbytes` bytes."""

    name: str
    block: int
    nbytes: int
    dtype: np.dtype

    @property
    def quantized(self) -> bool:
        return self.block > 1


_FLOAT32 = np.dtype(np.float32)
_ENCODINGS = {
    0: _Encoding("F32", 1, 4, _FLOAT32),
    1: _Encoding("F16", 1, 2, np.dtype(np.float16)),
    2: _Encoding("Q4_0", 32, 18, _FLOAT32),
    3: _Encoding("Q4_1", 32, 20, _FLOAT32),
    8: _Encoding("Q8_0", 32, 34, _FLOAT32),
    30: _Encoding("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
}
"""By type number; blocks are read as float32."""


@dataclasses.dataclass(frozen=True)
class _Stored:
    shape: tuple[int, ...]
    encoding: _Encoding
    start: int
    nbytes: int


class GGUFFile:
    """One GGUF file under the names it holds (see `TensorFile`).

    Attributes:
      metadata: entries by key; arrays are lists.
    """

    def __init__(self, path: Path):
        """Read metadata and the descriptions of the tensors.

        Raises:
          InputError: no GGUF file, truncated, contradicting itself, or with tensors of a type that cannot be read.
        """
        self._path = path
        try:
            # No empty file can be mapped.
            self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
            self.metadata, self._tensors = _read_header(_Cursor(self._data))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._tensors)

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives: float32 for quantised tensors, else as stored."""
        return self._tensors[name].encoding.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape, the longest stride first as in torch."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Read one tensor; quantised ones become float32 by the `gguf` package's own rules."""
        tensor = self._tensors[name]
        data = self._data[tensor.start : tensor.start + tensor.nbytes]
        if not tensor.encoding.quantized:
            return data.view(tensor.encoding.dtype).reshape(tensor.shape)
        try:
            from gguf import GGMLQuantizationType
            from gguf.quants import dequantize
        except ImportError:
            raise missing_extra("gguf", "convert", f"reading quantised tensors ({tensor.encoding.name})") from None
        rows = data.reshape(*tensor.shape[:-1], -1)
        return dequantize(rows, GGMLQuantizationType[tensor.encoding.name]).reshape(tensor.shape)


class _Cursor:
    """Reads one value after another, and never beyond the end."""

    def __init__(self, data: np.ndarray):
        self._data = data
        self.place = 0

    @property
    def end(self) -> int:
        return self._data.size

    def take(self, size: int) -> np.ndarray:
        if size > self.end - self.place:
            raise InputError(f"truncated: {size} bytes are announced at offset {self.place}, {self.end} are there")
        taken = self._data[self.place : self.place + size]
        self.place += size
        return taken

    def array(self, dtype: np.dtype, count: int) -> list[Any]:
        return self.take(dtype.itemsize * count).view(dtype).tolist()

    def integer(self, dtype: str = "<u8") -> int:
        return self.array(np.dtype(dtype), 1)[0]

    def string(self) -> str:
        try:
            return self.take(self.integer()).tobytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"a string before offset {self.place} is not UTF-8") from error

    def value(self) -> Any:
        kind = self.integer("<u4")
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.array(_scalar(kind), 1)[0]
        kind, count = self.integer("<u4"), self.integer()
        # A loop over strings ends where the file does: each takes eight bytes at least.
        return [self.string() for _ in range(count)] if kind == _STRING else self.array(_scalar(kind), count)


def _scalar(kind: int) -> np.dtype:
    if kind not in _SCALARS:
        raise InputError(f"metadata of type {kind}, expected one of {sorted((*_SCALARS, _STRING, _ARRAY))}")
    return _SCALARS[kind]


def _read_header(cursor: _Cursor) -> tuple[dict[str, Any], dict[str, _Stored]]:
    if cursor.end < 4 or cursor.take(4).tobytes() != b"GGUF":
        raise InputError("not a GGUF file: it does not begin with 'GGUF'")
    version = cursor.integer("<u4")
    if version not in _VERSIONS:
        raise InputError(f"GGUF version {version}, expected one of {_VERSIONS}")
    num_tensors, num_entries = cursor.integer(), cursor.integer()
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.string()
        if key in metadata:
            raise InputError(f"metadata {key!r:.80} occurs twice")
        metadata[key] = cursor.value()
    described = [_describe(cursor) for _ in range(num_tensors)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1:
        raise InputError(f"general.alignment = {alignment!r:.80}, expected a positive integer")
    first = -(-cursor.place // alignment) * alignment
    return metadata, _place(described, first, alignment, cursor.end)


def _describe(cursor: _Cursor) -> tuple[str, tuple[int, ...], _Encoding, int]:
    name = cursor.string()
    num_dims = cursor.integer("<u4")
    if not 1 <= num_dims <= _MAX_DIMS:
        raise InputError(f"tensor {name!r:.80} has {num_dims} dimensions, expected 1 to {_MAX_DIMS}")
    shape = tuple(cursor.array(np.dtype("<u8"), num_dims)[::-1])
    kind, offset = cursor.integer("<u4"), cursor.integer()
    if kind not in _ENCODINGS:
        supported = ", ".join(encoding.name for encoding in _ENCODINGS.values())
        raise InputError(f"tensor {name!r:.80} has type {_type_name(kind)}, supported are {supported}")
    if shape[-1] % _ENCODINGS[kind].block:
        raise InputError(f"tensor {name!r:.80} has rows of {shape[-1]}, no multiple of {_ENCODINGS[kind].block}")
    return name, shape, _ENCODINGS[kind], offset


def _place(
    described: list[tuple[str, tuple[int, ...], _Encoding, int]], first: int, alignment: int, end: int
) -> dict[str, _Stored]:
    """Find each tensor's bytes; none may overlap another or lie beyond the file."""
    placed: dict[str, _Stored] = {}
    free = first
    for name, shape, encoding, offset in sorted(described, key=lambda tensor: tensor[3]):
        nbytes = math.prod(shape) // encoding.block * encoding.nbytes
        start = first + offset
        if name in placed:
            raise InputError(f"tensor {name!r:.80} occurs twice")
        if offset % alignment or start < free or start + nbytes > end:
            raise InputError(
                f"tensor {name!r:.80} lies at bytes {start} to {start + nbytes}; expected a multiple of {alignment} "
                f"after the tensor before it ({free}) and within the file ({end}): truncated or damaged"
            )
        placed[name] = _Stored(shape, encoding, start, nbytes)
        free = start + nbytes
    return placed


def _type_name(kind: int) -> str:
    """Name a type number as the `gguf` package does, where it is installed."""
    try:
        from gguf import GGMLQuantizationType

        return GGMLQuantizationType(kind).name
    except (ImportError, ValueError):
        return f"number {kind}"
