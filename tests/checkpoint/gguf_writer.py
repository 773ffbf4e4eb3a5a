"""Writes GGUF files, right ones and wrong ones, from their parts."""

import struct

import numpy as np

_KINDS = {bool: (7, "?"), int: (4, "<I"), float: (6, "<f")}
F32, F16, Q4_0, Q4_1, Q8_0, Q6_K, BF16 = 0, 1, 2, 3, 8, 14, 30


def string(value):
    return struct.pack("<Q", len(value.encode())) + value.encode()


def plain(value):
    return string(value) if isinstance(value, str) else struct.pack(_KINDS[type(value)][1], value)


def kind(value):
    return 8 if isinstance(value, str) else _KINDS[type(value)][0]


def entry(key, value):
    if isinstance(value, list):
        items = b"".join(map(plain, value))
        return string(key) + struct.pack("<IIQ", 9, kind(value[0]), len(value)) + items
    return string(key) + struct.pack("<I", kind(value)) + plain(value)


def describe(name, shape, encoding, offset):
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], encoding, offset)


def header(num_tensors, num_entries, *, magic=b"GGUF", version=3):
    return magic + struct.pack("<IQQ", version, num_tensors, num_entries)


def gguf_bytes(metadata, tensors):
    """Return a file; `tensors`: name -> (shape, encoding, content)."""
    described, data = b"", b""
    for name, (shape, encoding, content) in tensors.items():
        described += describe(name, shape, encoding, len(data))
        data += content + b"\0" * (-len(content) % 32)
    head = header(len(tensors), len(metadata)) + b"".join(entry(*each) for each in metadata.items()) + described
    return head + b"\0" * (-len(head) % 32) + data


def plain_tensors(arrays):
    """Describe float arrays as they are."""
    encodings = {"float32": F32, "float16": F16, "bfloat16": BF16}
    return {
        name: (array.shape, encodings[array.dtype.name], np.ascontiguousarray(array).tobytes())
        for name, array in arrays.items()
    }
