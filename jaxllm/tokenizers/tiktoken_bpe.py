"""Byte-level BPE vocabularies and our own folder format for them.

A folder of our own holds `tokenizer.tiktoken`, one "<base64 of the token's bytes> <id>" a line as in tiktoken's files,
and `tokenizer_config.json` with the keys of `CONFIG_KEYS` and, where they differ from their defaults, those of
`OPTIONAL_KEYS`. Lines stand in the order of merging; as a rule the ids count up from 0 in that order. Where they do
not, the config says with `merging_lines` that only the order counts, and that lines after so many do not merge.
"""

from __future__ import annotations

import functools
import hashlib
import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxllm.errors import InputError
from jaxllm.tokenizers import patterns
from jaxllm.tokenizers.base import Tokenizer, check_unicode, id_of
from jaxllm.tokenizers.cutter import TokenCutter
from jaxllm.tokenizers.files import read_bytes, read_json_object, to_json, write_together
from jaxllm.tokenizers.piece_encoder import PieceEncoder
from jaxllm.tokenizers.rank_file import parse_lines, parse_tokens, to_lines

RANKS_FILE = "tokenizer.tiktoken"
CONFIG_FILE = "tokenizer_config.json"
FORMAT_VERSION = 1
CONFIG_KEYS = ("format_version", "pattern", "normalization", "special_tokens", "bos_token", "eos_token", "pad_token")
OPTIONAL_KEYS = (
    *("merging_lines", "first_patterns", "absent_bytes"),
    *("added_tokens", "raw_tokens", "prefix_tokens", "suffix_tokens"),
)

QWEN_FILE = "qwen.tiktoken"
QWEN_PATTERN = patterns.QWEN


