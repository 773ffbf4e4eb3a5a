"""Writes files as torch.save does, without torch, and lets tests put anything into their pickle."""

import dataclasses
import io
import struct
import zipfile

import numpy as np

STORAGES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "int64": "LongStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


@dataclasses.dataclass
class View:
    """A tensor over a flat array, which other tensors may share; strides count elements."""

    flat: np.ndarray
    shape: tuple
    strides: tuple
    offset: int = 0


@dataclasses.dataclass
class Opcodes:
    """Bytes that go into the pickle as they are."""

    code: bytes


def text(value):
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value):
    if 0 <= value < 256:
        return b"K" + bytes([value])
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def name(module, attribute):
    return f"c{module}\n{attribute}\n".encode()


class Writer:
    """Collects the storages of what it pickles."""

    def __init__(self):
        self.storages = []

    def pickle(self, value):
        return b"\x80\x02" + self.encode(value) + b"."

    def encode(self, value):
        if isinstance(value, Opcodes):
            return value.code
        if isinstance(value, dict):
            return b"}(" + b"".join(self.encode(key) + self.encode(each) for key, each in value.items()) + b"u"
        if isinstance(value, tuple | list):
            start, end = (b"(", b"t") if isinstance(value, tuple) else (b"](", b"e")
            return start + b"".join(map(self.encode, value)) + end
        if isinstance(value, np.ndarray):
            strides = tuple(int(stride) // value.itemsize for stride in np.empty(value.shape, value.dtype).strides)
            return self.view(View(value.reshape(-1), value.shape, strides))
        if isinstance(value, View):
            return self.view(value)
        if value is None or isinstance(value, bool):
            return {None: b"N", True: b"\x88", False: b"\x89"}[value]
        return text(value) if isinstance(value, str) else integer(value)

    def view(self, view):
        known = [i for i, flat in enumerate(self.storages) if flat is view.flat]
        if not known:
            known = [len(self.storages)]
            self.storages.append(view.flat)
        storage = name("torch", STORAGES[view.flat.dtype.name])
        identity = text("storage") + storage + text(str(known[0])) + text("cpu") + integer(view.flat.size)
        hooks = name("collections", "OrderedDict") + b")R"
        arguments = b"(" + identity + b"tQ" + integer(view.offset) + self.encode(view.shape) + self.encode(view.strides)
        return name("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"\x89" + hooks + b"tR"


def write_torch(path, value, *, storages=None, extra=(), compression=zipfile.ZIP_STORED, prefix="archive"):
    """Write the zip format; `storages`: other contents for them; `extra`: more (name, content)."""
    writer = Writer()
    pickled = writer.pickle(value)
    contents = [flat.tobytes() for flat in writer.storages] if storages is None else storages
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr(f"{prefix}/data.pkl", pickled)
        archive.writestr(f"{prefix}/byteorder", "little")
        for i, content in enumerate(contents):
            archive.writestr(f"{prefix}/data/{i}", content)
        for entry, content in extra:
            archive.writestr(entry, content)
    return path


def write_pickle(path, pickled):
    """Write the zip format around any pickle."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/data/0", np.zeros(4, np.float32).tobytes())
    return path


def write_legacy(path, value):
    """Write the format before torch 1.6: five pickles, then the storages."""
    writer = Writer()
    body = io.BytesIO()
    body.write(writer.pickle(0x1950A86A20F9469CFC6C))
    body.write(writer.pickle(1001))
    body.write(writer.pickle({"protocol_version": 1001, "little_endian": True, "type_sizes": {"int": 4}}))
    body.write(writer.pickle(value))
    body.write(writer.pickle([str(i) for i in range(len(writer.storages))]))
    for flat in writer.storages:
        body.write(struct.pack("<Q", flat.size) + flat.tobytes())
    path.write_bytes(body.getvalue())
    return path
