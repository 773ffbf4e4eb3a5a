"""Tensor files: the reading interface that all formats share, and sharded safetensors, in and out tensor by tensor."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxllm.errors import InputError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


class Tensors(Protocol):
    """The tensors of a checkpoint in any format; nothing is read before it is asked for.

    Attributes:
      folder: where its files lie.
      files: file name of each tensor.
    """

    folder: Path
    files: dict[str, str]

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives; InputError where the tensor is stored in one that cannot be read."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        ...

    def read(self, name: str) -> np.ndarray:
        """Read one tensor, and no other."""
        ...


class TensorFile(Protocol):
    """One file of tensors; the methods are those of `Tensors`."""

    def names(self) -> Iterable[str]:
        """Return the names of its tensors."""
        ...

    def dtype(self, name: str) -> np.dtype: ...

    def shape(self, name: str) -> tuple[int, ...]: ...

    def read(self, name: str) -> np.ndarray: ...


class SafetensorsFile:
    """One safetensors file, mapped into memory."""

    def __init__(self, path: Path):
        """Open a file and check its header: every tensor's place and size, without holes or overlaps.

        Raises:
          InputError: it is no safetensors file, is truncated, or contradicts itself.
        """
        self._path = path
        try:
            self._handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file (truncated or foreign): {error}") from error
        if repeated := _repeated_names(path):
            raise InputError(f"{path}: the header names {repeated[:5]} more than once")

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return self._handle.keys()

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype as stored."""
        stored = self._handle.get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise InputError(f"{self._path}: {name} has dtype {stored}, expected {', '.join(DTYPES)}")
        return DTYPES[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype."""
        return self._handle.get_tensor(name)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a format names the files of a folder.

    Attributes:
      single: the one file of a small model. index: lists the files of a large one.
      pattern: regular expression of file names that belong to the model.
      open: opens one of them.
    """

    single: str
    index: str
    pattern: str
    open: Callable[[Path], TensorFile]


SAFETENSORS = Layout(SINGLE_FILE, INDEX_FILE, r"model(-\d+-of-\d+)?\.safetensors", SafetensorsFile)


class TensorFolder:
    """The tensors of a checkpoint folder: one file, or several with an index (see `Tensors`)."""

    def __init__(self, folder: Path, layout: Layout = SAFETENSORS):
        """Open the files of a folder.

        Raises:
          InputError: there are none, one is missing, unreadable or not listed, or index and files disagree.
        """
        self.folder = Path(folder)
        self.files: dict[str, str] = {}
        self._layout = layout
        self._opened: dict[str, TensorFile] = {}
        index = self.folder / layout.index
        expected = _read_index(index, Path(layout.single).suffix) if index.exists() else None
        for file in sorted(set(expected.values())) if expected else [layout.single]:
            self._open(file)
        if expected is not None and expected != self.files:
            wrong = sorted(set(expected.items()) ^ set(self.files.items()))
            raise InputError(f"{index}: index and shards disagree about {[name for name, _ in wrong[:5]]}")
        found = {path.name for path in self.folder.iterdir() if re.fullmatch(layout.pattern, path.name)}
        if stray := sorted(found - set(self._opened)):
            source = layout.index if expected else layout.single
            raise InputError(f"{self.folder}: {stray[:5]} are not part of the model that {source} describes")

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            single, index = self._layout.single, self._layout.index
            raise InputError(f"{self.folder}: no {file}; expected {single}, or {index} with all its shards")
        opened = self._layout.open(path)
        for name in opened.names():
            if name in self.files:
                raise InputError(f"{self.folder}: tensor {name!r} is in both {self.files[name]} and {file}")
            self.files[name] = file
        self._opened[file] = opened

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype as stored; InputError where it is none of ours."""
        return self._opened[self.files[name]].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._opened[self.files[name]].shape(name)

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype."""
        return self._opened[self.files[name]].read(name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], files: Mapping[str, str]) -> None:
    """Write tensors into safetensors files, holding one file's tensors in memory at a time.

    Args:
      tensors: (name, array) in an order that keeps each file's tensors together.
      files: file name of each tensor; more than one file gets an index.
    """
    total_size = 0
    for file, group in itertools.groupby(tensors, key=lambda tensor: files[tensor[0]]):
        arrays = dict(group)
        write_safetensors(folder / file, arrays)
        total_size += sum(array.nbytes for array in arrays.values())
    if set(files.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file; raises OSError where it cannot be written."""
    try:
        whole = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
        save_file(whole, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    path.chmod(0o644)  # safetensors makes files that only their owner can read


def split_into_files(sizes: Mapping[str, int], max_bytes: int = 5_000_000_000) -> dict[str, str]:
    """Assign tensors to files of at most `max_bytes` (a single larger tensor gets its own), in order."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if groups[-1] and filled + size > max_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    if len(groups) == 1:
        return dict.fromkeys(sizes, SINGLE_FILE)
    names = [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    return {name: file for file, group in zip(names, groups, strict=True) for name in group}


def safetensors_files(tensors: Tensors) -> dict[str, str]:
    """Return the safetensors file that each tensor is saved in.

    Its own, or in place of pytorch_model-00001-of-00002.bin model-00001-of-00002.safetensors, and for other formats one
    of at most 5 GB.
    """
    named = {
        name: re.fullmatch(r"(?:pytorch_)?(.*)\.(?:safetensors|bin)", file) for name, file in tensors.files.items()
    }
    if all(named.values()):
        return {name: f"{match[1]}.safetensors" for name, match in named.items()}
    sizes = {name: math.prod(tensors.shape(name)) * tensors.dtype(name).itemsize for name in tensors.files}
    return split_into_files(sizes)


def _repeated_names(path: Path) -> list[str]:
    """Return the names that a header holds twice, which the library reads as the last of them."""
    repeated: list[str] = []

    def collect(pairs: list[tuple[str, Any]]) -> None:
        counts = collections.Counter(name for name, _ in pairs)
        repeated.extend(name for name, count in counts.items() if count > 1)

    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        json.loads(file.read(length), object_pairs_hook=collect)
    return repeated


def _read_index(path: Path, suffix: str) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: expected a JSON object with 'weight_map': {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map must be an object of tensor names and files, found {weight_map!r:.80}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(suffix):
            raise InputError(f"{path}: {name} is said to be in {file!r}, expected the name of a {suffix} file here")
    return weight_map
