"""The manifest of a checkpoint folder: which arrays it holds, and the size and checksum of each of its files."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jaxllm.files import sync_to_disk

MANIFEST_NAME = "manifest.json"
_FORMAT = 1
_CHUNK_BYTES = 1 << 20
_THREADS = 4


@dataclass(frozen=True)
class Manifest:
    """What a complete checkpoint folder holds.

    Attributes:
      arrays: array name -> "dtype[d0,d1,...]".
      files: path relative to the folder -> (bytes, CRC-32), the manifest itself left out.
    """

    arrays: dict[str, str]
    files: dict[str, tuple[int, int]]


def write_manifest(folder: Path, arrays: dict[str, str]) -> None:
    """Describe all files now in `folder` and put them, and the manifest, safely on disk.

    Orbax syncs the array data only; a power failure must not leave a committed folder with an empty JSON file.
    """
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    manifest = Manifest(arrays, dict(zip(names, _map_in_threads(_size_and_checksum, paths), strict=True)))
    body = asdict(manifest)
    target = folder / MANIFEST_NAME
    target.write_text(json.dumps({"format": _FORMAT, "crc32": _body_checksum(body), "body": body}, indent=1))
    for path in (*paths, target, *(p for p in folder.rglob("*") if p.is_dir()), folder):
        sync_to_disk(path)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a checkpoint folder.

    Raises:
      OSError: it cannot be read.
      ValueError: it is damaged, or of a format that this version does not know.
    """
    content = json.loads((folder / MANIFEST_NAME).read_text())
    if not isinstance(content, dict) or content.keys() != {"format", "crc32", "body"}:
        raise ValueError("expected the fields format, crc32 and body")
    if content["format"] != _FORMAT:
        raise ValueError(f"format {content['format']!r} is unknown, expected {_FORMAT}")
    body = content["body"]
    if content["crc32"] != _body_checksum(body):
        raise ValueError("wrong checksum")
    return Manifest(body["arrays"], {name: (size, checksum) for name, (size, checksum) in body["files"].items()})


def find_damage(folder: Path, manifest: Manifest, names: Iterable[str]) -> str | None:
    """Compare the named files with the manifest; return what is wrong with the first bad one, or None."""
    checks = _map_in_threads(lambda name: _check_file(folder / name, name, *manifest.files[name]), names)
    return next((problem for problem in checks if problem), None)


def _body_checksum(body: Any) -> int:
    return zlib.crc32(json.dumps(body).encode())


def _check_file(path: Path, name: str, size: int, checksum: int) -> str | None:
    if not path.is_file():
        return f"{name} is missing"
    found = path.stat().st_size
    if found != size:
        return f"{name} has {found} bytes, expected {size}"
    return None if _size_and_checksum(path)[1] == checksum else f"{name} has a wrong checksum"


def _size_and_checksum(path: Path) -> tuple[int, int]:
    size = checksum = 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return size, checksum


def _map_in_threads(function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_THREADS) as pool:  # zlib and read() release the interpreter lock
        return list(pool.map(function, items))