class TiktokenBPE(Tokenizer):
    """Byte-level BPE: pieces cut by a pattern, bytes of a piece merged in the order of the ranks.

    Attributes:
      tokens: bytes of the tokens that take part in merging, in the order of merging.
      ids: their ids.
      decode_only: bytes -> id of tokens that encoding never gives.
      added_tokens: text -> id of tokens that are cut out of every text.
    """

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
        ids: Sequence[int] | None = None,
        decode_only: Mapping[bytes, int] | None = None,
        first_patterns: Sequence[str] = (),
        absent_bytes: Sequence[int] = (),
        added_tokens: Mapping[str, int] | None = None,
        raw_tokens: Sequence[str] = (),
        prefix_tokens: Sequence[str] | None = None,
        suffix_tokens: Sequence[str] = (),
    ):
        """Build the tokenizer.

        Args:
          tokens: distinct byte strings in the order of merging, among them all single bytes but `absent_bytes`.
          pattern: regular expression whose matches are the pieces; what it does not match is a piece too.
          special_tokens: text -> id.
          normalization: Unicode normal form that texts are brought to first, or None.
          bos_token, eos_token, pad_token: members of `special_tokens`, or None.
          ids: the ids of `tokens`; None: 0, 1, 2, ...
          decode_only: further tokens, bytes -> id, that encoding never gives.
          first_patterns: patterns that cut the text, one after the other, before `pattern` does.
          absent_bytes: bytes that have no token; text that needs one is refused.
          added_tokens: text -> id of tokens that, unlike special ones, are cut out of every text.
          raw_tokens: those of special_tokens and added_tokens that are looked for before the normalization.
          prefix_tokens, suffix_tokens: special tokens around a prompt; prefix None: bos_token, if there is one.

        Raises:
          InputError: a missing byte, ids that clash, an unknown name, a faulty pattern.
        """
        if normalization not in ("NFC", None):
            raise InputError(f'normalization: found {normalization!r}, expected "NFC" or null')
        if prefix_tokens is None:
            prefix_tokens = () if bos_token is None else (bos_token,)
        self.tokens = tuple(tokens)
        self.ids = tuple(range(len(tokens)) if ids is None else ids)
        self.decode_only = dict(decode_only or {})
        self.pattern, self.first_patterns = pattern, tuple(first_patterns)
        self.normalization = normalization
        self.absent_bytes = tuple(absent_bytes)
        self.special_tokens, self.added_tokens = dict(special_tokens), dict(added_tokens or {})
        self.raw_tokens = tuple(raw_tokens)
        self.bos_token, self.eos_token, self.pad_token = bos_token, eos_token, pad_token
        self.prefix_tokens, self.suffix_tokens = tuple(prefix_tokens), tuple(suffix_tokens)
        self.bos_id = id_of(self.special_tokens, bos_token, "bos_token")
        self.eos_id = id_of(self.special_tokens, eos_token, "eos_token")
        self.pad_id = id_of(self.special_tokens, pad_token, "pad_token")
        self.prefix_ids = tuple(id_of(self.special_tokens, token, "prefix_tokens") for token in self.prefix_tokens)
        self.suffix_ids = tuple(id_of(self.special_tokens, token, "suffix_tokens") for token in self.suffix_tokens)
        self._bytes = dict(zip(self.ids, self.tokens, strict=True)) | {v: k for k, v in self.decode_only.items()}
        _add_texts(self._bytes, self.special_tokens, "special_tokens")
        _add_texts(self._bytes, self.added_tokens, "added_tokens")
        self.vocab_size = max(self._bytes) + 1
        self._encoder = PieceEncoder(self.tokens, (*self.first_patterns, pattern), self.absent_bytes)
        self._id_of_rank = np.array(self.ids, np.int32) if self._ids_are_not_ranks else None
        texts = self.special_tokens | self.added_tokens
        self._raw_cutter = TokenCutter({text: id_of(texts, text, "raw_tokens") for text in self.raw_tokens})
        self._cutter = TokenCutter({text: texts[text] for text in texts if text not in set(self.raw_tokens)})

    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        return self._encode(text, allow_special=allow_special).tolist()

    def encode_to_numpy(self, text: str) -> np.ndarray:
        return self._encode(text, allow_special=False).astype(np.int32, copy=False)

    def token_bytes(self, token_id: int) -> bytes:
        if token_id not in self._bytes:
            raise ValueError(f"token id {token_id}: expected 0 to {self.vocab_size - 1:,}")
        return self._bytes[token_id]

    @functools.cached_property
    def fingerprint(self) -> str:
        digest = hashlib.sha256(json.dumps(self._config(), sort_keys=True).encode())
        digest.update(self._lines())
        return digest.hexdigest()

    def save(self, folder: str | PathLike[str]) -> None:
        write_together(Path(folder), {RANKS_FILE: self._lines(), CONFIG_FILE: to_json(self._config())})

    @property
    def _ids_are_not_ranks(self) -> bool:
        return self.ids != tuple(range(len(self.tokens)))

    def _lines(self) -> bytes:
        return to_lines([*zip(self.tokens, self.ids, strict=True), *self.decode_only.items()])

    def _config(self) -> dict[str, Any]:
        config = {
            "format_version": FORMAT_VERSION,
            "pattern": self.pattern,
            "normalization": self.normalization,
            "special_tokens": self.special_tokens,
            "bos_token": self.bos_token,
            "eos_token": self.eos_token,
            "pad_token": self.pad_token,
        }
        if self._ids_are_not_ranks or self.decode_only:
            config["merging_lines"] = len(self.tokens)
        for key in ("first_patterns", "absent_bytes", "added_tokens", "raw_tokens", "suffix_tokens"):
            if getattr(self, key):
                config[key] = getattr(self, key)
        if self.prefix_tokens != (() if self.bos_token is None else (self.bos_token,)):
            config["prefix_tokens"] = self.prefix_tokens
        return config

    def _encode(self, text: str, *, allow_special: bool) -> np.ndarray:
        check_unicode(text)
        if not allow_special and not self.added_tokens:
            return self._encode_piecewise(self._normalize(text))
        passed_over: Collection[str] = () if allow_special else self.special_tokens
        parts = [
            self._encode_piecewise(part) if isinstance(part, str) else np.array([part], np.int32)
            for part in self._cut(text, passed_over)
        ]
        return np.concatenate(parts) if parts else np.array([], np.int32)

    def _cut(self, text: str, passed_over: Collection[str]) -> Iterator[str | int]:
        for part in self._raw_cutter.cut(text, passed_over=passed_over):
            if isinstance(part, int):
                yield part
            else:
                yield from self._cutter.cut(self._normalize(part), passed_over=passed_over)

    def _encode_piecewise(self, text: str) -> np.ndarray:
        ranks = self._encoder.encode(text)
        return ranks if self._id_of_rank is None else self._id_of_rank[ranks]

    def _normalize(self, text: str) -> str:
        return unicodedata.normalize(self.normalization, text) if self.normalization else text


