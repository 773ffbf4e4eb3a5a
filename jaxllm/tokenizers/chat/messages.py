"""What a chat is made of: messages and tools as in OpenAI's API, read and checked before a format renders them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxllm.errors import InputError

ROLES = {
    "system": "system",
    "user": "user",
    "assistant": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role in a message -> role here."""

MESSAGE_KEYS = ("role", "content", "name", "tool_calls", "tool_call_id", "weight")

ALTERNATING: Mapping[str, tuple[str | None, ...]] = {
    "user": (None, "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant",),
}
"""Role -> roles that may come right before it, None for the start. Tool results follow a message with a tool call."""

FREE: Mapping[str, tuple[str | None, ...]] = {
    "user": (None, "user", "assistant", "tool"),
    "assistant": ("user", "assistant", "tool"),
    "tool": ("assistant",),
}


@dataclass(frozen=True)
class Rules:
    """What a chat format can express.

    Attributes:
      has_system: whether a system message may come first.
      order: role -> roles that may come right before it.
      tool_types: types of tools that can be described and called: "function" and a family's built-in ones.
      named_roles: roles whose messages may carry a name; results of tools always may.
    """

    has_system: bool = True
    order: Mapping[str, tuple[str | None, ...]] = field(default_factory=lambda: ALTERNATING)
    tool_types: tuple[str, ...] = ()
    named_roles: tuple[str, ...] = ()


@dataclass(frozen=True)
class ToolCall:
    """One call: of a function with arguments, or of a built-in tool with an input.

    Attributes:
      type: "function", or the type of a built-in tool, for instance "code_interpreter".
      name: name of the function; the type again for a built-in tool.
      arguments: arguments of a function by name; empty for a built-in tool.
      text: the arguments as JSON text, verbatim where the message holds text; the input of a built-in tool.
    """

    type: str
    name: str
    arguments: dict[str, Any]
    text: str


@dataclass(frozen=True)
class Message:
    """One checked message.

    Attributes:
      index: its place in the list that the user gave.
      weight: 0 for what the assistant says without being trained on it, else 1.
    """

    index: int
    role: str
    content: str
    name: str | None = None
    tool_call: ToolCall | None = None
    weight: int = 1

    @property
    def is_trained(self) -> bool:
        """Whether the model learns to say it: the assistant's, unless its weight is 0."""
        return self.role == "assistant" and self.weight == 1


@dataclass(frozen=True)
class Tools:
    """Checked definitions of tools, in the order given; false where there are none."""

    definitions: tuple[Mapping[str, Any], ...] = ()

    def __bool__(self) -> bool:
        return bool(self.definitions)

    @property
    def functions(self) -> list[Mapping[str, Any]]:
        """The definitions of functions: {"name", "description", "parameters", ...}."""
        return [tool["function"] for tool in self.definitions if tool["type"] == "function"]

    @property
    def builtin_types(self) -> list[str]:
        """The types of the built-in tools."""
        return [tool["type"] for tool in self.definitions if tool["type"] != "function"]


@dataclass(frozen=True)
class Conversation:
    """What a format renders.

    Attributes:
      system: text of the system message, None without one.
      turns: the other messages.
      tools: the tools that may be used.
      add_generation_prompt: whether the text ends where the assistant begins to speak.
      published_labels: whether what is trained follows the family's own training script.
    """

    system: str | None
    turns: tuple[Message, ...]
    tools: Tools
    add_generation_prompt: bool
    published_labels: bool


