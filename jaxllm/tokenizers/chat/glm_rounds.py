"""ChatGLM-6B and ChatGLM2-6B: numbered rounds of question and answer, written as text.

Earlier answers are part of the prompt and have no end token, so only the last answer is trained on.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Sampling, Segment, Special, Text
from jaxllm.tokenizers.chat.messages import Conversation, Message, Rules, Tools, plain_message

TRAINING_TIME = ("[[训练时间]]", "2023年")
"""Placeholder that the GLM models write, and what the reference puts there."""

_FULL_WIDTH = {",": "，", "!": "！", ":": "：", ";": "；", "?": "？"}


def tidy_reply(text: str) -> str:
    """Return a reply as process_response of the GLM models leaves it."""
    return text.strip().replace(*TRAINING_TIME)


def _render_chatglm(conversation: Conversation) -> Iterator[Segment]:
    """Yield ChatGLM-6B's prompt, rounds from 0, a first question bare (chat() in modeling_chatglm.py)."""
    rounds, answer = _split_rounds(conversation)
    if len(rounds) == 1:
        yield Text(rounds[0][0])
    else:
        yield Text("\n".join(f"[Round {k}]\n问：{question}\n答：{reply}" for k, (question, reply) in enumerate(rounds)))
    if answer is None and not conversation.add_generation_prompt:
        return
    yield Special("[gMASK]")
    # The labels of ptuning/main.py begin at <sop>.
    yield Special("<sop>", trained=conversation.published_labels)
    if answer is not None:
        yield Text(answer.content, trained=answer.is_trained)
        yield Special("<eop>", trained=answer.is_trained)


def _render_chatglm2(conversation: Conversation) -> Iterator[Segment]:
    """Yield ChatGLM2-6B's prompt, rounds from 1 (build_prompt in tokenization_chatglm.py)."""
    rounds, answer = _split_rounds(conversation)
    yield Special("[gMASK]")
    yield Special("sop")
    yield Text(
        "\n\n".join(
            f"[Round {k}]\n\n问：{question}\n\n答：{reply}" for k, (question, reply) in enumerate(rounds, start=1)
        )
    )
    if answer is not None:
        yield Text(answer.content, trained=answer.is_trained)
        yield Special("</s>", trained=answer.is_trained)


def _split_rounds(conversation: Conversation) -> tuple[list[tuple[str, str]], Message | None]:
    """Return (question, answer) of each round, the last answer empty, and that last answer, None if it is to come."""
    turns = conversation.turns
    answer = turns[-1] if len(turns) % 2 == 0 else None
    contents = [turn.content for turn in (turns if answer is None else turns[:-1])]
    return list(zip(contents[::2], [*contents[1::2], ""], strict=True)), answer


def _parse_chatglm(text: str, tools: Tools) -> dict[str, Any]:
    """Return the reply with ASCII punctuation beside a CJK character made full-width."""
    text = tidy_reply(text)
    for ascii_mark, mark in _FULL_WIDTH.items():
        text = re.sub(rf"([\u4e00-\u9fff]){re.escape(ascii_mark)}", rf"\1{mark}", text)
        text = re.sub(rf"{re.escape(ascii_mark)}([\u4e00-\u9fff])", rf"{mark}\1", text)
    return plain_message(text)


def _parse_chatglm2(text: str, tools: Tools) -> dict[str, Any]:
    return plain_message(tidy_reply(text))


def _check_roles(name: str) -> str:
    return (
        jinja.refuse_tools(name)
        + "{%- for message in messages -%}"
        + "{%- if message['role'] != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}"
        + f"{{{{- raise_exception('the chat format {name} takes user and assistant in turn') -}}}}"
        + "{%- endif -%}{%- endfor -%}"
        + "{%- set count = (messages | length + 1) // 2 -%}"
        + "{%- set answered = messages | length % 2 == 0 -%}"
    )


_CHATGLM_TEMPLATE = jinja.compact(
    _check_roles("chatglm")
    + r"""
{%- for k in range(count) -%}
{%- set question = messages[2 * k]['content'] -%}
{%- if count == 1 -%}{{- question -}}
{%- else -%}{{- ('' if loop.first else '\n') ~ '[Round ' ~ k ~ ']\n问：' ~ question ~ '\n答：' -}}
{%- if not loop.last -%}{{- messages[2 * k + 1]['content'] -}}{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- if answered -%}{{- '[gMASK]<sop>' ~ messages[-1]['content'] ~ '<eop>' -}}
{%- elif add_generation_prompt -%}{{- '[gMASK]<sop>' -}}{%- endif -%}
"""
)

_CHATGLM2_TEMPLATE = jinja.compact(
    _check_roles("chatglm2")
    + r"""
{{- '[gMASK]sop' -}}
{%- for k in range(count) -%}
{{- ('' if loop.first else '\n\n') ~ '[Round ' ~ (k + 1) ~ ']\n\n问：' ~ messages[2 * k]['content'] ~ '\n\n答：' -}}
{%- if not loop.last -%}{{- messages[2 * k + 1]['content'] -}}{%- endif -%}
{%- endfor -%}
{%- if answered -%}{{- messages[-1]['content'] ~ '</s>' -}}{%- endif -%}
"""
)

CHATGLM = ChatFormat(
    name="chatglm",
    rules=Rules(has_system=False),
    render=_render_chatglm,
    parse_reply=_parse_chatglm,
    template=_CHATGLM_TEMPLATE,
    stop_tokens=(Special("<eop>"),),
    sampling=Sampling(temperature=0.95, top_p=0.7, max_length=2048),
    has_published_labels=True,
)

CHATGLM2 = ChatFormat(
    name="chatglm2",
    rules=Rules(has_system=False),
    render=_render_chatglm2,
    parse_reply=_parse_chatglm2,
    template=_CHATGLM2_TEMPLATE,
    stop_tokens=(Special("</s>"),),
    sampling=Sampling(temperature=0.8, top_p=0.8, max_length=8192),
    has_published_labels=True,
)
