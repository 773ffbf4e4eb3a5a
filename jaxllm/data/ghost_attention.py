"""Ghost Attention (Llama 2, arXiv:2307.09288 section 3.3): conversations that teach to keep to an instruction.

Replies are sampled with the instruction before every question. In the row it stands before the first question alone, so
that the model learns to remember it; all replies but the last, which would not follow from that, have weight 0.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxllm.data.rows import Message
from jaxllm.errors import InputError

Sample = Callable[[list[Message]], str]
"""Returns the assistant's reply to messages."""


class Constraint(NamedTuple):
    """One kind of instruction.

    Attributes:
      name: what it is about: a hobby, a language, a public figure.
      instruction, short: how it is said at length and in brief, with {} for the value.
      values: what it can be about.
    """

    name: str
    instruction: str
    short: str
    values: tuple[str, ...]


class Instruction(NamedTuple):
    """What replies keep to: as `sampled` with, and as the row says it."""

    sampled: str
    written: str


def read_constraints(path: str | Path) -> list[Constraint]:
    """Read constraints from a JSON list of objects with the fields name, instruction, short and values.

    Raises:
      InputError: names what was found and what was expected.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(found, list) or not found:
        raise InputError(f"{path}: expected a list of constraints")
    return [_constraint(entry, f"{path}: [{number}]") for number, entry in enumerate(found)]


def combine_constraints(constraints: Sequence[Constraint], rng: random.Random) -> Instruction:
    """Draw some of the constraints, at least one, with a value of each; half of the time the row says them in brief."""
    chosen = rng.sample(list(constraints), rng.randint(1, len(constraints)))
    drawn = [(constraint, rng.choice(constraint.values)) for constraint in chosen]
    sampled = " ".join(constraint.instruction.replace("{}", value) for constraint, value in drawn)
    short = " ".join(constraint.short.replace("{}", value) for constraint, value in drawn)
    return Instruction(sampled, short if rng.random() < 0.5 else sampled)


def ghost_dialogue(
    messages: Sequence[Message], instruction: Instruction
) -> Generator[list[Message], str, dict[str, Any]]:
    """Yield what is to be answered next, the instruction before every question; be sent the reply; return the row.

    Args:
      messages: a conversation of the user and the assistant, perhaps with a system message; its replies are not used.

    Raises:
      InputError: other roles, no question, or an empty reply.
    """
    system = [message for message in messages[:1] if message["role"] == "system"]
    questions = _questions(messages[len(system) :])
    asked, row = list(system), list(system)
    for number, question in enumerate(questions):
        asked.append(_said_before(instruction.sampled, question))
        reply = yield list(asked)
        if not reply.strip():
            raise InputError(f"the reply to question {number} is empty, expected text to train on")
        asked.append({"role": "assistant", "content": reply})
        row.append(question if number else _said_before(instruction.written, question))
        weight = {} if number == len(questions) - 1 else {"weight": 0}
        row.append({"role": "assistant", "content": reply} | weight)
    return {"messages": row}


def ghost_row(messages: Sequence[Message], instruction: Instruction, sample: Sample) -> dict[str, Any]:
    """Build a row of the questions of a conversation and sampled replies to them; see `ghost_dialogue`."""
    dialogue = ghost_dialogue(messages, instruction)
    try:
        asked = next(dialogue)
        while True:
            asked = dialogue.send(sample(asked))
    except StopIteration as end:
        return end.value


def ghost_rows(
    conversations: Iterable[Sequence[Message]], constraints: Sequence[Constraint], sample: Sample, *, seed: int
) -> Iterator[dict[str, Any]]:
    """Yield a row for each conversation; its instruction depends on the seed and its number alone."""
    for number, messages in enumerate(conversations):
        yield ghost_row(messages, draw_instruction(constraints, seed, number), sample)


def draw_instruction(constraints: Sequence[Constraint], seed: int, number: int) -> Instruction:
    """Draw the instruction of a conversation."""
    return combine_constraints(constraints, random.Random(f"{seed} {number}"))


def _questions(messages: Sequence[Message]) -> list[Message]:
    for message in messages:
        if message["role"] not in ("user", "assistant"):
            raise InputError(f"found a message of the role {message['role']!r}, expected user and assistant alone")
    questions = [{"role": "user", "content": message["content"]} for message in messages if message["role"] == "user"]
    if not questions:
        raise InputError("found no question, expected at least one message of the user")
    return questions


def _said_before(instruction: str, question: Message) -> Message:
    return question | {"content": f"{instruction}\n{question['content']}"}


def _constraint(entry: Any, where: str) -> Constraint:
    if not isinstance(entry, dict) or set(entry) != set(Constraint._fields):
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise InputError(f"{where}: found {found}, expected an object of the fields {', '.join(Constraint._fields)}")
    for field in ("name", "instruction", "short"):
        if not isinstance(entry[field], str) or (field != "name" and "{}" not in entry[field]):
            raise InputError(f"{where}.{field}: found {entry[field]!r}, expected a text with {{}} for the value")
    values = entry["values"]
    if not isinstance(values, list) or not values or not all(isinstance(value, str) and value for value in values):
        raise InputError(f"{where}.values: found {values!r}, expected a list of texts")
    return Constraint(entry["name"], entry["instruction"], entry["short"], tuple(values))
