"""Qwen's ReAct prompting: tools described in the user's question, calls and results inside the assistant's turn.

The prompt is that of examples/react_prompt.md in Qwen's repository; how messages become one turn, and what is stripped,
is that of openai_api.py there. (openai_api.py itself words the prompt a little differently: "APIs" for "tools".)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Segment, Special, Text
from jaxllm.tokenizers.chat.chatml import (
    IM_END,
    QWEN_SAMPLING,
    QWEN_STOPS,
    QWEN_SYSTEM,
    QWEN_WINDOW,
    qwen_head,
    qwen_turn,
)
from jaxllm.tokenizers.chat.messages import (
    Conversation,
    Message,
    Rules,
    Tools,
    function_call_message,
    parse_object,
    plain_message,
    to_json,
)

BEFORE_TOOLS = "Answer the following questions as best you can. You have access to the following tools:\n\n"
BEFORE_NAMES = """

Use the following format:

Question: the input question you must answer
Thought: you should always think about what to do
Action: the action to take, should be one of ["""
BEFORE_QUESTION = """]
Action Input: the input to the action
Observation: the result of the action
... (this Thought/Action/Action Input/Observation can be repeated zero or more times)
Thought: I now know the final answer
Final Answer: the final answer to the original input question

Begin!

Question: """
FINAL = "Thought: I now know the final answer.\nFinal Answer: "
OBSERVATION = "\nObservation:"


def _render(conversation: Conversation) -> Iterator[Segment]:
    turns = conversation.turns
    uses_tools = bool(conversation.tools.functions) or any(turn.tool_call for turn in turns)
    last_question = max((turn.index for turn in turns if turn.role == "user"), default=None)
    yield from qwen_turn("system", QWEN_SYSTEM if conversation.system is None else _tidy(conversation.system))
    for k, turn in enumerate(turns):
        if turn.role == "user":
            describes = bool(conversation.tools.functions) and turn.index == last_question
            prompt = _describe(conversation.tools.functions) if describes else ""
            yield from qwen_turn("user", (prompt + _tidy(turn.content)).rstrip())
        elif turn.role == "assistant":
            yield from _assistant(turn, uses_tools, goes_on=k > 0 and turns[k - 1].role == "tool")
        else:
            yield Text(f" {_tidy(turn.content)}".rstrip(), joined=True)
    if conversation.add_generation_prompt and turns[-1].role == "tool":
        yield Text("\nThought:", joined=True)
    elif conversation.add_generation_prompt:
        yield from qwen_head("assistant")


def _assistant(turn: Message, uses_tools: bool, *, goes_on: bool) -> Iterator[Segment]:
    """Yield what the assistant says up to its final answer or to the result of its call."""
    text = _spoken(turn, uses_tools)
    if goes_on:
        yield Text("\nThought:", joined=True)
        text = text.removeprefix("Thought:")
    else:
        yield from qwen_head("assistant")
    if turn.tool_call:
        yield Text(text + OBSERVATION, trained=turn.is_trained, joined=goes_on)
        return
    yield Text(text, trained=turn.is_trained, joined=goes_on)
    yield Special(IM_END, trained=turn.is_trained)
    yield Text("\n")


def _spoken(turn: Message, uses_tools: bool) -> str:
    content = _tidy(turn.content)
    if not turn.tool_call:
        return (FINAL + content).rstrip() if uses_tools else content
    thought = content if content.startswith("Thought:") else f"Thought: {content}"
    return f"{thought}\nAction: {turn.tool_call.name}\nAction Input: {turn.tool_call.text}"


def _describe(functions: Sequence[Mapping[str, Any]]) -> str:
    """Return the prompt up to the question."""
    tools = "\n\n".join(map(_describe_tool, functions))
    return BEFORE_TOOLS + tools + BEFORE_NAMES + ",".join(tool["name"] for tool in functions) + BEFORE_QUESTION


def _describe_tool(function: Mapping[str, Any]) -> str:
    human = function.get("name_for_human") or function["name"]
    return (
        f"{function['name']}: Call this tool to interact with the {human} API. What is the {human} API useful for? "
        f"{function.get('description') or ''} Parameters: {to_json(function.get('parameters') or {})} "
        "Format the arguments as a JSON object."
    )


def _tidy(text: str) -> str:
    """Strip as the training data were stripped (react_demo.py)."""
    return text.lstrip("\n").rstrip()


def _parse(text: str, tools: Tools) -> dict[str, Any]:
    if not tools.functions:
        return plain_message(text)
    text = text.removesuffix("\n")
    before, action, rest = text.rpartition("\nAction:")
    name, action_input, arguments = rest.partition("\nAction Input:")
    found = parse_object(arguments)
    if action and action_input and name.strip() and found is not None:
        thought = before.strip().removeprefix("Thought:").strip()
        return function_call_message(thought, name.strip(), found)
    _, final, answer = f"\n{text}".rpartition("\nFinal Answer:")
    return plain_message(answer.removeprefix(" ") if final else text)


_TEMPLATE = jinja.compact(
    jinja.split_system(QWEN_SYSTEM)
    + r"""
{%- set ns = namespace(uses=false, last=-1, open=false, tools='', names='', thought='') -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}
{%- if message['tool_calls'] -%}{%- set ns.uses = true -%}{%- endif -%}
{%- endfor -%}
{%- for tool in tools or [] -%}
{%- set f = tool['function'] -%}
{%- set human = f['name_for_human'] or f['name'] -%}
{%- set ns.uses = true -%}
{%- set ns.tools = ns.tools ~ ('' if loop.first else '\n\n') ~ f['name'] ~ ': Call this tool to interact with the '
 ~ human ~ ' API. What is the ' ~ human ~ ' API useful for? ' ~ (f['description'] or '') ~ ' Parameters: '
 ~ ((f['parameters'] or {}) | tojson) ~ ' Format the arguments as a JSON object.' -%}
{%- set ns.names = ns.names ~ ('' if loop.first else ',') ~ f['name'] -%}
{%- endfor -%}
{{- '<|im_start|>system\n' ~ system.lstrip('\n').rstrip() ~ '<|im_end|>\n' -}}
{%- for message in turns -%}
{%- set content = (message['content'] or '').lstrip('\n').rstrip() -%}
{%- if message['role'] == 'user' -%}
{%- if tools and loop.index0 == ns.last -%}
{%- set content = ("""
    + f"{jinja.quote(BEFORE_TOOLS)} ~ ns.tools ~ {jinja.quote(BEFORE_NAMES)} ~ ns.names ~ "
    + f"{jinja.quote(BEFORE_QUESTION)} ~ content).rstrip() -%}}"
    + r"""
{%- endif -%}
{{- '<|im_start|>user\n' ~ content ~ '<|im_end|>\n' -}}
{%- elif message['role'] in """
    + jinja.TOOL_ROLES
    + r""" -%}
{{- (' ' ~ content).rstrip() -}}
{%- if loop.last and add_generation_prompt -%}{{- '\nThought:' -}}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{{- '\n' if ns.open else '<|im_start|>assistant\n' -}}
{%- if message['tool_calls'] -%}
{%- set call = message['tool_calls'][0] -%}"""
    + jinja.ARGUMENTS
    + r"""
{{- ('' if content.startswith('Thought:') else 'Thought: ') ~ content ~ '\nAction: ' ~ call['function']['name'] -}}
{{- '\nAction Input: ' ~ arguments ~ '\nObservation:' -}}
{%- set ns.open = true -%}
{%- else -%}
{{- ("""
    + jinja.quote(FINAL)
    + r""" ~ content).rstrip() if ns.uses else content -}}{{- '<|im_end|>\n' -}}
{%- set ns.open = false -%}
{%- endif -%}
{%- else -%}"""
    + jinja.refuse_role("react-qwen")
    + r"""{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and not ns.open -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)

REACT_QWEN = ChatFormat(
    name="react-qwen",
    rules=Rules(tool_types=("function",)),
    render=_render,
    parse_reply=_parse,
    template=_TEMPLATE,
    stop_tokens=QWEN_STOPS,
    stop_strings=("Observation:",),
    sampling=QWEN_SAMPLING,
    history_window=QWEN_WINDOW,
)
