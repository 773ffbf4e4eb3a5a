"""Byte-level BPE vocabularies, run by tiktoken: our own folder format and the published Qwen v1 file.

A folder of our own holds `tokenizer.tiktoken`, one "<base64 of the token's bytes> <rank>" a line as in tiktoken's
files, and `tokenizer_config.json` with exactly the keys of `CONFIG_KEYS`.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import os
import unicodedata
import uuid
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tiktoken

from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer

RANKS_FILE = "tokenizer.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
FORMAT_VERSION = 1
CONFIG_KEYS = ("format_version", "pattern", "normalization", "special_tokens", "bos_token", "eos_token", "pad_token")

QWEN_FILE = "qwen.tiktoken"
QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
# cl100k_base's pattern, but digits stand alone (arXiv:2309.16609 section 2.2).
QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{k}|>" for k in range(205)))


class TiktokenBPE(Tokenizer):
    """Byte-level BPE: pieces cut by a pattern, bytes of a piece merged in the order of the ranks."""

    def __init__(
        self,
        tokens: Sequence[bytes],
        *,
        pattern: str,
        special_tokens: Mapping[str, int],
        normalization: Literal["NFC"] | None,
        bos_token: str | None = None,
        eos_token: str | None = None,
        pad_token: str | None = None,
    ):
        """Build the tokenizer.

        Args:
          tokens: distinct byte strings, among them all 256 single bytes; the index of a token is its rank, which is
            both its id and its place in the order of merging.
          pattern: regular expression whose matches are the pieces.
          special_tokens: text -> id; the ids follow the ranks without a hole.
          normalization: Unicode normal form that texts are brought to first, or None.
          bos_token, eos_token, pad_token: members of `special_tokens`, or None.

        Raises:
          InputError: a missing byte, special ids that clash or leave holes, an unknown name, a faulty pattern.
        """
        _check_tokens(tokens)
        _check_special_tokens(special_tokens, first_id=len(tokens))
        if normalization not in ("NFC", None):
            raise InputError(f'normalization: found {normalization!r}, expected "NFC" or null')
        self.tokens = tuple(tokens)
        self.pattern = pattern
        self.normalization = normalization
        self.special_tokens = dict(special_tokens)
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.bos_id = self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self.pad_id = self._special_id("pad_token", pad_token)
        self._special_bytes = {token_id: text.encode() for text, token_id in special_tokens.items()}
        self.vocab_size = len(tokens) + len(special_tokens)
        self._encoding = _build_encoding(self.tokens, pattern, self.special_tokens)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self._encode(text, allowed_special=set(self.special_tokens) if allow_special else set()).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return self._encode(text, allowed_special=set()).astype(np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        if 0 <= token_id < len(self.tokens):
            return self.tokens[token_id]
        if token_id not in self._special_bytes:
            raise ValueError(f"token id {token_id}: expected 0 to {self.vocab_size - 1:,}")
        return self._special_bytes[token_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        digest.update(_to_lines(self.tokens))
        return digest.hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        config = json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n"
        _write_together(Path(folder), {RANKS_FILE: _to_lines(self.tokens), CONFIG_FILE: config.encode()})

    def _config(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "normalization": self.normalization,
            "special_tokens": self.special_tokens,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
        }

    def _special_id(self, field: str, token: str | None) -> int | None:
        if token is None:
            return None
        if not isinstance(token, str) or token not in self.special_tokens:
            raise InputError(f"{field}: found {token!r}, expected one of special_tokens or null")
        return self.special_tokens[token]

    def _encode(self, text: str, *, allowed_special: set[str]) -> np.ndarray:
        check_unicode(text)
        if self.normalization:
            text = unicodedata.normalize(self.normalization, text)
        try:
            return self._encoding.encode_to_numpy(text, allowed_special=allowed_special, disallowed_special=())
        except ValueError as error:
            # For instance a million blanks before a letter: the pattern's look-ahead runs out of stack.
            raise InputError(f"text of {len(text):,} characters cannot be cut into pieces: {error}") from error


def qwen_tokenizer(path: str | PathLike[str]) -> TiktokenBPE:
    """Read the published Qwen v1 vocabulary, `qwen.tiktoken`: 151,643 ranks and 208 special tokens.

    Raises InputError for a file that is missing or is not the published one.
    """
    path = Path(path)
    content = _read(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != QWEN_SHA256:
        raise InputError(f"{path}: found sha256 {sha256}, expected the published vocabulary's {QWEN_SHA256}")
    tokens = parse_tokens(content, path)
    return TiktokenBPE(
        tokens,
        pattern=QWEN_PATTERN,
        special_tokens=number_from(len(tokens), QWEN_SPECIALS),
        normalization="NFC",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def load_folder(folder: str | PathLike[str]) -> TiktokenBPE:
    """Read a tokenizer of our own folder format; every fault raises InputError with the file and what is wrong."""
    folder = Path(folder)
    path = folder / CONFIG_FILE
    try:
        config = json.loads(_read(path))
    except ValueError as error:
        raise InputError(f"{path}: not a JSON file: {error}") from error
    _check_config(config, path)
    tokens = parse_tokens(_read(folder / RANKS_FILE), folder / RANKS_FILE)
    fields = {key: value for key, value in config.items() if key != "format_version"}
    try:
        return TiktokenBPE(tokens, **fields)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def parse_tokens(content: bytes, path: str | PathLike[str]) -> list[bytes]:
    """Read "<base64> <rank>" lines whose ranks count up from 0; `path` names the file in errors."""
    tokens: dict[bytes, None] = {}
    for rank, line in enumerate(content.splitlines()):
        try:
            encoded, found = line.split()
            token = base64.b64decode(encoded, validate=True)
        except ValueError as error:
            raise InputError(f"{path}:{rank + 1}: found {_shown(line)}, expected '<base64> <rank>'") from error
        if found != b"%d" % rank:
            raise InputError(f"{path}:{rank + 1}: found rank {_shown(found)}, expected {rank}: ranks count up from 0")
        if token in tokens:
            raise InputError(f"{path}:{rank + 1}: the token {_shown(encoded)} stands in the file twice")
        tokens[token] = None
    return list(tokens)


def number_from(first_id: int, special_tokens: Sequence[str]) -> dict[str, int]:
    """Give special tokens consecutive ids."""
    return {text: first_id + k for k, text in enumerate(special_tokens)}


def check_unicode(text: str) -> None:
    """Raise InputError for text with lone surrogates, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error


