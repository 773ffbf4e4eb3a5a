"""GLM-4: tools described in a Chinese system message of their own, calls as JSON, three built-in tools."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Sampling, Segment, Special
from jaxllm.tokenizers.chat.glm_roles import Block, render_blocks, split_reply, turn_blocks, turns_template
from jaxllm.tokenizers.chat.messages import (
    FREE,
    Conversation,
    Message,
    Rules,
    Tools,
    builtin_call_message,
    function_call_message,
    parse_object,
    to_json,
)

# The published chat_template; an early comment in tokenization_chatglm.py spells the name "GhatGLM".
TOOLS_SYSTEM = (
    "你是一个名为 ChatGLM 的人工智能助手。你是基于智谱AI训练的语言模型 GLM-4 模型开发的，"
    "你的任务是针对用户的问题和要求提供适当的答复和支持。\n\n# 可用工具"
)
FUNCTION_NOTE = "\n在调用上述函数时，请使用 Json 格式表示调用的参数。"
BUILTIN_TOOLS = {
    "code_interpreter": "\n\n## python\n\n"
    "当你向 `python` 发送包含 Python 代码的消息时，该代码将会在一个有状态的 Jupyter notebook 环境中执行。\n"
    "`python` 返回代码执行的输出，或在执行 60 秒后返回超时。\n"
    "`/mnt/data` 将会持久化存储你的文件。在此会话中，`python` 无法访问互联网。"
    "不要使用 `python` 进行任何网络请求或者在线 API 调用，这些在线内容的访问将不会成功。",
    "simple_browser": "\n\n## simple_browser\n\n"
    "你可以使用 `simple_browser` 工具。该工具支持以下函数：\n"
    "`search(query: str, recency_days: int)`：使用搜索引擎进行查询并显示结果，"
    "可以使用 `recency_days` 参数控制搜索内容的时效性。\n"
    "`mclick(ids: list[int])`：获取一系列指定 id 的页面内容。每次调用时，须选择3-10个页面。"
    "选择多个角度的页面，同时尽可能选择可信任的信息来源。"
    "考虑到部分页面是无法加载的，你也可以多打开一些可能有用的页面而不用担心内容过多。\n"
    "`open_url(url: str)`：打开指定的 URL。\n\n"
    "使用 `【{引用 id}†{引用文本}】` 来引用内容。\n\n"
    "操作步骤：1. 使用 `search` 来获得信息列表; 2. 使用 `mclick` 来获取指定 ID 页面的内容; "
    "3. 根据获得的内容进行回复。在回复中应当引用信息来源。\n"
    " 如果用户提供了 URL，也可以用 `open_url` 直接打开页面。\n"
    "如果初次搜索结果没有找到合适的信息，也可以再次使用 `search` 进行搜索。",
    "cogview": "\n\n## cogview\n\n"
    "如果用户的请求中包含了对图像的描述，你可以使用 `cogview` 来生成图像并展示给用户。"
    "你需要向 `cogview` 发送图像描述，规则：\n"
    "- 发送给 `cogview` 的消息必须使用英语。用户的中文描述必须完全翻译为英语。\n"
    "- 应当尽可能详细地描述图像生成的需求，需求描述约 100 英文单词。\n"
    "- 保持用户原始描述的意图。不要虚构内容或者没见过的人物。\n"
    "- 如无特殊说明，所在地为中国，持有中国立场并遵循中国社会主义价值观。",
}
"""Type of a built-in tool -> what the system message says of it."""

METADATA = {"code_interpreter": "python", "simple_browser": "simple_browser", "cogview": "cogview"}
"""Type of a built-in tool -> the metadata of a message to it."""


def _render(conversation: Conversation) -> Iterator[Segment]:
    return render_blocks(
        ("[gMASK]", "<sop>"), _blocks(conversation), conversation, end="<|user|>", published_roles=("assistant",)
    )


def _blocks(conversation: Conversation) -> Iterator[Block]:
    if conversation.tools:
        yield Block("system", TOOLS_SYSTEM + "".join(map(_describe_tool, conversation.tools.definitions)))
    if conversation.system is not None:
        yield Block("system", conversation.system)
    yield from turn_blocks(conversation.turns, _call_block)


def _call_block(turn: Message) -> Block:
    # That python gets its code without a fence is taken from the other tools; no published example shows it.
    metadata = METADATA.get(turn.tool_call.type, turn.tool_call.name)
    return Block("assistant", turn.tool_call.text, metadata, turn.weight)


def _describe_tool(tool: Mapping[str, Any]) -> str:
    if tool["type"] != "function":
        return BUILTIN_TOOLS[tool["type"]]
    return f"\n\n## {tool['function']['name']}\n\n{to_json(tool['function'], indent=4)}{FUNCTION_NOTE}"


def _parse(text: str, tools: Tools) -> dict[str, Any]:
    reply = split_reply(text)
    arguments = parse_object(reply.body)
    if reply.metadata in [function["name"] for function in tools.functions] and arguments is not None:
        return function_call_message(reply.content, reply.metadata, arguments)
    for kind in tools.builtin_types:
        if reply.metadata == METADATA[kind]:
            return builtin_call_message(reply.content, kind, reply.body)
    return reply.as_answer()


_CALL = (
    r"""
{%- if call['type'] == 'function' or call['type'] is not defined -%}"""
    + jinja.ARGUMENTS
    + r"""{{- '<|assistant|>' ~ call['function']['name'] ~ '\n' ~ arguments -}}
{%- else -%}
{{- '<|assistant|>' ~ ('python' if call['type'] == 'code_interpreter' else call['type']) -}}
{{- '\n' ~ call[call['type']]['input'] -}}
{%- endif -%}
"""
)


_TEMPLATE = jinja.compact(
    jinja.split_system(None)
    + r"""
{{- '[gMASK]<sop>' -}}
{%- if tools -%}
{{- '<|system|>\n' ~ """
    + jinja.quote(TOOLS_SYSTEM)
    + r""" -}}
{%- for tool in tools -%}
{%- if tool['type'] == 'function' -%}
{{- '\n\n## ' ~ tool['function']['name'] ~ '\n\n' ~ (tool['function'] | tojson(indent=4)) ~ """
    + jinja.quote(FUNCTION_NOTE)
    + r""" -}}
"""
    + "".join(
        f"{{%- elif tool['type'] == '{kind}' -%}}{{{{- {jinja.quote(text)} -}}}}"
        for kind, text in BUILTIN_TOOLS.items()
    )
    + r"""
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if system is not none -%}{{- '<|system|>\n' ~ system -}}{%- endif -%}
"""
    + turns_template("glm4", _CALL, "<|user|>")
)

GLM4 = ChatFormat(
    name="glm4",
    rules=Rules(order=FREE, tool_types=("function", *METADATA)),
    render=_render,
    parse_reply=_parse,
    template=_TEMPLATE,
    stop_tokens=(Special("<|endoftext|>"), Special("<|user|>"), Special("<|observation|>")),
    sampling=Sampling(temperature=0.8, top_p=0.8, max_length=8192),
    has_published_labels=True,
)
