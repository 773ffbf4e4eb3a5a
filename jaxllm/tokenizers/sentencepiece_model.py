"""sentencepiece `.model` files with the special tokens that a family of models adds, and our own folder format.

A folder of our own holds the published `tokenizer.model` and `sentencepiece.json` with the keys of `CONFIG_KEYS`.

Decoding gives the text back where the model's normalizer changes nothing (name "identity") and its pieces cover the
text, as byte pieces do. One thing is always lost: the character "▁" (U+2581) stands for a space, and becomes one.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import regex

from jaxllm.errors import InputError, missing_extra
from jaxllm.tokenizers.base import Tokenizer, check_unicode, id_of
from jaxllm.tokenizers.cutter import TokenCutter
from jaxllm.tokenizers.files import read_bytes, read_json_object, to_json, write_together
from jaxllm.tokenizers.sentencepiece_proto import BYTE, CONTROL, UNKNOWN, ModelProto, Piece

MODEL_FILE = "tokenizer.model"
CONFIG_FILE = "sentencepiece.json"
FORMAT_VERSION = 1
CONFIG_KEYS = (
    *("format_version", "special_tokens", "bos_token", "eos_token", "pad_token", "prefix_tokens", "suffix_tokens"),
    *("text_of_pieces", "first_id"),
)
SPACE = "▁"


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model whose special tokens come out of text only where that is asked for.

    Each run of text between special tokens is encoded by itself. Where the model puts a space before a text
    (add_dummy_prefix), every run begins with one, which decoding takes away again.

    Special tokens whose text is a mere word ("sop") never come out of text, asked for or not.
    """

    def __init__(
        self,
        content: bytes,
        *,
        special_tokens: Mapping[str, int] | None = None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
        prefix_tokens: Sequence[str] = (),
        suffix_tokens: Sequence[str] = (),
        text_of_pieces: Mapping[str, str] | None = None,
        first_id: int = 0,
    ):
        """Build the tokenizer.

        Args:
          content: the bytes of a sentencepiece model.
          special_tokens: text -> id, besides the model's control pieces. An id of the model takes its piece's place;
            two texts may share an id, which then decodes to the first.
          bos_token, eos_token, pad_token: special tokens or the unknown piece, or None.
          prefix_tokens, suffix_tokens: special tokens around a prompt.
          text_of_pieces: pieces that stand for another text, such as "<n>" for a line break; text that spells such a
            piece out is not told from what it stands for.
          first_id: id of the model's first piece.

        Raises:
          InputError: sentencepiece is not installed; the content is no model of it; an unknown name; ids that clash.
        """
        proto = parse_model(content, "the model")
        if proto.whitespace_as_suffix:
            raise InputError("the model marks spaces at the end of words; expected it at their beginning")
        self.content = content
        self.first_id = first_id
        self.text_of_pieces = dict(text_of_pieces or {})
        self._add_dummy_prefix = proto.add_dummy_prefix
        self.added_specials = dict(special_tokens or {})
        controls = {
            piece.text: first_id + k
            for k, piece in enumerate(proto.pieces)
            if piece.kind == CONTROL and first_id + k not in self.added_specials.values()
        }
        self.special_tokens = controls | self.added_specials
        self._text_of_special = {token_id: text for text, token_id in reversed(self.special_tokens.items())}
        self._bytes = {
            first_id + k: _bytes_of(piece, proto.unk_surface, self.text_of_pieces)
            for k, piece in enumerate(proto.pieces)
        }
        self._begins_with_space = {k for k, found in self._bytes.items() if found.startswith(b" ")}
        self._begins_with_space -= {first_id + k for k, piece in enumerate(proto.pieces) if piece.kind == UNKNOWN}
        self._bytes |= {k: text.encode() for k, text in self._text_of_special.items()}
        self.vocab_size = max(self._bytes) + 1
        named = {piece.text: first_id + k for k, piece in enumerate(proto.pieces) if piece.kind == UNKNOWN}
        named |= self.special_tokens
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.prefix_tokens, self.suffix_tokens = tuple(prefix_tokens), tuple(suffix_tokens)
        self.bos_id = id_of(named, bos_token, "bos_token")
        self.eos_id = id_of(named, eos_token, "eos_token")
        self.pad_id = id_of(named, pad_token, "pad_token")
        self.prefix_ids = tuple(id_of(named, token, "prefix_tokens") for token in self.prefix_tokens)
        self.suffix_ids = tuple(id_of(named, token, "suffix_tokens") for token in self.suffix_tokens)
        self._cutter = TokenCutter({text: k for text, k in self.special_tokens.items() if not text.isalnum()})
        texts = {text: piece for piece, text in self.text_of_pieces.items()}
        self._pieces_of_text = texts
        self._find_texts = regex.compile(r"\L<texts>", texts=list(texts)) if texts else None
        self._processor = _load(self._with_specials_as_controls(proto))

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        check_unicode(text)
        parts: Iterator[str | int] = self._cutter.cut(text) if allow_special else iter([text])
        return [token_id for part in parts for token_id in ([part] if isinstance(part, int) else self._encode(part))]

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return np.array(self.encode(text), np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            raise ValueError(f"token id {token_id}: expected 0 to {self.vocab_size - 1:,}")
        return self._bytes[token_id]

    def bytes_after(self, previous: int | None, token_id: int) -> bytes:
        found = self.token_bytes(token_id)
        begins_run = previous is None or previous in self._text_of_special
        if begins_run and self._add_dummy_prefix and token_id in self._begins_with_space:
            return found[1:]
        return found

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        digest.update(self.content)
        return digest.hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        write_together(Path(folder), {MODEL_FILE: self.content, CONFIG_FILE: to_json(self._config())})

    def _config(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "special_tokens": self.added_specials,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
            "prefix_tokens": self.prefix_tokens,
            "suffix_tokens": self.suffix_tokens,
            "text_of_pieces": self.text_of_pieces,
            "first_id": self.first_id,
        }

    def _encode(self, text: str) -> list[int]:
        if self._find_texts is not None:
            text = self._find_texts.sub(lambda match: self._pieces_of_text[match.group()], text)
        ids = self._processor.encode(text, out_type=int)
        return [self.first_id + k for k in ids] if self.first_id else ids

    def _with_specials_as_controls(self, proto: ModelProto) -> bytes:
        """Let no text become a special token: sentencepiece gives its control pieces to none."""
        for token_id in self._text_of_special:
            k = token_id - self.first_id
            if 0 <= k < len(proto.pieces):
                proto.pieces[k] = dataclasses.replace(proto.pieces[k], kind=CONTROL)
        return proto.serialize()


def _bytes_of(piece: Piece, unk_surface: str, text_of_pieces: Mapping[str, str]) -> bytes:
    if piece.kind == UNKNOWN:
        return unk_surface.encode()
    if piece.kind == BYTE:
        match = regex.fullmatch(r"<0x([0-9A-F]{2})>", piece.text)
        if match is None:
            raise InputError(f"the model has a byte piece {piece.text!r}, expected <0x00> to <0xFF>")
        return bytes.fromhex(match[1])
    return text_of_pieces.get(piece.text, piece.text.replace(SPACE, " ")).encode()


def parse_model(content: bytes, name: str) -> ModelProto:
    """Parse a sentencepiece model; raises InputError, which begins with `name`, where it is none."""
    try:
        return ModelProto(content)
    except ValueError as error:
        raise InputError(f"{name}: not a sentencepiece model: {error}") from error


def load_folder(folder: str | PathLike[str]) -> SentencePieceTokenizer:
    """Read a tokenizer of our own folder format; every fault raises InputError with the file and what is wrong."""
    folder = Path(folder)
    path = folder / CONFIG_FILE
    config = read_json_object(path)
    for key in config:
        if key not in CONFIG_KEYS:
            raise InputError(f"{path}: unknown key {key!r}; expected {', '.join(CONFIG_KEYS)}")
    for key in CONFIG_KEYS:
        if key not in config:
            raise InputError(f"{path}: key {key!r} is missing")
    _check_values(config, path)
    arguments = {key: value for key, value in config.items() if key != "format_version"}
    try:
        return SentencePieceTokenizer(read_bytes(folder / MODEL_FILE), **arguments)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _check_values(config: Mapping[str, Any], path: Path) -> None:
    if config["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format_version: found {config['format_version']!r}, expected {FORMAT_VERSION}")
    if type(config["first_id"]) is not int or config["first_id"] < 0:
        raise InputError(f"{path}: first_id: found {config['first_id']!r}, expected a whole number")
    for key, kind in (("special_tokens", int), ("text_of_pieces", str)):
        if not isinstance(config[key], dict) or not all(type(value) is kind for value in config[key].values()):
            raise InputError(f"{path}: {key}: found {config[key]!r}, expected an object of text: {kind.__name__}")
    for key in ("prefix_tokens", "suffix_tokens"):
        if not isinstance(config[key], list):
            raise InputError(f"{path}: {key}: found {config[key]!r}, expected a list of texts")


def _load(content: bytes) -> Any:
    sentencepiece = _sentencepiece()
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=content)
    except RuntimeError as error:
        raise InputError(f"sentencepiece cannot load the model: {error}") from error


def _sentencepiece() -> ModuleType:
    try:
        import sentencepiece
    except ImportError as error:
        raise missing_extra("sentencepiece", "convert", "reading sentencepiece models") from error
    return sentencepiece