def load_folder(folder: str | PathLike[str]) -> TiktokenBPE:
    """Read a tokenizer of our own folder format; every fault raises InputError with the file and what is wrong."""
    folder = Path(folder)
    config = read_json_object(folder / CONFIG_FILE)
    _check_config(config, folder / CONFIG_FILE)
    content = read_bytes(folder / RANKS_FILE)
    arguments = {key: value for key, value in config.items() if key not in ("format_version", "merging_lines")}
    if "merging_lines" in config:
        lines = list(parse_lines(content, folder / RANKS_FILE))
        tokens = [token for token, _ in lines[: config["merging_lines"]]]
        arguments["ids"] = [number for _, number in lines[: config["merging_lines"]]]
        arguments["decode_only"] = dict(lines[config["merging_lines"] :])
    else:
        tokens = parse_tokens(content, folder / RANKS_FILE)
    try:
        return TiktokenBPE(tokens, **arguments)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def number_from(first_id: int, special_tokens: Sequence[str]) -> dict[str, int]:
    """Give special tokens consecutive ids."""
    return {text: first_id + k for k, text in enumerate(special_tokens)}


def _add_texts(known: dict[int, bytes], texts: Mapping[str, int], field: str) -> None:
    """Add tokens with a fixed text to id -> bytes; raises InputError for ids that are taken."""
    for text, token_id in texts.items():
        check_unicode(text)
        if not text:
            raise InputError(f"{field}: found an empty text, expected at least one character")
        if type(token_id) is not int or token_id < 0 or token_id in known:
            raise InputError(f"{field}: {text!r} has the id {token_id!r}, expected a whole number no other token has")
        known[token_id] = text.encode()


def _check_config(config: dict[str, Any], path: Path) -> None:
    for key in config:
        if key not in (*CONFIG_KEYS, *OPTIONAL_KEYS):
            raise InputError(f"{path}: unknown key {key!r}; expected {', '.join((*CONFIG_KEYS, *OPTIONAL_KEYS))}")
    for key in CONFIG_KEYS:
        if key not in config:
            raise InputError(f"{path}: key {key!r} is missing")
    if config["format_version"] != FORMAT_VERSION:
        raise InputError(f"{path}: format_version: found {config['format_version']!r}, expected {FORMAT_VERSION}")
    if not isinstance(config["pattern"], str):
        raise InputError(f"{path}: pattern: found {config['pattern']!r}, expected a regular expression")
    for key in ("special_tokens", "added_tokens"):
        if not isinstance(config.get(key, {}), dict):
            raise InputError(f"{path}: {key}: found {config[key]!r}, expected an object of text: id")
    for key in ("first_patterns", "raw_tokens", "prefix_tokens", "suffix_tokens"):
        if not _is_list(config.get(key, []), str):
            raise InputError(f"{path}: {key}: found {config[key]!r}, expected a list of texts")
    if not _is_list(config.get("absent_bytes", []), int):
        raise InputError(f"{path}: absent_bytes: found {config['absent_bytes']!r}, expected a list of numbers")
    if type(config.get("merging_lines", 0)) is not int or config.get("merging_lines", 0) < 0:
        raise InputError(f"{path}: merging_lines: found {config['merging_lines']!r}, expected a number of lines")


def _is_list(found: Any, kind: type) -> bool:
    return isinstance(found, list) and all(type(entry) is kind for entry in found)
