"""What every tokenizer offers, and the decoder that turns a stream of ids into a stream of text."""

from __future__ import annotations

import abc
import codecs
from collections.abc import Iterable, Mapping, Sequence
from os import PathLike

import numpy as np

from jaxllm.errors import InputError


class Tokenizer(abc.ABC):
    """A reversible map between text and token ids.

    Attributes:
      vocab_size: one more than the largest id, special tokens included.
      special_tokens: text of each special token -> id.
      bos_id, eos_id, pad_id: ids of the begin, end and padding tokens, or None where there is none.
      prefix_ids, suffix_ids: what the model expects before and after the text of a prompt.
      fingerprint: hex sha256 of all that decides which ids a text gets and what they mean.
    """

    vocab_size: int
    special_tokens: dict[str, int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int | None
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()
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

    def encode_prompt(self, text: str, *, allow_special: bool = False) -> list[int]:
        """Return the ids of a text with what the model expects around it: prefix_ids, text, suffix_ids."""
        return [*self.prefix_ids, *self.encode(text, allow_special=allow_special), *self.suffix_ids]

    def bytes_after(self, previous: int | None, token_id: int) -> bytes:
        """Return what a token adds to a decoded text that so far ends in `previous`, or is empty (None)."""
        return self.token_bytes(token_id)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of a sequence of ids; special tokens give their text."""
        previous, found = None, []
        for token_id in ids:
            found.append(self.bytes_after(previous, token_id))
            previous = token_id
        return b"".join(found)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of a sequence of ids; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


class StreamDecoder:
    """Decodes ids one by one and holds back the bytes of a character until it is whole."""

    def __init__(self, tokenizer: Tokenizer, *, after: Sequence[int] = ()):
        """Build the decoder; `after`: ids that the stream continues, a prompt for instance."""
        self._tokenizer = tokenizer
        self._previous = after[-1] if len(after) else None
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """Return the text that this id completes, possibly none."""
        text = self._utf8.decode(self._tokenizer.bytes_after(self._previous, token_id))
        self._previous = token_id
        return text

    def finish(self) -> str:
        """Return what is held back, as U+FFFD, and start anew."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        self._previous = None
        return text


def decode_after(tokenizer: Tokenizer, prompt: Sequence[int], ids: Iterable[int]) -> str:
    """Return the text of ids that continue a prompt; bytes that are not UTF-8 become U+FFFD."""
    decoder = StreamDecoder(tokenizer, after=prompt)
    return "".join([*map(decoder.push, ids), decoder.finish()])


def check_unicode(text: str) -> None:
    """Raise InputError for text with lone surrogates, which has no UTF-8 form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"text is not valid Unicode: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error


def id_of(special_tokens: Mapping[str, int], token: str | None, field: str) -> int | None:
    """Look up the id of a special token; raises InputError, naming the field, where there is none of that text."""
    if token is None:
        return None
    if not isinstance(token, str) or token not in special_tokens:
        raise InputError(f"{field}: found {token!r}, expected one of special_tokens or null")
    return special_tokens[token]
