"""TensorBoard event files: TFRecord framing around hand-encoded `Event` messages, without tensorflow or protobuf.

Formats: tensorflow/core/lib/io/record_writer.h (length, masked CRC-32C, payload, masked CRC-32C),
tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

_SESSION_START = 1


class EventFile:
    """One new event file in a folder; earlier files there stay and are shown together with it."""

    def __init__(self, folder: Path, *, first_step: int):
        """Open the file; points of earlier files at `first_step` or later are hidden by TensorBoard."""
        folder.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads the files of a folder in the order of their names.
        self._file = open(folder / f"events.out.tfevents.{time.time_ns()}", "xb")  # noqa: SIM115
        self._write(_event(0, _string(3, "brain.Event:2")))
        self._write(_event(first_step, _message(7, _varint_field(1, _SESSION_START))))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Append one point for each tag."""
        summary = b"".join(_message(1, _string(1, tag) + _float_field(2, value)) for tag, value in values.items())
        self._write(_event(step, _message(5, summary)))

    def sync(self) -> None:
        """Put what was written on the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked_crc32c(length) + event + _masked_crc32c(event))


def _event(step: int, what: bytes) -> bytes:
    return struct.pack("<Bd", 1 << 3 | 1, time.time()) + _varint_field(2, step) + what


def _message(number: int, payload: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(payload)) + payload


def _string(number: int, text: str) -> bytes:
    return _message(number, text.encode())


def _varint_field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _float_field(number: int, value: float) -> bytes:
    return struct.pack("<Bf", number << 3 | 5, value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_TABLE = _crc32c_table()


def crc32c(data: bytes) -> int:
    """Return the CRC-32C (Castagnoli, RFC 3720 appendix B.4) of `data`."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF


def _masked_crc32c(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
