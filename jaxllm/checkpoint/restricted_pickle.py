"""A reader of the pickles that torch.save writes, which executes nothing.

A pickle is a program: it names functions and calls them. This machine knows the few opcodes and names that a dictionary
of tensors consists of, builds plain descriptions of the tensors, and refuses everything else by name.
"""

from __future__ import annotations

import dataclasses
import math
import pickletools
from collections.abc import Callable
from typing import IO, Any

import ml_dtypes
import numpy as np

from jaxllm.errors import InputError

MAX_BYTES = 8 << 20
"""Longest pickle that is read; one of 10,000 tensors has about 2 MB."""
_MAX_DIMS = 32
_MAX_STACK = 100_000  # torch.save flushes dictionaries every 1,000 entries

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}


@dataclasses.dataclass(frozen=True)
class Storage:
    """A flat array that tensors are views of.

    Attributes:
      key: its name in the file. size: elements.
    """

    dtype: np.dtype
    key: str
    size: int


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A view of a storage; offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Named:
    """A name that a pickle may mention."""

    def __init__(self, name: str):
        self.name = name


class _Inert(_Named):
    """What a training checkpoint keeps beside its tensors; it is mentioned, never made."""


_MARK = object()
_INERT = (
    "argparse.Namespace",
    "builtins.set",
    "__builtin__.set",
    "_codecs.encode",
    "torch.device",
    "torch.float16",
    "torch.float32",
    "torch.bfloat16",
    "numpy.dtype",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
)


def read_pickle(file: IO[bytes]) -> tuple[Any, dict[str, Storage]]:
    """Read one pickle from where `file` stands, and leave it at its end.

    Returns:
      (value, storages by key); the value is made of dicts, lists, tuples, strings, bytes, numbers, booleans and None,
      with StoredTensor for tensors. The same dict may occur in several places, or in itself.

    Raises:
      InputError: the pickle is damaged, or does anything but describe tensors; names the opcode or function and its
        offset.
    """
    machine = _Machine()
    try:
        for opcode, argument, offset in pickletools.genops(file):
            machine.step(opcode.name, argument, offset or 0)
    except InputError:
        raise
    except (ValueError, OverflowError, IndexError, KeyError) as error:
        raise InputError(f"damaged pickle: {error!r:.200}") from error
    return machine.result(), machine.storages


class _Machine:
    """A stack and a memo, as pickle has them."""

    def __init__(self):
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.storages: dict[str, Storage] = {}

    def step(self, name: str, argument: Any, offset: int) -> None:
        if name in _CONSTANTS:
            self._stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self._stack.append(argument)
        elif name in _ACTIONS:
            try:
                _ACTIONS[name](self, argument)
            except InputError as error:
                raise InputError(f"{error} at offset {offset}") from error
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise InputError(f"refused opcode {name}, which no dictionary of tensors needs, at offset {offset}")
        if len(self._stack) > _MAX_STACK:
            raise InputError(f"more than {_MAX_STACK} pickled objects wait at once at offset {offset}")

    def result(self) -> Any:
        if len(self._stack) != 1:
            raise InputError(f"damaged pickle: {len(self._stack)} objects are left at its end, expected 1")
        return self._stack[0]

    def _pop_to_mark(self) -> list[Any]:
        place = next((i for i in range(len(self._stack) - 1, -1, -1) if self._stack[i] is _MARK), None)
        if place is None:
            raise InputError("damaged pickle: no mark")
        items = self._stack[place + 1 :]
        del self._stack[place:]
        return items

    def mark(self, _: Any) -> None:
        self._stack.append(_MARK)

    def make_tuple(self, size: int | None) -> None:
        items = self._pop_to_mark() if size is None else [self._stack.pop() for _ in range(size)][::-1]
        self._stack.append(tuple(items))

    def append(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, _Inert):
            raise InputError(f"items for a {type(target).__name__}")

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if isinstance(target, _Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise InputError(f"{len(items)} keys and values for a {type(target).__name__}")
        target.update(_dictionary(items[::2], items[1::2]))

    def put(self, place: int | None) -> None:
        self._memo[len(self._memo) if place is None else place] = self._stack[-1]

    def get(self, place: int) -> None:
        self._stack.append(self._memo[place])

    def mention(self, name: str) -> None:
        if name in _INERT:
            self._stack.append(_Inert(name))
        elif name in _CALLS or name.removeprefix("torch.") in STORAGES:
            self._stack.append(_Named(name))
        else:
            raise InputError(f"refused to execute {name:.120}, which no dictionary of tensors needs,")

    def mention_from_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        self.mention(f"{module}.{name}" if isinstance(module, str) and isinstance(name, str) else "?")

    def persistent(self, _: Any) -> None:
        storage = _storage(self._stack.pop())
        if self.storages.setdefault(storage.key, storage) != storage:
            raise InputError(f"storage {storage.key!r:.40} is described twice, differently,")
        self._stack.append(storage)

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if isinstance(function, _Inert):
            self._stack.append(function)
            return
        if not isinstance(function, _Named) or function.name not in _CALLS or not isinstance(arguments, tuple):
            raise InputError(f"a call of a {type(function).__name__}")
        try:
            self._stack.append(_CALLS[function.name](*arguments))
        except TypeError as error:
            raise InputError(f"wrong arguments of {function.name}") from error

    def build(self, _: Any) -> None:
        """Set attributes: of an OrderedDict torch's `_metadata`, which no tensor needs."""
        self._stack.pop()
        if not isinstance(self._stack[-1], dict | _Inert):
            raise InputError(f"attributes for a {type(self._stack[-1]).__name__}")


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
}
_LITERALS = (
    *("BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT"),
    *("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING"),
    *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
)
_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.make_tuple(None),
    "TUPLE1": lambda machine, _: machine.make_tuple(1),
    "TUPLE2": lambda machine, _: machine.make_tuple(2),
    "TUPLE3": lambda machine, _: machine.make_tuple(3),
    "APPEND": lambda machine, _: machine.append([machine._stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine._stack.pop(-2), machine._stack.pop()]),
    "SETITEMS": lambda machine, _: machine.set_items(machine._pop_to_mark()),
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.put,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "GLOBAL": lambda machine, argument: machine.mention(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": _Machine.mention_from_stack,
    "BINPERSID": _Machine.persistent,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "BUILD": _Machine.build,
}


