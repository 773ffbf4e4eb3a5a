"""ChatML: `<|im_start|>role\\ncontent<|im_end|>\\n`, as Qwen, InternLM2 and SmolLM2 write it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Sampling, Segment, Special, Text
from jaxllm.tokenizers.chat.messages import (
    FREE,
    Conversation,
    Message,
    Rules,
    Tools,
    builtin_call_message,
    fence,
    function_call_message,
    parse_object,
    plain_message,
    to_json,
    unfence,
)

IM_START, IM_END = "<|im_start|>", "<|im_end|>"

QWEN_SYSTEM = "You are a helpful assistant."
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
"""From tokenizer.chat_template of SmolLM2-135M-Instruct's GGUF file."""
INTERNLM2_SYSTEM = (
    "You are an AI assistant whose name is InternLM (书生·浦语).\n"
    "- InternLM (书生·浦语) is a conversational language model that is developed by Shanghai AI Laboratory "
    "(上海人工智能实验室). It is designed to be helpful, honest, and harmless.\n"
    "- InternLM (书生·浦语) can understand and communicate fluently in the language chosen by the user such as "
    "English and 中文."
)
"""The default meta_instruction of chat() in modeling_internlm2.py."""
INTERPRETER_SYSTEM = (
    "You now have access to a Jupyter notebook environment supporting Python code execution. Just send code to python "
    "to run in this stateful environment. This feature is suitable for:\n"
    "- Data analysis or processing (such as data manipulation and graphic creation)\n"
    "- Complex calculations (such as math and physics problems)\n"
    "- Programming examples (for understanding programming concepts or language features)\n"
    "- Text processing and analysis (including text analysis and natural language processing)\n"
    "- Machine learning and data science (model training and data visualization)\n"
    "- File operations and data import (handling CSV, JSON, etc. formats)"
)
"""InternLM's chat/chat_format.md."""

QWEN_SAMPLING = Sampling(top_p=0.8, max_new_tokens=512)
QWEN_STOPS = (Special("<|endoftext|>"), Special(IM_END), Special(IM_START))
QWEN_WINDOW = 6144
"""max_window_size of Qwen's chat()."""


def plain_reply(text: str, tools: Tools) -> dict[str, Any]:
    """Return a reply of a format without tools as a message."""
    return plain_message(text)


def qwen_turn(role: str, content: str, *, trained: bool = False, published: bool = False) -> Iterator[Segment]:
    """Yield one turn; role, line break and content are tokenised apart (make_context in qwen_generation_utils.py).

    The published labels (preprocess in Qwen's finetune.py) hold the control tokens of every turn, but not the end of
    what the assistant says with weight 0.
    """
    yield from qwen_head(role, trained=published)
    yield Text(content, trained=trained)
    yield Special(IM_END, trained=trained or (published and role != "assistant"))
    yield Text("\n", trained=published)


def qwen_head(role: str, *, trained: bool = False) -> Iterator[Segment]:
    """Yield what begins a turn."""
    yield Special(IM_START, trained=trained)
    yield Text(role)
    yield Text("\n")


def _render_qwen(conversation: Conversation) -> Iterator[Segment]:
    published = conversation.published_labels
    system = QWEN_SYSTEM if conversation.system is None else conversation.system
    yield from qwen_turn("system", system, published=published)
    for turn in conversation.turns:
        yield from qwen_turn(turn.role, turn.content, trained=turn.is_trained, published=published)
    if conversation.add_generation_prompt:
        yield from qwen_head("assistant")


def _render_joined(default_system: str | None, conversation: Conversation) -> Iterator[Segment]:
    """Yield turns whose role and content are one text, as jinja templates make them."""
    system = default_system if conversation.system is None else conversation.system
    if system is not None:
        yield from _joined_turn("system", [Text(system, joined=True)])
    for turn in conversation.turns:
        body = [Text(turn.content, trained=turn.is_trained, joined=True)]
        yield from _joined_turn(turn.role, body, trained=turn.is_trained)
    if conversation.add_generation_prompt:
        yield from _joined_head("assistant")