class ConversationReader:
    """Reads messages and tools for one chat format; every fault raises InputError with the place and the format."""

    def __init__(self, format_name: str, rules: Rules):
        self._format_name = format_name
        self._rules = rules

    def read(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None,
        *,
        add_generation_prompt: bool,
        published_labels: bool,
    ) -> Conversation:
        """Return the checked conversation."""
        if not messages:
            raise self.fault("messages", "found none, expected at least one")
        read = [self._message(index, message) for index, message in enumerate(messages)]
        system = read[0].content if read[0].role == "system" else None
        turns = read[1:] if system is not None else read
        if not turns:
            raise self.fault("messages", "found only a system message, expected the user's too")
        self._check_order(turns)
        if add_generation_prompt and read[-1].role == "assistant":
            raise self.fault(f"messages[{len(read) - 1}]", "found the assistant's, expected another's before its reply")
        return Conversation(system, tuple(turns), self.read_tools(tools), add_generation_prompt, published_labels)

    def read_tools(self, tools: Sequence[Mapping[str, Any]] | None) -> Tools:
        """Return the checked tools."""
        for index, tool in enumerate(tools or ()):
            where = f"tools[{index}]"
            if not isinstance(tool, Mapping) or not _is_json(tool):
                raise self.fault(where, f"found {tool!r}, expected a JSON object")
            self._check_tool_type(where, tool.get("type"))
            function = tool.get("function")
            if tool["type"] == "function" and not (isinstance(function, Mapping) and _is_name(function.get("name"))):
                raise self.fault(where, f'found {tool!r}, expected {{"type": "function", "function": {{"name": ...}}}}')
        return Tools(tuple(tools or ()))

    def fault(self, where: str, text: str) -> InputError:
        """Build the error."""
        return InputError(f"chat format {self._format_name}: {where}: {text}")

    def _message(self, index: int, message: Mapping[str, Any]) -> Message:
        where = f"messages[{index}]"
        if not isinstance(message, Mapping):
            raise self.fault(where, f"found {message!r}, expected an object with 'role' and 'content'")
        for key in message:
            if key not in MESSAGE_KEYS:
                raise self.fault(where, f"unknown key {key!r}; expected {', '.join(MESSAGE_KEYS)}")
        role = self._role(where, index, message.get("role"))
        tool_call = self._tool_call(where, role, message.get("tool_calls"))
        content = message.get("content")
        if content is None and tool_call is not None:
            content = ""
        if not isinstance(content, str):
            raise self.fault(where, f"content: found {content!r}, expected a string")
        name = message.get("name")
        if name is not None and role != "tool" and role not in self._rules.named_roles:
            raise self.fault(where, f"name: found {name!r}; the format has no place for the name of a {role}")
        return Message(index, role, content, name, tool_call, self._weight(where, role, message.get("weight")))

    def _weight(self, where: str, role: str, found: Any) -> int:
        if found is None:
            return 1
        if role != "assistant":
            raise self.fault(where, f"weight: found in the {role}'s message, expected in the assistant's only")
        if isinstance(found, bool) or found not in (0, 1):
            raise self.fault(where, f"weight: found {found!r}, expected 0 or 1")
        return int(found)

    def _role(self, where: str, index: int, found: Any) -> str:
        if not isinstance(found, str) or found not in ROLES:
            raise self.fault(where, f"role: found {found!r}, expected one of {', '.join(ROLES)}")
        role = ROLES[found]
        if role == "system" and not self._rules.has_system:
            raise self.fault(where, "found a system message; the format has none")
        if role == "system" and index > 0:
            raise self.fault(where, "found a system message, which must come first")
        if role == "tool" and not self._rules.tool_types:
            raise self.fault(where, "found the result of a tool; the format has no tools")
        return role

    def _check_order(self, turns: Sequence[Message]) -> None:
        before: Message | None = None
        for turn in turns:
            allowed = self._rules.order[turn.role]
            if (before.role if before else None) not in allowed:
                found = f"the {turn.role}'s after {f'the {before.role}' if before else 'none'}"
                expected = " or ".join(f"the {role}" if role else "none" for role in allowed)
                raise self.fault(f"messages[{turn.index}]", f"found {found}, expected it after {expected}")
            if turn.role == "tool" and before.tool_call is None:
                raise self.fault(
                    f"messages[{turn.index}]", "found the result of a tool after a message that calls none"
                )
            before = turn

    def _tool_call(self, where: str, role: str, calls: Any) -> ToolCall | None:
        if not calls:
            return None
        if role != "assistant":
            raise self.fault(where, f"tool_calls: found in the {role}'s message, expected in the assistant's only")
        if not isinstance(calls, Sequence) or len(calls) != 1 or not isinstance(calls[0], Mapping):
            raise self.fault(where, f"tool_calls: found {calls!r}, expected a list of one call: the format has no more")
        call = calls[0]
        kind = call.get("type", "function")
        self._check_tool_type(f"{where}.tool_calls[0]", kind)
        body = call.get(kind)
        if kind == "function":
            return self._function_call(where, body)
        if not isinstance(body, Mapping) or not isinstance(body.get("input"), str):
            raise self.fault(
                where, f'tool_calls[0]: found {call!r}, expected {{"type": {kind!r}, {kind!r}: {{"input"}}}}'
            )
        return ToolCall(kind, kind, {}, body["input"])

    def _function_call(self, where: str, function: Any) -> ToolCall:
        if not isinstance(function, Mapping) or not _is_name(function.get("name")):
            raise self.fault(where, f"tool_calls[0].function: found {function!r}, expected 'name' and 'arguments'")
        found = function.get("arguments")
        arguments = parse_object(found) if isinstance(found, str) else found
        if not isinstance(arguments, dict) or not _is_json(arguments):
            raise self.fault(where, f"tool_calls[0].function.arguments: found {found!r}, expected a JSON object")
        return ToolCall("function", function["name"], arguments, found if isinstance(found, str) else to_json(found))

    def _check_tool_type(self, where: str, found: Any) -> None:
        if not self._rules.tool_types:
            raise self.fault(where, "found a tool; the format has no tools")
        if found not in self._rules.tool_types:
            raise self.fault(where, f"type: found {found!r}, expected one of {', '.join(self._rules.tool_types)}")


def function_call_message(content: str, name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Build the message of an assistant that calls a function."""
    call = {"type": "function", "function": {"name": name, "arguments": to_json(arguments)}}
    return {"role": "assistant", "content": content, "tool_calls": [call]}


def builtin_call_message(content: str, kind: str, text: str) -> dict[str, Any]:
    """Build the message of an assistant that uses a built-in tool."""
    return {"role": "assistant", "content": content, "tool_calls": [{"type": kind, kind: {"input": text}}]}


def plain_message(content: str) -> dict[str, Any]:
    """Build the message of an assistant that says something."""
    return {"role": "assistant", "content": content}


def to_json(value: Any, *, indent: int | None = None) -> str:
    """Return JSON text with other letters than ASCII as they are, as all families write tools and arguments.

    Raises ValueError or TypeError for what JSON cannot hold, infinities among it.
    """
    return json.dumps(value, ensure_ascii=False, indent=indent, allow_nan=False)


def parse_object(text: str) -> dict[str, Any] | None:
    """Return the JSON object that a text holds, None where it holds none."""
    try:
        value = json.loads(text)
        to_json(value)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def fence(code: str) -> str:
    """Return Python code as the block in which ChatGLM3 and InternLM2 write it."""
    return f"```python\n{code}\n```"


def unfence(text: str) -> str | None:
    """Return the code of such a block, None where the text is none."""
    text = text.strip()
    if text.startswith("```python\n") and text.endswith("\n```") and len(text) >= len("```python\n\n```"):
        return text.removeprefix("```python\n").removesuffix("\n```")
    return None


def _is_json(value: Any) -> bool:
    try:
        to_json(value)
    except (TypeError, ValueError, RecursionError):
        return False
    return True


def _is_name(found: Any) -> bool:
    return isinstance(found, str) and bool(found)
