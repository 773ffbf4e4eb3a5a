"""Fields of rows, read and checked; what is wrong raises InputError that names the field."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from jaxllm.data.sources import kind_of
from jaxllm.errors import InputError
from jaxllm.tokenizers.chat.messages import ROLES

Message = dict[str, Any]


def said_field(row: Mapping[str, Any], name: str, role: str) -> list[Message]:
    """Return a field that is a text, said by `role`, or messages."""
    if isinstance(row.get(name), str):
        return [{"role": role, "content": text_field(row, name)}]
    if not isinstance(row.get(name), list):
        raise InputError(f"{name}: found {kind_of(row.get(name))}, expected a text or a list of messages")
    return messages_field(row, name)


def messages_field(row: Mapping[str, Any], name: str) -> list[Message]:
    """Return a field of messages, at least one."""
    return checked_messages(list_field(row, name), name)


def checked_messages(messages: list[Any], name: str) -> list[Message]:
    """Return messages of known roles with texts, the assistant's not empty; what a chat format asks is not checked."""
    return [_message(message, f"{name}[{k}]") for k, message in enumerate(messages)]


def _message(message: Any, where: str) -> Message:
    """Return a message without its empty fields, which parquet has for those of other messages."""
    if not isinstance(message, Mapping):
        raise InputError(f"{where}: found {kind_of(message)}, expected an object with 'role' and 'content'")
    message = {key: value for key, value in message.items() if value is not None}
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InputError(f"{where}: role: found {role!r}, expected one of {', '.join(ROLES)}")
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, Mapping) for call in calls)):
        raise InputError(f"{where}: tool_calls: found {calls!r}, expected a list of objects")
    content = message.get("content", "" if calls else None)
    if not isinstance(content, str):
        raise InputError(f"{where}: content: found {kind_of(content)}, expected a string")
    if role == "assistant" and not calls and not content.strip():
        raise InputError(
            f"{where}: the assistant's message is {'blank' if content else 'empty'}, expected text or a call"
        )
    return message


def tools_field(row: Mapping[str, Any]) -> list[Mapping[str, Any]] | None:
    """Return definitions of tools; they may be JSON text, and functions that are not wrapped."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        tools = parsed_json(tools, "tools")
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise InputError(f"tools: found {kind_of(tools)}, expected a list of objects")
    return [tool if "type" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools]


def list_field(row: Mapping[str, Any], name: str) -> list[Any]:
    """Return a field that is a list and not empty."""
    found = row.get(name)
    if not isinstance(found, list) or not found:
        raise InputError(f"{name}: found {'an empty list' if found == [] else kind_of(found)}, expected a list")
    return found


def text_field(row: Mapping[str, Any], name: str) -> str:
    """Return a field that is a text and not blank."""
    found = row.get(name)
    if not isinstance(found, str):
        raise InputError(f"{name}: found {kind_of(found)}, expected a string")
    if not found.strip():
        raise InputError(f"{name}: found {'blanks' if found else 'an empty string'}, expected text")
    return found


def optional_text_field(row: Mapping[str, Any], name: str) -> str | None:
    """Return a field that may be a text; None where it is missing, null or empty."""
    found = row.get(name)
    if found is not None and not isinstance(found, str):
        raise InputError(f"{name}: found {kind_of(found)}, expected a string")
    return found or None


def parsed_json(text: str, where: str) -> Any:
    """Return the value that a JSON text holds."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: found text that is no JSON ({error})") from error