def _check_tokens(tokens: Sequence[bytes]) -> None:
    known = set(tokens)
    assert len(known) == len(tokens), "tokens are distinct"
    for byte in range(256):
        if bytes([byte]) not in known:
            raise InputError(f"no token for the single byte 0x{byte:02x} among {len(tokens):,}; expected all 256 bytes")


def _check_special_tokens(special_tokens: Mapping[str, int], *, first_id: int) -> None:
    free = set(range(first_id, first_id + len(special_tokens)))
    expected = f"each of {first_id:,} to {first_id + len(special_tokens) - 1:,} once"
    for text, token_id in special_tokens.items():
        check_unicode(text)
        if not text:
            raise InputError("special_tokens: found an empty text, expected at least one character")
        if type(token_id) is not int or token_id not in free:
            raise InputError(f"special_tokens: {text!r} has the id {token_id!r}, expected {expected}")
        free.remove(token_id)


def _check_config(config: Any, path: Path) -> None:
    if not isinstance(config, dict):
        raise InputError(f"{path}: found {type(config).__name__}, expected a JSON object")
    for key in config:
        if key not in CONFIG_KEYS:
            raise InputError(f"{path}: unknown key {key!r}; expected {', '.join(CONFIG_KEYS)}")
    for key in CONFIG_KEYS:
        if key not in config:
            raise InputError(f"{path}: key {key!r} is missing")
    if config["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format_version: found {config['format_version']!r}, expected {FORMAT_VERSION}")
    if not isinstance(config["pattern"], str):
        raise InputError(f"{path}: pattern: found {config['pattern']!r}, expected a regular expression")
    if not isinstance(config["special_tokens"], dict):
        raise InputError(f"{path}: special_tokens: found {config['special_tokens']!r}, expected an object of text: id")


def _build_encoding(tokens: Sequence[bytes], pattern: str, special_tokens: dict[str, int]) -> tiktoken.Encoding:
    ranks = {token: rank for rank, token in enumerate(tokens)}
    try:
        return tiktoken.Encoding("jaxllm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise InputError(f"pattern: {pattern!r} does not compile: {error}") from error


def _to_lines(tokens: Sequence[bytes]) -> bytes:
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))


def _shown(found: bytes) -> str:
    return repr(found[:80].decode("utf-8", errors="replace"))


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from error


def _write_together(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Write files, and give them their names only when all are on disk."""
    temporaries = {name: folder / f".{name}.{uuid.uuid4().hex}" for name in contents}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, temporary in temporaries.items():
            with open(temporary, "xb") as file:
                file.write(contents[name])
                file.flush()
                os.fsync(file.fileno())
        for name, temporary in temporaries.items():
            os.replace(temporary, folder / name)
    except OSError as error:
        raise InputError(f"{folder}: the tokenizer cannot be written: {error.strerror}") from error
    finally:
        for temporary in temporaries.values():
            if temporary.exists():
                temporary.unlink()
