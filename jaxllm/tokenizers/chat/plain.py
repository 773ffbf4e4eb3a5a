"""Formats whose turns are framed by text or by two token ids: Llama 2, Baichuan, InternLM v1, DeepSeek."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import ChatFormat, Sampling, Segment, Special, Text
from jaxllm.tokenizers.chat.chatml import plain_reply
from jaxllm.tokenizers.chat.messages import FREE, Conversation, Message, Rules, Tools, plain_message


def _render_llama2(conversation: Conversation) -> Iterator[Segment]:
    """Yield `<s>[INST] Q [/INST] A </s>` per round, as chat_completion in Meta's llama/generation.py.

    The system message stands inside the first question. Everything is stripped.
    """
    system = conversation.system
    for k, turn in enumerate(conversation.turns):
        if turn.role == "assistant":
            yield Text(f" {turn.content.strip()} ", trained=turn.is_trained, joined=True)
            yield Special("</s>", trained=turn.is_trained)
            continue
        content = turn.content if k or system is None else f"<<SYS>>\n{system}\n<</SYS>>\n\n{turn.content}"
        yield Special("<s>")
        yield Text(f"[INST] {content.strip()} [/INST]")


_LLAMA2_TEMPLATE = jinja.compact(
    jinja.refuse_tools("llama2")
    + jinja.split_system(None)
    + r"""
{%- for message in turns -%}
{%- set content = message['content'] -%}
{%- if loop.first and system is not none -%}
{%- set content = '<<SYS>>\n' ~ system ~ '\n<</SYS>>\n\n' ~ content -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}{{- bos_token ~ '[INST] ' ~ content.strip() ~ ' [/INST]' -}}
{%- elif message['role'] == 'assistant' -%}{{- ' ' ~ content.strip() ~ ' ' ~ eos_token -}}
{%- else -%}"""
    + jinja.refuse_role("llama2")
    + r"""{%- endif -%}
{%- endfor -%}
"""
)


def _parse_stripped(text: str, tools: Tools) -> dict[str, Any]:
    return plain_message(text.strip())


# Both generations fix the ids of these tokens and not their texts. The texts are those that other projects' templates
# use for them (vLLM, LLaMA-Factory); no vocabulary file confirmed them here.
BAICHUAN_END = Special("</s>", id=2)
BAICHUAN_USER, BAICHUAN_ASSISTANT = Special("<reserved_102>", id=195), Special("<reserved_103>", id=196)
BAICHUAN2_USER, BAICHUAN2_ASSISTANT = Special("<reserved_106>", id=195), Special("<reserved_107>", id=196)


def _render_baichuan(conversation: Conversation) -> Iterator[Segment]:
    """Yield Baichuan-13B-Chat's turns; </s> ends each reply (_build_chat_input in modeling_baichuan.py)."""
    for turn in conversation.turns:
        if turn.role == "user":
            yield BAICHUAN_USER
            yield Text(turn.content)
        else:
            yield BAICHUAN_ASSISTANT
            yield Text(turn.content, trained=turn.is_trained)
            yield dataclasses.replace(BAICHUAN_END, trained=turn.is_trained)
    if conversation.add_generation_prompt:
        yield BAICHUAN_ASSISTANT


def _render_baichuan2(conversation: Conversation) -> Iterator[Segment]:
    """Yield Baichuan 2's turns (build_chat_input in generation_utils.py).

    Nothing stands between a reply and the next question, so the place of the user's token learns </s> instead; only
    the last reply is followed by it. The published labels (fine-tune.py) teach it at each user's token, the first too.
    It is not taught after a reply of weight 0.
    """
    before: Message | None = None
    if conversation.system is not None:
        yield Text(conversation.system)
    for turn in conversation.turns:
        if turn.role == "user":
            is_reply = before is not None and before.role == "assistant"
            trained = before.is_trained if is_reply else conversation.published_labels
            yield dataclasses.replace(BAICHUAN2_USER, trained=trained, learns=BAICHUAN_END)
        else:
            yield BAICHUAN2_ASSISTANT
        yield Text(turn.content, trained=turn.is_trained)
        before = turn
    if conversation.add_generation_prompt:
        yield BAICHUAN2_ASSISTANT
    elif before.role == "assistant":
        yield dataclasses.replace(BAICHUAN_END, trained=before.is_trained)


def _baichuan_template(name: str, user: Special, assistant: Special, *, prelude: str, end_of_reply: str) -> str:
    turns = r"""
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}{{- 'USER' ~ message['content'] -}}
{%- elif message['role'] == 'assistant' -%}{{- 'ASSISTANT' ~ message['content'] ~ END_OF_REPLY -}}
{%- else -%}REFUSE{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT' -}}{%- endif -%}
"""
    parts = {"USER": user.text, "ASSISTANT": assistant.text, "END_OF_REPLY": end_of_reply}
    for part, text in (parts | {"REFUSE": jinja.refuse_role(name)}).items():
        turns = turns.replace(part, text)
    return jinja.compact(jinja.refuse_tools(name) + prelude + turns)


