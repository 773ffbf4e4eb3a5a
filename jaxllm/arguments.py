"""Reading a command line: a strict argparse with suggestions, checked argument types, config overrides."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from jaxllm.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError for wrong usage, with the nearest flag or verb that there is."""

    def __init__(self, **options: Any):
        self._flags: list[str] = []
        self._verbs: dict[str, Any] = {}
        super().__init__(allow_abbrev=False, **options)

    def add_argument(self, *names: str, **options: Any) -> argparse.Action:
        self._flags += [name for name in names if name.startswith("--")]
        return super().add_argument(*names, **options)

    def add_verbs(self) -> argparse._SubParsersAction:
        verbs = self.add_subparsers(metavar="COMMAND", required=True)
        self._verbs = verbs.choices
        return verbs

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[argparse.Namespace, list[str]]:
        if self._verbs and args and not args[0].startswith("-") and args[0] not in self._verbs:
            self.error(f"unknown command {args[0]!r}{_nearest(args[0], self._verbs)}")
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unknown argument {unknown[0]!r}{_nearest(unknown[0].partition('=')[0], self._flags)}")
        return parsed, unknown

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def _nearest(word: str, words: Collection[str]) -> str:
    near = difflib.get_close_matches(word, words, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(words)}"


def _checked(kind: Callable[[str], Any], expected: str, holds: Callable[[Any], bool]) -> Callable[[str], Any]:
    """Return an argparse type that accepts what `kind` reads and `holds` accepts."""

    def convert(text: str) -> Any:
        with contextlib.suppress(ValueError):
            value = kind(text)
            if holds(value):
                return value
        raise argparse.ArgumentTypeError(f"expected {expected}, found {text!r}")

    return convert


NATURAL = _checked(int, "an integer of at least 0", lambda value: value >= 0)
POSITIVE = _checked(int, "an integer of at least 1", lambda value: value >= 1)
TEMPERATURE = _checked(float, "a number of at least 0", lambda value: 0 <= value < float("inf"))
PENALTY = _checked(float, "a number above 0", lambda value: 0 < value < float("inf"))
SHARE = _checked(float, "a number above 0 and at most 1", lambda value: 0 < value <= 1)


def utf8(text: str) -> str:
    """Check that an argument was UTF-8, as an argparse type; other bytes come as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError(f"expected UTF-8 text, found {text!r}") from error
    return text


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate config options (`a.b=v`, `--a.b v`, `--seed 1`) from the command's own arguments."""
    from jaxllm.config.options import all_options

    rest, overrides = [], []
    tokens = iter(argv)
    for token in tokens:
        name, equals, _ = token.removeprefix("--").partition("=")
        if token.startswith("--") and ("." in name or name in all_options()):
            overrides.append(token if equals else f"{token}={_value_of(token, tokens)}")
        elif re.match(r"[\w.]+=", token):
            overrides.append(token)
        else:
            rest.append(token)
    return rest, overrides


def _value_of(token: str, tokens: Iterator[str]) -> str:
    value = next(tokens, "--")
    if value.startswith("--"):
        raise InputError(f"command line: expected a value after {token}")
    return value
