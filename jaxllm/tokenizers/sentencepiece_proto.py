"""The little of sentencepiece's ModelProto (sentencepiece_model.proto) that must be read and changed here.

The package itself can load a model but tells little about it and changes nothing in it.
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator, Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE = 2

# Field numbers of ModelProto, TrainerSpec and NormalizerSpec.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _WHITESPACE_AS_SUFFIX, _BYTE_FALLBACK, _UNK_SURFACE = 3, 24, 35, 44
_SPECIAL_IDS = {"unk": 40, "bos": 41, "eos": 42, "pad": 43}
_NORMALIZER_NAME, _DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 1, 3, 4

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5

Value = int | bytes
Field = tuple[int, int, Value]
"""Number, wire type and value of a field."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its place is its id."""

    text: str
    score: float = 0.0
    kind: int = NORMAL


class ModelProto:
    """A model's pieces and settings; what is not named here is kept as it is.

    Attributes:
      pieces: the vocabulary.
      add_dummy_prefix: whether a space is put before each text.
      whitespace_as_suffix: whether the mark for a space ends words instead of beginning them.
      unk_surface: text that the unknown token decodes to.
    """

    def __init__(self, content: bytes):
        """Parse a serialized ModelProto; raises ValueError where it is none."""
        fields = list(_parse(content))
        self.pieces = [_to_piece(value) for number, _, value in fields if number == _PIECES]
        if not self.pieces:
            raise ValueError("it holds no pieces")
        self._others = [field for field in fields if field[0] != _PIECES]
        trainer, normalizer = self._settings(_TRAINER), self._settings(_NORMALIZER)
        self.add_dummy_prefix = bool(normalizer.get(_DUMMY_PREFIX, True))
        self.whitespace_as_suffix = bool(trainer.get(_WHITESPACE_AS_SUFFIX, False))
        self.unk_surface = _to_bytes(trainer.get(_UNK_SURFACE, " \u2047 ".encode())).decode()

    def serialize(self, *, byte_fallback: bool = False) -> bytes:
        """Return the bytes of the model; `byte_fallback` switches that on."""
        fields = [(_PIECES, _LENGTH, _from_piece(piece)) for piece in self.pieces]
        # A field that comes again replaces the one before, and a message that comes again is merged into it.
        more = [(_TRAINER, _LENGTH, _serialize([(_BYTE_FALLBACK, _VARINT, 1)]))] if byte_fallback else []
        return _serialize([*fields, *self._others, *more])

    def _settings(self, number: int) -> dict[int, Value]:
        return {
            key: value
            for found, _, spec in self._others
            if found == number
            for key, _, value in _parse(_to_bytes(spec))
        }


def build_bpe_model(pieces: Sequence[Piece], special_ids: dict[str, int], *, add_dummy_prefix: bool) -> bytes:
    """Write a BPE model with byte fallback and without normalization, as LLaMA's is.

    Args:
      pieces: the vocabulary; exactly one piece is UNKNOWN, and 256 are BYTE.
      special_ids: the ids of "unk", "bos", "eos", "pad"; -1 for none.
      add_dummy_prefix: whether a space is put before each text.
    """
    trainer = [(_MODEL_TYPE, _VARINT, BPE), (_BYTE_FALLBACK, _VARINT, 1)]
    trainer += [(_SPECIAL_IDS[name], _VARINT, special_ids.get(name, -1) % 2**64) for name in _SPECIAL_IDS]
    normalizer = [
        (_NORMALIZER_NAME, _LENGTH, b"identity"),
        (_DUMMY_PREFIX, _VARINT, int(add_dummy_prefix)),
        (_REMOVE_EXTRA_WHITESPACES, _VARINT, 0),
    ]
    fields = [(_PIECES, _LENGTH, _from_piece(piece)) for piece in pieces]
    return _serialize(
        [*fields, (_TRAINER, _LENGTH, _serialize(trainer)), (_NORMALIZER, _LENGTH, _serialize(normalizer))]
    )


def _to_piece(message: Value) -> Piece:
    values = {number: value for number, _, value in _parse(_to_bytes(message))}
    (score,) = struct.unpack("<f", _to_bytes(values.get(2, bytes(4))))
    kind = values.get(3, NORMAL)
    if not isinstance(kind, int):
        raise ValueError("a piece has no valid type")
    return Piece(_to_bytes(values.get(1, b"")).decode(), score, kind)


def _from_piece(piece: Piece) -> bytes:
    return _serialize(
        [
            (1, _LENGTH, piece.text.encode()),
            (2, _FOUR_BYTES, struct.pack("<f", piece.score)),
            (3, _VARINT, piece.kind),
        ]
    )


def _parse(message: bytes) -> Iterator[Field]:
    """Yield the fields of a protobuf message; raises ValueError where it is none."""
    place = 0
    while place < len(message):
        key, place = _read_varint(message, place)
        number, wire = key >> 3, key & 7
        if wire == _VARINT:
            value, place = _read_varint(message, place)
            yield number, wire, value
            continue
        if wire == _LENGTH:
            length, place = _read_varint(message, place)
        elif wire in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if wire == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"unknown wire type {wire}")
        if place + length > len(message):
            raise ValueError("it ends in the middle of a field")
        yield number, wire, message[place : place + length]
        place += length


def _serialize(fields: Sequence[Field]) -> bytes:
    parts = []
    for number, wire, value in fields:
        parts.append(_varint(number << 3 | wire))
        if isinstance(value, int):
            parts.append(_varint(value))
        else:
            parts.append(_varint(len(value)) + value if wire == _LENGTH else value)
    return b"".join(parts)


def _read_varint(message: bytes, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(message):
            break
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("it holds a number that does not end")


def _varint(value: int) -> bytes:
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


def _to_bytes(value: Value) -> bytes:
    if not isinstance(value, bytes):
        raise ValueError("it holds a number where a text was expected")
    return value
