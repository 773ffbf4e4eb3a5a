"""ChatGLM3: tools as a JSON list in the system message, calls as Python, a code interpreter (PROMPT.md)."""

from __future__ import annotations

import ast
import keyword
from collections.abc import Iterator
from typing import Any

from jaxllm.errors import InputError
from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Sampling, Segment, Special
from jaxllm.tokenizers.chat.glm_roles import Block, render_blocks, split_reply, turn_blocks, turns_template
from jaxllm.tokenizers.chat.messages import (
    Conversation,
    Message,
    Rules,
    Tools,
    builtin_call_message,
    fence,
    function_call_message,
    to_json,
    unfence,
)

TOOLS_SYSTEM = "Answer the following questions as best as you can. You have access to the following tools:"
INTERPRETER_SYSTEM = (
    "你是一位智能AI助手，你叫ChatGLM3，你连接着一台电脑，但请注意不能联网。在使用Python解决任务时，你可以运行代码并得到结果，"
    "如果运行结果有错误，你需要尽可能对代码进行改进。你可以处理用户上传到电脑上的文件，文件默认存储路径是/mnt/data/。"
)
"""System messages of ChatGLM3's PROMPT.md, used where tools are given and no system message."""

INTERPRETER = "interpreter"
"""The metadata of a message to the code interpreter."""


def _render(conversation: Conversation) -> Iterator[Segment]:
    return render_blocks(
        ("[gMASK]", "sop"), _blocks(conversation), conversation, end="</s>", published_roles=("assistant", "tool")
    )


def _blocks(conversation: Conversation) -> Iterator[Block]:
    system, functions = conversation.system, conversation.tools.functions
    if system is None and conversation.tools:
        system = TOOLS_SYSTEM if functions else INTERPRETER_SYSTEM
    if functions:
        system += f"\n{to_json(functions, indent=4)}"
    if system is not None:
        yield Block("system", system)
    yield from turn_blocks(conversation.turns, _call_block)


def _call_block(turn: Message) -> Block:
    """Return `tool_call(name=value, ...)`, the form in which ChatGLM3 calls a function, or the interpreter's code."""
    call = turn.tool_call
    if call.type != "function":
        return Block("assistant", fence(call.text), INTERPRETER, turn.weight)
    for name in call.arguments:
        if not name.isidentifier() or keyword.iskeyword(name):
            where = f"chat format chatglm3: messages[{turn.index}]: tool_calls[0].function.arguments"
            raise InputError(f"{where}: found the name {name!r}, expected names that Python allows")
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return Block("assistant", fence(f"tool_call({arguments})"), call.name, turn.weight)


def _parse(text: str, tools: Tools) -> dict[str, Any]:
    reply = split_reply(text)
    code = unfence(reply.body)
    if code is None or not reply.metadata:
        return reply.as_answer()
    arguments = _python_arguments(code)
    if tools.functions and arguments is not None:
        return function_call_message(reply.content, reply.metadata, arguments)
    if tools.builtin_types and reply.metadata == INTERPRETER:
        return builtin_call_message(reply.content, "code_interpreter", code)
    return reply.as_answer()


def _python_arguments(code: str) -> dict[str, Any] | None:
    """Return the arguments of `tool_call(name=literal, ...)`, None for any other code; nothing is executed."""
    try:
        call = ast.parse(code.strip(), mode="eval").body
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.func.id != "tool_call":
            return None
        if call.args or any(argument.arg is None for argument in call.keywords):
            return None
        arguments = {argument.arg: ast.literal_eval(argument.value) for argument in call.keywords}
        to_json(arguments)  # what Python can say and JSON cannot is no call
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None
    return arguments


_CALL = r"""
{%- if call['type'] == 'code_interpreter' -%}
{{- '<|assistant|>interpreter\n```python\n' ~ call['code_interpreter']['input'] ~ '\n```' -}}
{%- else -%}
{%- set arguments = call['function']['arguments'] -%}
{%- if arguments is string -%}
{{- raise_exception('the chat format chatglm3 needs the arguments of a call as an object, not as text') -}}
{%- endif -%}
{{- '<|assistant|>' ~ call['function']['name'] ~ '\n```python\ntool_call(' -}}
{%- for name, value in arguments.items() -%}
{{- ('' if loop.first else ', ') ~ name ~ '=' ~ ('%r' | format(value)) -}}
{%- endfor -%}
{{- ')\n```' -}}
{%- endif -%}
"""

_TEMPLATE = jinja.compact(
    jinja.split_system(None)
    + r"""
{%- set ns = namespace(functions=[]) -%}
{%- for tool in tools or [] -%}
{%- if tool['type'] == 'function' -%}{%- set ns.functions = ns.functions + [tool['function']] -%}{%- endif -%}
{%- endfor -%}
{%- if system is none and ns.functions -%}{%- set system = """
    + jinja.quote(TOOLS_SYSTEM)
    + r""" -%}
{%- elif system is none and tools -%}{%- set system = """
    + jinja.quote(INTERPRETER_SYSTEM)
    + r""" -%}{%- endif -%}
{%- if ns.functions -%}{%- set system = system ~ '\n' ~ (ns.functions | tojson(indent=4)) -%}{%- endif -%}
{{- '[gMASK]sop' -}}
{%- if system is not none -%}{{- '<|system|>\n' ~ system -}}{%- endif -%}
"""
    + turns_template("chatglm3", _CALL, "</s>")
)

CHATGLM3 = ChatFormat(
    name="chatglm3",
    # PROMPT.md: no two messages of the user in a row; the assistant speaks after the user or a result, or goes on.
    rules=Rules(
        order={"user": (None, "assistant"), "assistant": ("user", "assistant", "tool"), "tool": ("assistant",)},
        tool_types=("function", "code_interpreter"),
    ),
    render=_render,
    parse_reply=_parse,
    template=_TEMPLATE,
    stop_tokens=(Special("</s>"), Special("<|user|>"), Special("<|observation|>")),
    sampling=Sampling(temperature=0.8, top_p=0.8, max_length=8192),
    has_published_labels=True,
)
