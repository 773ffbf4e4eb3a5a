"""The bytes of files, decompressed."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path

from jaxllm.errors import InputError, missing_extra

_CHUNK_BYTES = 1 << 20


def read_chunks(file: Path) -> Iterator[bytes]:
    """Yield the bytes of a file, decompressed when its name ends in .gz or .zst."""
    try:
        if file.name.lower().endswith(".zst"):
            yield from _zstd_chunks(file)
            return
        opener = gzip.open if file.name.lower().endswith(".gz") else open
        with opener(file, "rb") as stream:
            while chunk := stream.read(_CHUNK_BYTES):
                yield chunk
    except EOFError as error:
        raise InputError(f"{file}: the compressed data ends early; the file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file}: not gzip data, or damaged: {first_line(error)}") from error
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}") from error


def _zstd_chunks(file: Path) -> Iterator[bytes]:
    """Decompress a file of one or more zstd frames; raises EOFError when the last frame is cut short.

    zstandard's own stream reader takes a truncated file for a short one, hence frame by frame.
    """
    try:
        import zstandard
    except ImportError as error:
        raise missing_extra("zstandard", "data", f"reading {file}") from error
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(file, "rb") as stream:
        try:
            while data := stream.read(_CHUNK_BYTES):
                while data:
                    if frame.eof:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data
        except zstandard.ZstdError as error:
            raise InputError(f"{file}: not zstd data, or damaged: {first_line(error)}") from error
    if not frame.eof:
        raise EOFError


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error) or type(error).__name__).splitlines()[0]