def _dictionary(keys: list[Any], values: list[Any]) -> dict[Any, Any]:
    # Only these: hashing a deeply nested tuple overflows the interpreter's stack.
    if wrong := [type(key).__name__ for key in keys if type(key) not in (str, int, bool, float)]:
        raise InputError(f"a dictionary key that is a {wrong[0]}")
    return dict(zip(keys, values, strict=True))


def _storage(identity: Any) -> Storage:
    """Read the persistent id ("storage", class, key, device, elements[, view])."""
    is_plain = isinstance(identity, tuple) and len(identity) in (5, 6) and identity[0] == "storage"
    if not is_plain or (len(identity) == 6 and identity[5] is not None):
        raise InputError("a persistent id that is no plain storage")
    _, kind, key, _, size = identity[:5]
    name = kind.name.removeprefix("torch.") if isinstance(kind, _Named) else type(kind).__name__
    if name not in STORAGES or not isinstance(key, str) or not _are_natural(size):
        raise InputError(f"a storage of {name} that is not described as torch does")
    return Storage(STORAGES[name], key, size)


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> StoredTensor:
    """Check that a tensor lies inside its storage and is no larger than it."""
    is_plain = isinstance(storage, Storage) and isinstance(shape, tuple) and isinstance(strides, tuple)
    if not is_plain or not len(shape) == len(strides) <= _MAX_DIMS or not _are_natural(offset, *shape, *strides):
        raise InputError("a tensor that is not described as torch does")
    elements = math.prod(shape)
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if elements and (last >= storage.size or elements > storage.size):
        raise InputError(f"a tensor of shape {shape} beyond its storage of {storage.size} elements")
    return StoredTensor(storage, offset, shape, strides)


def _parameter(data: Any, *_: Any) -> StoredTensor:
    if not isinstance(data, StoredTensor):
        raise InputError(f"a parameter made of a {type(data).__name__}")
    return data


def _size(items: Any = ()) -> tuple[int, ...]:
    if not isinstance(items, tuple) or not _are_natural(*items):
        raise InputError("a torch.Size that is not made of sizes")
    return items


def _are_natural(*values: Any) -> bool:
    return all(type(value) is int and 0 <= value < 1 << 62 for value in values)


_CALLS: dict[str, Callable[..., Any]] = {
    # Without arguments: entries follow as SETITEMS, and copies of a long list would be cheap to ask for.
    "collections.OrderedDict": lambda: {},
    "torch.Size": _size,
    "torch._utils._rebuild_parameter": _parameter,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
}
