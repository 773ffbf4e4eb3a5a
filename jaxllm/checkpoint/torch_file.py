"""Tensors of torch.save files (.bin, .pt), mapped into memory and read without executing anything."""

from __future__ import annotations

import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.restricted_pickle import MAX_BYTES, Storage, StoredTensor, read_pickle
from jaxllm.checkpoint.tensors import Layout
from jaxllm.errors import InputError

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER_BYTES = 30
_ENCRYPTED = 1
_MAX_DEPTH = 4


class TorchFile:
    """One file that torch.save wrote: a dictionary of tensors, or nested ones.

    Attributes:
      root: what was saved; tensors are StoredTensor, and what training keeps beside them is not made.
    """

    def __init__(self, path: Path, prefix: str = ""):
        """Read the description of the tensors.

        Args:
          prefix: keys of the nested dictionaries that hold the tensors, each followed by a dot ("module.").

        Raises:
          InputError: not written by torch.save, damaged, or it does anything but describe tensors.
        """
        self._path = path
        try:
            with path.open("rb") as file:
                read = _read_zip if file.read(4) == b"PK\3\4" else _read_legacy
                self.root, self._places = read(path)
            named = _named_tensors(self.root)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
        except InputError as error:
            raise InputError(f"{path}: {error}") from error
        self._tensors = {name.removeprefix(prefix): each for name, each in named.items() if name.startswith(prefix)}
        if not self._tensors:
            raise InputError(f"{path}: holds no tensors under {prefix or 'its top level'!r}")
        for name, tensor in self._tensors.items():
            self._require_storage(name, tensor.storage)

    def _require_storage(self, name: str, storage: Storage) -> None:
        _, size = self._places.get(storage.key, (0, None))
        needed = storage.size * storage.dtype.itemsize
        if size != needed:
            found = "no such storage" if size is None else f"{size} bytes"
            raise InputError(
                f"{self._path}: {name} lies in storage {storage.key!r:.40} of {needed} bytes, found {found}"
            )

    def names(self) -> list[str]:
        """Return the names of its tensors."""
        return list(self._tensors)

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype."""
        return self._tensors[name].storage.dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._tensors[name].shape

    def read(self, name: str) -> np.ndarray:
        """Map one tensor; a view of the file, in its stored dtype, that cannot be written to."""
        tensor = self._tensors[name]
        dtype = tensor.storage.dtype
        if math.prod(tensor.shape) == 0:
            return np.zeros(tensor.shape, dtype)
        start, _ = self._places[tensor.storage.key]
        flat = np.memmap(self._path, dtype, "r", start, (tensor.storage.size,))[tensor.offset :]
        strides = [stride * dtype.itemsize for stride in tensor.strides]
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


TORCH = Layout("pytorch_model.bin", "pytorch_model.bin.index.json", r"pytorch_model(-\d+-of-\d+)?\.bin", TorchFile)


def _named_tensors(root: Any) -> dict[str, StoredTensor]:
    """Return the tensors of nested dictionaries, the keys joined by dots; whatever else is there is passed over.

    Raises:
      InputError: there is no dictionary, they nest too deep or contain one another twice, or a name is not unique.
    """
    if not isinstance(root, dict):
        raise InputError(f"expected a dictionary of tensors, found a {type(root).__name__}")
    named: dict[str, StoredTensor] = {}
    seen = {id(root)}
    waiting: list[tuple[str, dict[Any, Any], int]] = [("", root, 1)]
    while waiting:
        prefix, members, depth = waiting.pop()
        for key, value in members.items():
            name = f"{prefix}{key}"
            if isinstance(value, StoredTensor):
                if named.setdefault(name, value) is not value:
                    raise InputError(f"two tensors are called {name!r:.80}")
            elif isinstance(value, dict) and value:
                if id(value) in seen or depth == _MAX_DEPTH:
                    raise InputError(
                        f"dictionaries nest more than {_MAX_DEPTH} deep, or one occurs twice, at {name!r:.80}"
                    )
                seen.add(id(value))
                waiting.append((f"{name}.", value, depth + 1))
    return named


def _read_zip(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read torch's zip format: NAME/data.pkl describes, NAME/data/KEY are the storages, all of them uncompressed.

    Returns:
      (what was saved, (offset, bytes) of each storage).
    """
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as file:
            members = archive.infolist()
            names = [member.filename for member in members]
            prefix = next((name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")), None)
            if prefix is None or len(set(names)) != len(names):
                raise InputError("a zip file without exactly one data.pkl and one entry of each name")
            places = {member.filename: _place_in_zip(member, file) for member in members}
            if prefix + "byteorder" in places and archive.read(prefix + "byteorder") != b"little":
                raise InputError("written on a big-endian machine, expected little-endian")
            start, size = places[prefix + "data.pkl"]
            if size > MAX_BYTES:
                raise InputError(f"data.pkl has {size} bytes, expected at most {MAX_BYTES}")
            file.seek(start)
            root, _ = read_pickle(io.BytesIO(file.read(size)))
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError) as error:
        raise InputError(f"damaged or truncated zip file: {error}") from error
    storages = prefix + "data/"
    return root, {name.removeprefix(storages): place for name, place in places.items() if name.startswith(storages)}


def _place_in_zip(member: zipfile.ZipInfo, file: io.BufferedReader) -> tuple[int, int]:
    """Return (offset, bytes) of an entry's content.

    Raises:
      InputError: it is compressed or encrypted, or lies beyond the file.
    """
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & _ENCRYPTED:
        raise InputError(f"entry {member.filename!r:.80} is compressed or encrypted, which torch.save never does")
    file.seek(member.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) != _LOCAL_HEADER_BYTES or header[:4] != b"PK\3\4":
        raise InputError(f"entry {member.filename!r:.80} is not where the directory says")
    name_bytes, extra_bytes = int.from_bytes(header[26:28], "little"), int.from_bytes(header[28:30], "little")
    start = member.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if start + member.file_size > file.seek(0, io.SEEK_END):
        raise InputError(f"entry {member.filename!r:.80} of {member.file_size} bytes lies beyond the end of the file")
    return start, member.file_size


def _read_legacy(path: Path) -> tuple[Any, dict[str, tuple[int, int]]]:
    """Read the format before torch 1.6: five pickles, then each storage as its number of elements and its content."""
    with path.open("rb") as file:
        head = io.BytesIO(file.read(MAX_BYTES))
        if head.getbuffer()[:2] != b"\x80\2":
            raise InputError("not written by torch.save: found neither a zip file nor a pickle")
        magic, protocol, system = (read_pickle(head)[0] for _ in range(3))
        if magic != _LEGACY_MAGIC or protocol != _LEGACY_PROTOCOL:
            raise InputError("not written by torch.save: a pickle of something else")
        if not isinstance(system, dict) or system.get("little_endian") is not True:
            raise InputError("written on a big-endian machine, expected little-endian")
        root, storages = read_pickle(head)
        keys, _ = read_pickle(head)
        if not isinstance(keys, list) or set(map(type, keys)) - {str} or set(keys) != set(storages):
            raise InputError("damaged: the list of storages does not fit the tensors")
        return root, _legacy_places(keys, storages, head.tell(), file)


def _legacy_places(
    keys: list[str], storages: dict[str, Storage], start: int, file: io.BufferedReader
) -> dict[str, tuple[int, int]]:
    places = {}
    end = file.seek(0, io.SEEK_END)
    for key in keys:
        file.seek(start)
        size = int.from_bytes(file.read(8), "little") * storages[key].dtype.itemsize
        if start + 8 + size > end:
            raise InputError(f"storage {key!r:.40} of {size} bytes lies beyond the end of the file")
        places[key] = (start + 8, size)
        start += 8 + size
    return places
