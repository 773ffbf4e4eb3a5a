"""Rows of example files: of which kind they are, and the conversations, pairs and prompts that they hold.

What is wrong with a row raises InputError without its place, which the caller knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal, NamedTuple

from jaxllm.data.row_fields import (
    Message,
    checked_messages,
    list_field,
    messages_field,
    optional_text_field,
    parsed_json,
    said_field,
    text_field,
    tools_field,
)
from jaxllm.data.sources import kind_of
from jaxllm.errors import InputError
from jaxllm.tokenizers.chat.messages import ROLES

Purpose = Literal["sft", "preference", "prompt"]

STAGE_PURPOSES: Mapping[str, Purpose] = {
    "sft": "sft",
    "reward": "preference",
    "dpo": "preference",
    "ppo": "prompt",
    "grpo": "prompt",
}
"""Stage of a run -> what its rows are for."""

PURPOSE_KINDS: Mapping[Purpose, tuple[str, ...]] = {
    "sft": ("messages", "sharegpt", "alpaca", "prompt_response", "text"),
    "preference": ("preference",),
    "prompt": ("prompt",),
}
"""What rows are for -> their kinds."""

MARGIN_LABELS = ("significantly", "better", "slightly", "negligible")
"""How much better an answer is, most first (Llama 2, arXiv:2307.09288 table 27)."""

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
_FIELDS = """messages (messages), conversations (sharegpt), instruction and output (alpaca), prompt and response or \
completion (prompt_response), chosen and rejected (preference), prompt (prompt)"""


class Text(NamedTuple):
    """A text of which every token is trained."""

    text: str


class Dialogue(NamedTuple):
    """A conversation in which the assistant's messages are trained; messages and tools as in OpenAI's API."""

    messages: list[Message]
    tools: list[Mapping[str, Any]] | None = None


class Pair(NamedTuple):
    """Two answers to a prompt; `margin` says how much better the chosen one is: a number, a label or nothing."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | str | None = None
    tools: list[Mapping[str, Any]] | None = None


class Prompt(NamedTuple):
    """What is to be answered, what a reward may compare the answer with, and the whole row that it came from."""

    messages: list[Message]
    reference: Any
    row: dict[str, Any]
    tools: list[Mapping[str, Any]] | None = None


Example = Text | Dialogue | Pair | Prompt


def detect_kind(row: Mapping[str, Any], purpose: Purpose | None = None, *, text_key: str = "text") -> str:
    """Tell the kind of a row from its fields; raises InputError where no kind has them.

    Args:
      purpose: what the row is for, which decides whether messages are a prompt; None: they are if they lack a reply.
    """
    kind = _kind_by_fields(row, purpose, text_key)
    if kind is None:
        found = ", ".join(map(repr, list(row)[:8])) or "none"
        raise InputError(f"cannot tell what the row is: found the fields {found}; expected {_FIELDS} or {text_key}")
    return kind


def purpose_of(kind: str) -> Purpose:
    """Return what rows of a kind are for."""
    return next(purpose for purpose, kinds in PURPOSE_KINDS.items() if kind in kinds)


def check_purpose(kind: str, purpose: Purpose | None) -> None:
    """Raise InputError for rows of a kind that is of no use here."""
    if purpose is not None and kind not in PURPOSE_KINDS[purpose]:
        stages = " or ".join(stage for stage, wanted in STAGE_PURPOSES.items() if wanted == purpose)
        raise InputError(f"found a {kind} row; stage {stages} takes {' or '.join(PURPOSE_KINDS[purpose])} rows")


def read_row(row: Mapping[str, Any], kind: str, *, text_key: str = "text", system: str | None = None) -> Example:
    """Return what a row of a known kind holds.

    Args:
      system: system message of conversations that have none.

    Raises:
      InputError: names the field, what was found and what was expected.
    """
    if kind == "text":
        return Text(text_field(row, text_key))
    system = optional_text_field(row, "system") or system
    return _READERS[kind](row, system)


def _kind_by_fields(row: Mapping[str, Any], purpose: Purpose | None, text_key: str) -> str | None:
    def has(*names: str) -> bool:
        return all(row.get(name) is not None for name in names)

    if has("chosen", "rejected"):
        return "preference"
    if has("conversations"):
        return "sharegpt"
    if has("messages"):
        wants_reply = purpose is None and not _ends_with_reply(row["messages"])
        return "prompt" if purpose == "prompt" or wants_reply else "messages"
    if has("instruction", "output"):
        return "alpaca"
    if has("prompt") and purpose != "prompt" and (has("response") or has("completion")):
        return "prompt_response"
    if has("prompt"):
        return "prompt"
    return "text" if has(text_key) else None


def _ends_with_reply(messages: Any) -> bool:
    last = messages[-1] if isinstance(messages, list) and messages else None
    return not isinstance(last, Mapping) or last.get("role") == "assistant"


def _read_messages(row: Mapping[str, Any], system: str | None) -> Dialogue:
    messages = _with_system(messages_field(row, "messages"), system)
    return _trainable(Dialogue(messages, tools_field(row)), "messages")


def _read_sharegpt(row: Mapping[str, Any], system: str | None) -> Dialogue:
    turns = list_field(row, "conversations")
    messages = [_sharegpt_message(turn, f"conversations[{k}]") for k, turn in enumerate(turns)]
    messages = _with_system(checked_messages(messages, "conversations"), system)
    return _trainable(Dialogue(messages, tools_field(row)), "conversations")


