"""tiktoken's files: one "<base64 of the token's bytes> <rank>" a line."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator
from os import PathLike

from jaxllm.errors import InputError


def parse_tokens(content: bytes, path: str | PathLike[str]) -> list[bytes]:
    """Read lines whose ranks count up from 0; `path` names the file in errors."""
    tokens = []
    for rank, (token, found) in enumerate(parse_lines(content, path)):
        if found != rank:
            raise InputError(f"{path}:{rank + 1}: found rank '{found}', expected {rank}: ranks count up from 0")
        tokens.append(token)
    return tokens


def parse_lines(content: bytes, path: str | PathLike[str]) -> Iterator[tuple[bytes, int]]:
    """Yield the distinct tokens of a file with their numbers, which may stand in any order.

    Raises:
      InputError: a line that is none, a token or a number that stands there twice.
    """
    tokens: set[bytes] = set()
    numbers: set[int] = set()
    for k, line in enumerate(content.splitlines()):
        try:
            encoded, digits = line.split()
            token, number = base64.b64decode(encoded, validate=True), int(digits)
        except ValueError as error:
            raise InputError(f"{path}:{k + 1}: found {_shown(line)}, expected '<base64> <rank>'") from error
        if number in numbers or digits != b"%d" % abs(number):
            raise InputError(f"{path}:{k + 1}: found rank {_shown(digits)}, expected one that no other line has")
        if token in tokens:
            raise InputError(f"{path}:{k + 1}: the token {_shown(encoded)} stands in the file twice")
        tokens.add(token)
        numbers.add(number)
        yield token, number


def to_lines(tokens: Iterable[tuple[bytes, int]]) -> bytes:
    """Write lines of tokens and their numbers."""
    return b"".join(base64.b64encode(token) + b" %d\n" % number for token, number in tokens)


def _shown(found: bytes) -> str:
    return repr(found[:80].decode("utf-8", errors="replace"))
