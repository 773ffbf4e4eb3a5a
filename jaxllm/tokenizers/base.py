"""What every tokenizer offers, and the decoder that turns a stream of ids into a stream of text."""

from __future__ import annotations

import abc
import codecs
from collections.abc import Iterable
from os import PathLike

import numpy as np


class Tokenizer(abc.ABC):
    """A reversible map between text and token ids.

    Attributes:
      vocab_size: one more than the largest id, special tokens included.
      special_tokens: text of each special token -> id.
      bos_id, eos_id, pad_id: ids of the begin, end and padding tokens, or None where there is none.
      fingerprint: hex sha256 of all that decides which ids a text gets and what they mean.
    """

    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    fingerprint: str

    @abc.abstractmethod
    def encode(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text; special-token text is ordinary text unless `allow_special`.

        Raises InputError for text that has no UTF-8 form (lone surrogates).
        """

    @abc.abstractmethod
    def encode_to_numpy(self, text: str) -> np.ndarray:
        """Return the ids of an ordinary text, int32 [num_tokens]."""

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes of one token; raises ValueError for an id that has none."""

    @abc.abstractmethod
    def save(self, folder: str | PathLike[str]) -> None:
        """Write the files from which `load_tokenizer(folder)` builds the same tokenizer; InputError where it cannot."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of a sequence of ids; special tokens give their text."""
        return b"".join(map(self.token_bytes, ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids one by one and holds back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, possibly none."""
        return self._utf8.decode(self._tokenizer.token_bytes(token_id))

    def finish(self) -> str:
        """Return what is held back, as U+FFFD, and start anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text