def _read_alpaca(row: Mapping[str, Any], system: str | None) -> Dialogue:
    messages = []
    for k, turn in enumerate(list_field(row, "history") if row.get("history") else []):
        if not isinstance(turn, list) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise InputError(f"history[{k}]: found {turn!r}, expected a question and an answer")
        messages += _question_and_answer(*turn)
    question = "\n".join(filter(None, (optional_text_field(row, "instruction"), optional_text_field(row, "input"))))
    if not question.strip():
        raise InputError("instruction: found no text, and none in input")
    messages += _question_and_answer(question, text_field(row, "output"))
    return _trainable(Dialogue(_with_system(checked_messages(messages, "history"), system), tools_field(row)), "output")


def _read_prompt_response(row: Mapping[str, Any], system: str | None) -> Dialogue:
    name = "response" if row.get("response") is not None else "completion"
    # Of a prompt of several messages the replies are context.
    messages = [*without_weight(said_field(row, "prompt", "user")), *said_field(row, name, "assistant")]
    return _trainable(Dialogue(_with_system(messages, system), tools_field(row)), name)


def _read_preference(row: Mapping[str, Any], system: str | None) -> Pair:
    given = said_field(row, "prompt", "user") if row.get("prompt") is not None else None
    (prompt, chosen), (other_prompt, rejected) = (_answer(row, name, given) for name in ("chosen", "rejected"))
    if prompt != other_prompt:
        raise InputError("chosen and rejected: found answers to different prompts, expected the same messages before")
    if chosen == rejected:
        raise InputError("chosen and rejected: found the same answer twice, expected two that differ")
    return Pair(_with_system(prompt, system), chosen, rejected, _margin(row), tools_field(row))


def _read_prompt(row: Mapping[str, Any], system: str | None) -> Prompt:
    messages = messages_field(row, "messages") if row.get("messages") is not None else said_field(row, "prompt", "user")
    if ROLES[messages[-1]["role"]] not in ("user", "tool"):
        found = messages[-1]["role"]
        raise InputError(f"the prompt ends with the {found}'s message, expected the user's or the result of a tool")
    reference = row["reference"] if row.get("reference") is not None else row.get("answer")
    return Prompt(_with_system(messages, system), reference, dict(row), tools_field(row))


_READERS: Mapping[str, Callable[[Mapping[str, Any], str | None], Example]] = {
    "messages": _read_messages,
    "sharegpt": _read_sharegpt,
    "alpaca": _read_alpaca,
    "prompt_response": _read_prompt_response,
    "preference": _read_preference,
    "prompt": _read_prompt,
}


def without_weight(messages: Collection[Message]) -> list[Message]:
    """Return messages whose replies are not trained."""
    return [message | {"weight": 0} if message["role"] == "assistant" else message for message in messages]


def is_trained(message: Message) -> bool:
    """Whether a message is the assistant's and not of weight 0."""
    return message["role"] == "assistant" and message.get("weight", 1) != 0


def _answer(row: Mapping[str, Any], name: str, given: list[Message] | None) -> tuple[list[Message], list[Message]]:
    """Return (prompt, answer) of one side of a preference row; messages may repeat the prompt or be its only place."""
    found = said_field(row, name, "assistant")
    if not is_trained(found[-1]):
        role = found[-1]["role"]
        raise InputError(f"{name}: found the {role}'s message at its end, expected the assistant's, not of weight 0")
    if found[0]["role"] == "assistant":
        if given is None:
            raise InputError(
                f"{name}: found an answer alone, expected the field 'prompt' or messages that begin with it"
            )
        return given, found
    prompt, answer = found[:-1], found[-1:]
    if given is not None and given != prompt and given != prompt[-1:]:
        raise InputError(f"prompt and {name}: found different prompts, expected the same")
    return prompt, answer


def _sharegpt_message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        raise InputError(f"{where}: found {kind_of(turn)}, expected an object with 'from' and 'value'")
    role, value = turn.get("from"), turn.get("value")
    if not isinstance(role, str) or role not in _SHAREGPT_ROLES:
        raise InputError(f"{where}: from: found {role!r}, expected one of {', '.join(_SHAREGPT_ROLES)}")
    if not isinstance(value, str):
        raise InputError(f"{where}: value: found {kind_of(value)}, expected a string")
    weight = {} if turn.get("weight") is None else {"weight": turn["weight"]}
    if role != "function_call":
        return {"role": _SHAREGPT_ROLES[role], "content": value} | weight
    call = parsed_json(value, f"{where}: value")
    if not isinstance(call, Mapping) or "name" not in call or "arguments" not in call:
        raise InputError(f"{where}: value: found {value!r}, expected a call: an object with 'name' and 'arguments'")
    function = {"name": call["name"], "arguments": call["arguments"]}
    return {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]} | weight


def _question_and_answer(question: str, answer: str) -> list[Message]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _with_system(messages: list[Message], system: str | None) -> list[Message]:
    if system is None or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _trainable(dialogue: Dialogue, where: str) -> Dialogue:
    if not any(map(is_trained, dialogue.messages)):
        raise InputError(f"{where}: found no message of the assistant to train on, expected one (not of weight 0)")
    return dialogue


def _margin(row: Mapping[str, Any]) -> float | str | None:
    margin = row.get("margin")
    if isinstance(margin, str) and margin in MARGIN_LABELS:
        return margin
    is_number = isinstance(margin, int | float) and not isinstance(margin, bool) and math.isfinite(margin)
    if margin is not None and not is_number:
        raise InputError(f"margin: found {margin!r}, expected a number or one of {', '.join(MARGIN_LABELS)}")
    return None if margin is None else float(margin)