def _render_internlm(conversation: Conversation) -> Iterator[Segment]:
    """Yield InternLM v1's turns (build_inputs in modeling_internlm.py, first release).

    The role names are plain text. The system line is that of the last release, which also drops <eoh>.
    """
    yield Special("<s>")
    if conversation.system:
        yield Text(f"<|System|>:{conversation.system}\n")
    for turn in conversation.turns:
        if turn.role == "user":
            yield Text(f"<|User|>:{turn.content}", joined=True)
            yield Special("<eoh>")
        else:
            yield Text("\n<|Bot|>:")
            yield Text(turn.content, trained=turn.is_trained, joined=True)
            yield Special("<eoa>", trained=turn.is_trained)
            yield Text("\n")
    if conversation.add_generation_prompt:
        yield Text("\n<|Bot|>:")


_INTERNLM_TEMPLATE = jinja.compact(
    jinja.refuse_tools("internlm")
    + jinja.split_system(None)
    + r"""
{{- bos_token -}}
{%- if system -%}{{- '<|System|>:' ~ system ~ '\n' -}}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}{{- '<|User|>:' ~ message['content'] ~ '<eoh>' -}}
{%- elif message['role'] == 'assistant' -%}{{- '\n<|Bot|>:' ~ message['content'] ~ '<eoa>\n' -}}
{%- else -%}"""
    + jinja.refuse_role("internlm")
    + r"""{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '\n<|Bot|>:' -}}{%- endif -%}
"""
)

DEEPSEEK_BOS, DEEPSEEK_EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def _render_deepseek(conversation: Conversation) -> Iterator[Segment]:
    """Yield DeepSeek's turns (chat_template in tokenizer_config.json of LLM and V2)."""
    yield Special(DEEPSEEK_BOS)
    if conversation.system is not None:
        yield Text(f"{conversation.system}\n\n")
    for turn in conversation.turns:
        if turn.role == "user":
            yield Text(f"User: {turn.content}\n\n", joined=True)
        else:
            yield Text("Assistant:", joined=True)
            yield Text(f" {turn.content}", trained=turn.is_trained, joined=True)
            yield Special(DEEPSEEK_EOS, trained=turn.is_trained)
    if conversation.add_generation_prompt:
        yield Text("Assistant:", joined=True)


_DEEPSEEK_TEMPLATE = jinja.compact(
    jinja.refuse_tools("deepseek")
    + jinja.split_system(None)
    + r"""
{{- bos_token -}}
{%- if system is not none -%}{{- system ~ '\n\n' -}}{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}{{- 'User: ' ~ message['content'] ~ '\n\n' -}}
{%- elif message['role'] == 'assistant' -%}{{- 'Assistant: ' ~ message['content'] ~ eos_token -}}
{%- else -%}"""
    + jinja.refuse_role("deepseek")
    + r"""{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""
)

# Temperature and top_p of the 7B and 13B are remembered, not confirmed; the 70B's first file says 0.9 and 0.6.
LLAMA2 = ChatFormat(
    name="llama2",
    rules=Rules(),
    render=_render_llama2,
    parse_reply=_parse_stripped,
    template=_LLAMA2_TEMPLATE,
    stop_tokens=(Special("</s>"),),
    sampling=Sampling(temperature=0.6, top_p=0.9, max_length=4096),
)

BAICHUAN = ChatFormat(
    name="baichuan",
    rules=Rules(has_system=False, order=FREE),
    render=_render_baichuan,
    parse_reply=plain_reply,
    template=_baichuan_template(
        "baichuan",
        BAICHUAN_USER,
        BAICHUAN_ASSISTANT,
        prelude="{%- set turns = messages -%}",
        end_of_reply="eos_token",
    ),
    stop_tokens=(BAICHUAN_END,),
    sampling=Sampling(temperature=0.3, top_p=0.85, top_k=5, repetition_penalty=1.1, max_new_tokens=2048),
)

BAICHUAN2 = ChatFormat(
    name="baichuan2",
    rules=Rules(order=FREE),
    render=_render_baichuan2,
    parse_reply=plain_reply,
    template=_baichuan_template(
        "baichuan2",
        BAICHUAN2_USER,
        BAICHUAN2_ASSISTANT,
        prelude=jinja.split_system(None) + "{%- if system is not none -%}{{- system -}}{%- endif -%}",
        end_of_reply="(eos_token if loop.last else '')",
    ),
    stop_tokens=(BAICHUAN_END,),
    sampling=Sampling(temperature=0.3, top_p=0.85, top_k=5, repetition_penalty=1.05, max_new_tokens=2048),
    has_published_labels=True,
)

INTERNLM = ChatFormat(
    name="internlm",
    rules=Rules(),
    render=_render_internlm,
    parse_reply=plain_reply,
    template=_INTERNLM_TEMPLATE,
    stop_tokens=(Special("</s>"), Special("<eoa>")),
    sampling=Sampling(temperature=0.8, top_p=0.8, max_new_tokens=1024),
)

# No length is published for DeepSeek's replies; 2048 is ours.
DEEPSEEK_LLM = ChatFormat(
    name="deepseek-llm",
    rules=Rules(order=FREE),
    render=_render_deepseek,
    parse_reply=_parse_stripped,
    template=_DEEPSEEK_TEMPLATE,
    stop_tokens=(Special(DEEPSEEK_EOS),),
    sampling=Sampling(temperature=0.7, top_p=0.9, max_new_tokens=2048),
)

DEEPSEEK_V2 = dataclasses.replace(
    DEEPSEEK_LLM, name="deepseek-v2", sampling=Sampling(temperature=0.3, top_p=0.95, max_new_tokens=2048)
)
