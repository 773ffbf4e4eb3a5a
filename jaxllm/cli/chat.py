"""`jaxllm chat`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.arguments import utf8
from jaxllm.cli.shared import add_sampling
from jaxllm.errors import EXIT_OK, InputError

if TYPE_CHECKING:
    from jaxllm.language_model import LanguageModel

Message = dict[str, Any]
_NEW = "/new"


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verb to the parser."""
    parser = verbs.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a chat model, a line at a time. "
        f"{_NEW} begins a new conversation, the end of the input ends it. Sampling defaults to the family's own.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="a published folder, a .gguf file or a run folder")
    parser.add_argument("--message", type=utf8, action="append", metavar="TEXT", help="say this; may be repeated")
    parser.add_argument("--system", type=utf8, metavar="TEXT", help="system message")
    parser.add_argument("--tools", metavar="FILE", help="JSON list of tool definitions, as in OpenAI's API")
    parser.add_argument("--chat-format", metavar="NAME", help="default: that of the checkpoint's family")
    add_sampling(parser)
    parser.add_argument("--dtype", default="float32", metavar="D", help="float32, bfloat16 or float16")
    parser.set_defaults(run=_chat)


def _chat(arguments: argparse.Namespace) -> int:
    tools = None if arguments.tools is None else _read_tools(Path(arguments.tools))
    from jaxllm.environment import enable_compilation_cache, require_devices

    require_devices()
    enable_compilation_cache()
    from jaxllm.pretrained import load

    model = load(arguments.checkpoint, dtype=arguments.dtype)
    names = ("chat_format", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "seed")
    options = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    opening = [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
    talk(model, _said(arguments.message), opening, tools, options)
    return EXIT_OK


def talk(
    model: LanguageModel,
    said: Iterator[str],
    opening: list[Message],
    tools: list[dict[str, Any]] | None,
    options: dict[str, Any],
) -> None:
    """Print a reply to each thing said; after a tool call the next thing said is the tool's result."""
    messages = list(opening)
    for text in said:
        if text == _NEW:
            messages = list(opening)
            continue
        if not text.strip():
            continue
        waiting = messages[-1].get("tool_calls") if messages else None
        role = "tool" if waiting else "user"
        messages.append({"role": role, "content": text})
        messages.append(_reply(model, messages, tools, options))


def _reply(
    model: LanguageModel, messages: list[Message], tools: list[dict[str, Any]] | None, options: dict[str, Any]
) -> Message:
    pieces = []
    for piece in model.stream_chat(messages, tools, **options):
        print(piece, end="", flush=True)
        pieces.append(piece)
    print()
    return model.chat_format(options.get("chat_format")).parse("".join(pieces), tools)


def _said(messages: list[str] | None) -> Iterator[str]:
    """Yield what the user says: the given messages, or else the lines of standard input."""
    if messages is not None:
        for message in messages:
            print(f">>> {message}")
            yield message
        return
    while True:
        if sys.stdin.isatty():
            print(">>> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        yield line.removesuffix("\n")


def _read_tools(path: Path) -> list[dict[str, Any]]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot read the tools: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise InputError(f"{path}: expected a JSON list of objects")
    return tools