def _joined_turn(
    role: str, body: Sequence[Segment], name: Segment | None = None, *, trained: bool = False
) -> Iterator[Segment]:
    yield from _joined_head(role, name)
    yield from body
    yield Special(IM_END, trained=trained)
    yield Text("\n")


def _joined_head(role: str, name: Segment | None = None) -> Iterator[Segment]:
    yield Special(IM_START)
    if name is None:
        yield Text(f"{role}\n")
        return
    yield Text(f"{role} name=")
    yield name
    yield Text("\n", joined=True)


def _joined_template(name: str, default_system: str | None) -> str:
    return jinja.compact(
        jinja.refuse_tools(name)
        + jinja.split_system(default_system)
        + r"""
{%- if system is not none -%}{{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' -}}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] not in ['user', 'assistant'] -%}"""
        + jinja.refuse_role(name)
        + r"""{%- endif -%}
{{- '<|im_start|>' ~ message['role'] ~ '\n' ~ message['content'] ~ '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
    )


PLUGIN, INTERPRETER = "<|plugin|>", "<|interpreter|>"
ACTION_START, ACTION_END = "<|action_start|>", "<|action_end|>"


def _render_internlm2(conversation: Conversation) -> Iterator[Segment]:
    """Yield InternLM2's turns (chat/chat_format.md); an empty system message leaves the block out, as chat() does."""
    yield Special("<s>")
    system = INTERNLM2_SYSTEM if conversation.system is None else conversation.system
    if system:
        yield from _joined_turn("system", [Text(system, joined=True)])
    if conversation.tools.builtin_types:
        yield from _joined_turn("system", [Text(INTERPRETER_SYSTEM, joined=True)], Special(INTERPRETER))
    if conversation.tools.functions:
        # The line break that chat_format.md shows before <|im_end|> is taken for layout, like its trailing commas.
        definitions = to_json(conversation.tools.functions, indent=4)
        yield from _joined_turn("system", [Text(definitions, joined=True)], Special(PLUGIN))
    environment = Special(PLUGIN)
    for turn in conversation.turns:
        if turn.tool_call:
            environment = Special(PLUGIN if turn.tool_call.type == "function" else INTERPRETER)
        yield from _internlm2_turn(turn, environment)
    if conversation.add_generation_prompt:
        yield from _joined_head("assistant")


def _internlm2_turn(turn: Message, environment: Special) -> Iterator[Segment]:
    trained = turn.is_trained
    content = Text(turn.content, trained=trained, joined=True)
    if turn.role == "tool":
        yield from _joined_turn("environment", [content], environment)
    elif turn.tool_call:
        yield from _joined_turn(turn.role, [content, *_internlm2_action(turn, environment.text)], trained=trained)
    else:
        name = None if turn.name is None else Text(turn.name, joined=True)
        yield from _joined_turn(turn.role, [content], name, trained=trained)


def _internlm2_action(turn: Message, environment: str) -> Iterator[Segment]:
    call, trained = turn.tool_call, turn.is_trained
    if call.type == "function":
        text = f'{{"name": {to_json(call.name)}, "parameters": {call.text}}}'
    else:
        text = fence(call.text)
    yield Special(ACTION_START, trained=trained)
    yield Special(environment, trained=trained)
    yield Text(f"\n{text}", trained=trained)
    yield Special(ACTION_END, trained=trained)


def _parse_internlm2(text: str, tools: Tools) -> dict[str, Any]:
    content, _, action = text.partition(ACTION_START)
    action = action.removesuffix("\n").removesuffix(ACTION_END)
    if tools.functions and action.startswith(PLUGIN):
        call = parse_object(action.removeprefix(PLUGIN)) or {}
        name, parameters = call.get("name"), call.get("parameters")
        if isinstance(name, str) and isinstance(parameters, dict):
            return function_call_message(content, name, parameters)
    if tools.builtin_types and action.startswith(INTERPRETER):
        code = unfence(action.removeprefix(INTERPRETER))
        if code is not None:
            return builtin_call_message(content, "code_interpreter", code)
    return plain_message(text)


_INTERNLM2_TEMPLATE = jinja.compact(
    jinja.split_system(INTERNLM2_SYSTEM)
    + r"""
{{- bos_token -}}
{%- if system -%}{{- '<|im_start|>system\n' ~ system ~ '<|im_end|>\n' -}}{%- endif -%}
{%- set ns = namespace(functions=[], interpreter=false, environment='<|plugin|>') -%}
{%- for tool in tools or [] -%}
{%- if tool['type'] == 'function' -%}{%- set ns.functions = ns.functions + [tool['function']] -%}
{%- else -%}{%- set ns.interpreter = true -%}{%- endif -%}
{%- endfor -%}
{%- if ns.interpreter -%}{{- '<|im_start|>system name=<|interpreter|>\n' ~ """
    + jinja.quote(INTERPRETER_SYSTEM)
    + r""" ~ '<|im_end|>\n' -}}{%- endif -%}
{%- if ns.functions -%}
{{- '<|im_start|>system name=<|plugin|>\n' ~ (ns.functions | tojson(indent=4)) ~ '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] in """
    + jinja.TOOL_ROLES
    + r""" -%}
{{- '<|im_start|>environment name=' ~ ns.environment ~ '\n' ~ message['content'] -}}
{%- elif message['role'] in ['user', 'assistant'] -%}
{{- '<|im_start|>' ~ message['role'] ~ (' name=' ~ message['name'] if message['name'] else '') ~ '\n' -}}
{{- message['content'] or '' -}}
{%- else -%}"""
    + jinja.refuse_role("chatml-internlm2")
    + r"""{%- endif -%}
{%- for call in message['tool_calls'] or [] -%}
{%- if call['type'] == 'code_interpreter' -%}{%- set ns.environment = '<|interpreter|>' -%}
{%- set text = '```python\n' ~ call['code_interpreter']['input'] ~ '\n```' -%}
{%- else -%}{%- set ns.environment = '<|plugin|>' -%}"""
    + jinja.ARGUMENTS
    + r"""
{%- set text = '{"name": ' ~ (call['function']['name'] | tojson) ~ ', "parameters": ' ~ arguments ~ '}' -%}
{%- endif -%}
{{- '<|action_start|>' ~ ns.environment ~ '\n' ~ text ~ '<|action_end|>' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
)


def _generic(name: str, default_system: str | None, sampling: Sampling) -> ChatFormat:
    return ChatFormat(
        name=name,
        rules=Rules(order=FREE),
        render=lambda conversation: _render_joined(default_system, conversation),
        parse_reply=plain_reply,
        template=_joined_template(name, default_system),
        stop_tokens=(Special(IM_END),),
        sampling=sampling,
    )


CHATML_QWEN = ChatFormat(
    name="chatml-qwen",
    rules=Rules(),
    render=_render_qwen,
    parse_reply=plain_reply,
    template=_joined_template("chatml-qwen", QWEN_SYSTEM),
    stop_tokens=QWEN_STOPS,
    sampling=QWEN_SAMPLING,
    has_published_labels=True,
    history_window=QWEN_WINDOW,
)

CHATML_INTERNLM2 = ChatFormat(
    name="chatml-internlm2",
    rules=Rules(order=FREE, tool_types=("function", "code_interpreter"), named_roles=("user",)),
    render=_render_internlm2,
    parse_reply=_parse_internlm2,
    template=_INTERNLM2_TEMPLATE,
    stop_tokens=(Special("</s>"), Special(IM_END)),
    sampling=Sampling(temperature=0.8, top_p=0.8, max_new_tokens=1024),
    empty_system_is_none=True,
)

# Temperature and top_p as on SmolLM2's model card (remembered, not confirmed); the length is ours.
CHATML_SMOLLM2 = _generic("chatml-smollm2", SMOLLM2_SYSTEM, Sampling(temperature=0.2, top_p=0.9, max_new_tokens=512))
CHATML = _generic("chatml", None, Sampling(max_new_tokens=512))
