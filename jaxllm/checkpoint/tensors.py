"""Tensor files: sharded safetensors with their index, read and written tensor by tensor."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

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


class TensorFolder:
    """The tensors of a checkpoint folder; nothing is read before it is asked for.

    Attributes:
      files: file name of each tensor.
    """

    def __init__(self, folder: Path):
        """Open a folder with model.safetensors, or with an index and its shards.

        Raises:
          InputError: neither is there, a shard is missing or unreadable, or index and shards disagree.
        """
        self.folder = Path(folder)
        self.files: dict[str, str] = {}
        self._handles = {}
        index = self.folder / INDEX_FILE
        expected = _read_index(index) if index.exists() else None
        for file in sorted(set(expected.values())) if expected else [SINGLE_FILE]:
            self._open(file)
        if expected is not None and expected != self.files:
            wrong = sorted(set(expected.items()) ^ set(self.files.items()))
            raise InputError(f"{index}: index and shards disagree about {[name for name, _ in wrong[:5]]}")

    def _open(self, file: str) -> None:
        path = self.folder / file
        if not path.is_file():
            raise InputError(f"{self.folder}: no {file}; expected {SINGLE_FILE}, or {INDEX_FILE} with all its shards")
        try:
            handle = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file (truncated or foreign): {error}") from error
        for name in handle.keys():  # noqa: SIM118 (a handle is no dict)
            if name in self.files:
                raise InputError(f"{self.folder}: tensor {name!r} is in both {self.files[name]} and {file}")
            self.files[name] = file
        self._handles[file] = handle

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype as stored."""
        stored = self._handles[self.files[name]].get_slice(name).get_dtype()
        if stored not in DTYPES:
            raise InputError(
                f"{self.folder / self.files[name]}: {name} has dtype {stored}, expected {', '.join(DTYPES)}"
            )
        return DTYPES[stored]

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return tuple(self._handles[self.files[name]].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """Read one tensor in its stored dtype."""
        return self._handles[self.files[name]].get_tensor(name)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, np.ndarray]], files: Mapping[str, str]) -> None:
    """Write tensors into safetensors files, holding one file's tensors in memory at a time.

    Args:
      tensors: (name, array) in an order that keeps each file's tensors together.
      files: file name of each tensor; more than one file gets an index.
    """
    total_size = 0
    for file, group in itertools.groupby(tensors, key=lambda tensor: files[tensor[0]]):
        arrays = {name: np.ascontiguousarray(array) for name, array in group}
        save_file(arrays, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes files that only their owner can read
        total_size += sum(array.nbytes for array in arrays.values())
    if set(files.values()) != {SINGLE_FILE}:
        index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(files.items()))}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")


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


def _read_index(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except (json.JSONDecodeError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a JSON object with 'weight_map': {error!r}") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{path}: weight_map must be an object of tensor names and files, found {weight_map!r:.80}")
    for name, file in weight_map.items():
        if not isinstance(file, str) or os.path.basename(file) != file or not file.endswith(".safetensors"):
            raise InputError(f"{path}: {name} is said to be in {file!r}, expected the name of a .safetensors file here")
    return weight_map
