"""Byte-level BPE vocabularies, run by tiktoken: our own folder format and the published Qwen v1 file.

A folder of our own holds `tokenizer.tiktoken`, one "<base64 of the token's bytes> <rank>" a line as in tiktoken's
files, and `tokenizer_config.json` with exactly the keys of `CONFIG_KEYS`.
"""

from __future__ import annotations

import base64
import binascii
import functools
import hashlib
import json
import os
import tempfile
import unicodedata
from collections.abc import Mapping
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
        ranks: Mapping[bytes, int],
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
          ranks: token bytes -> rank; the rank is both the id and the order of merging.
          pattern: regular expression whose matches are the pieces.
          special_tokens: text -> id, none of them a rank.
          normalization: Unicode normal form that texts are brought to first, or None.
          bos_token, eos_token, pad_token: members of `special_tokens`, or None.

        Raises:
          InputError: holes or missing bytes in the ranks, clashing ids, an unknown name, a faulty pattern.
        """
        _check_ranks(ranks)
        _check_special_tokens(special_tokens, num_ranks=len(ranks))
        if normalization not in ("NFC", None):
            raise InputError(f'normalization: found {normalization!r}, expected "NFC" or null')
        self.ranks = dict(ranks)
        self.pattern = pattern
        self.normalization = normalization
        self.special_tokens = dict(special_tokens)
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.bos_id = self._special_id("bos_token", bos_token)
        self.eos_id = self._special_id("eos_token", eos_token)
        self.pad_id = self._special_id("pad_token", pad_token)
        self._bytes = {rank: token for token, rank in self.ranks.items()}
        self._bytes |= {token_id: text.encode() for text, token_id in self.special_tokens.items()}
        self.vocab_size = max(self._bytes) + 1
        self._encoding = _build_encoding(self.ranks, pattern, self.special_tokens)

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        text = self._prepare(text)
        if allow_special:
            return self._encoding.encode(text, allowed_special="all")
        return self._encoding.encode_ordinary(text)

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return self._encoding.encode_to_numpy(self._prepare(text), disallowed_special=()).astype(np.int32)

    def token_bytes(self, token_id: int) -> bytes:
        token = self._bytes.get(int(token_id))
        if token is None:
            raise ValueError(f"token id {token_id}: no such token; the vocabulary has {self.vocab_size:,} ids")
        return token

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        digest.update(_ranks_to_lines(self.ranks))
        return digest.hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        _write_atomically(folder / RANKS_FILE, _ranks_to_lines(self.ranks))
        config = json.dumps(self._config(), indent=2, ensure_ascii=False) + "\n"
        _write_atomically(folder / CONFIG_FILE, config.encode())

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
        if token not in self.special_tokens:
            raise InputError(f"{field}: found {token!r}, expected one of special_tokens or null")
        return self.special_tokens[token]

    def _prepare(self, text: str) -> str:
        check_unicode(text)
        return unicodedata.normalize(self.normalization, text) if self.normalization else text


def qwen_tokenizer(path: str | PathLike[str]) -> TiktokenBPE:
    """Read the published Qwen v1 vocabulary, `qwen.tiktoken`: 151,643 ranks and 208 special tokens.

    Raises InputError for a file that is missing or is not the published one.
    """
    path = Path(path)
    content = _read(path)
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != QWEN_SHA256:
        raise InputError(f"{path}: found sha256 {sha256}, expected the published vocabulary's {QWEN_SHA256}")
    ranks = parse_ranks(content, path)
    return TiktokenBPE(
        ranks,
        pattern=QWEN_PATTERN,
        special_tokens={text: len(ranks) + k for k, text in enumerate(QWEN_SPECIALS)},
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
    ranks = parse_ranks(_read(folder / RANKS_FILE), folder / RANKS_FILE)
    fields = {key: value for key, value in config.items() if key != "format_version"}
    try:
        return TiktokenBPE(ranks, **fields)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def parse_ranks(content: bytes, path: str | PathLike[str]) -> dict[bytes, int]:
    """Read "<base64> <rank>" lines; `path` names the file in errors."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True)
            ranks_before = len(ranks)
            ranks[token] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise InputError(f"{path}:{number}: found {line[:80]!r}, expected '<base64> <rank>'") from error
        if len(ranks) == ranks_before:
            raise InputError(f"{path}:{number}: token {token!r} stands in the file twice")
    if not ranks:
        raise InputError(f"{path}: no tokens in the file")
    return ranks


def check_unicode(text: str) -> None:
    """Raise InputError for text with lone surrogates, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error


def _check_ranks(ranks: Mapping[bytes, int]) -> None:
    missing = set(range(len(ranks))).difference(ranks.values())
    if missing:
        raise InputError(f"ranks: {min(missing)} is missing; expected 0 to {len(ranks) - 1:,}, each once")
    unreachable = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if unreachable:
        raise InputError(f"ranks: no token for the single byte 0x{unreachable[0]:02x}; expected all 256 bytes")


def _check_special_tokens(special_tokens: Mapping[str, int], *, num_ranks: int) -> None:
    owner: dict[int, str] = {}
    for text, token_id in special_tokens.items():
        if not text:
            raise InputError("special_tokens: found an empty text, expected at least one character")
        if type(token_id) is not int or token_id < num_ranks:
            raise InputError(f"special_tokens: {text!r} has id {token_id!r}, expected a whole number >= {num_ranks:,}")
        if token_id in owner:
            raise InputError(f"special_tokens: {text!r} and {owner[token_id]!r} have the same id {token_id}")
        owner[token_id] = text


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


def _build_encoding(ranks: dict[bytes, int], pattern: str, special_tokens: dict[str, int]) -> tiktoken.Encoding:
    try:
        return tiktoken.Encoding("jaxllm", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens)
    except ValueError as error:
        raise InputError(f"pattern: {pattern!r} does not compile: {error}") from error


def _ranks_to_lines(ranks: Mapping[bytes, int]) -> bytes:
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ordered)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot read the file: {error.strerror}") from error


def _write_atomically(path: Path, content: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
