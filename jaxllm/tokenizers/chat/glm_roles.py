"""What ChatGLM3 and GLM-4 share: a role token, a line of metadata, the content; the next role's token ends a turn.

The line and the content are tokenised apart (build_single_message in both tokenization_chatglm.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from jaxllm.tokenizers.chat import jinja
from jaxllm.tokenizers.chat.base import Segment, Special, Text
from jaxllm.tokenizers.chat.glm_rounds import tidy_reply
from jaxllm.tokenizers.chat.messages import Conversation, Message, plain_message

ROLE_TOKENS = {
    "system": "<|system|>",
    "user": "<|user|>",
    "assistant": "<|assistant|>",
    "tool": "<|observation|>",
}


@dataclass(frozen=True)
class Block:
    """One message as the model sees it; a call is a message of its own, its metadata the name of the tool.

    Attributes:
      weight: 0 where the assistant is not trained to say it.
    """

    role: str
    content: str
    metadata: str = ""
    weight: int = 1


@dataclass(frozen=True)
class Reply:
    """The parts of a reply: what was said before its last block, and that block's metadata and body."""

    text: str
    content: str
    metadata: str
    body: str

    def as_answer(self) -> dict[str, Any]:
        """Return the reply as a message without a call."""
        if self.metadata:
            return plain_message(tidy_reply(self.text))
        parts = (tidy_reply(self.content), tidy_reply(self.body))
        return plain_message("\n".join(part for part in parts if part))


def turn_blocks(turns: Iterable[Message], call_block: Callable[[Message], Block]) -> Iterator[Block]:
    """Yield what is said; `call_block` makes the block of a message's call."""
    for turn in turns:
        if turn.content or not turn.tool_call:
            yield Block(turn.role, turn.content, weight=turn.weight)
        if turn.tool_call:
            yield call_block(turn)


def render_blocks(
    prefix: Sequence[str],
    blocks: Iterable[Block],
    conversation: Conversation,
    *,
    end: str,
    published_roles: tuple[str, ...],
) -> Iterator[Segment]:
    """Yield role tokens and texts.

    A token is trained on if the one before it belongs to a role that is: not the token that gives the role the
    floor, but the one that takes it away (process_batch in both finetune_demo folders, whose mask is shifted by one).
    Neither is what the assistant says with weight 0, nor what takes the floor from it then.

    Args:
      prefix: special tokens at the very start.
      blocks: what is said.
      conversation: as given.
      end: token after the last message.
      published_roles: roles that are trained on with the published labels.
    """
    roles = published_roles if conversation.published_labels else ("assistant",)
    yield from map(Special, prefix)
    trained, before = False, None
    for block in blocks:
        yield Special(ROLE_TOKENS[block.role], trained=trained)
        trained, before = block.role in roles and block.weight == 1, block.role
        yield Text(f"{block.metadata}\n", trained=trained)
        yield Text(block.content, trained=trained)
    if conversation.add_generation_prompt:
        yield Special(ROLE_TOKENS["assistant"])
    elif conversation.published_labels:
        yield Special(end, trained=trained)
    elif before == "assistant":
        calls = conversation.turns[-1].tool_call is not None
        yield Special(ROLE_TOKENS["tool"] if calls else end, trained=trained)


def split_reply(text: str) -> Reply:
    """Split the text of a reply, in which the model may begin further messages of its own."""
    earlier, _, last = text.rpartition(ROLE_TOKENS["assistant"])
    content = "".join(part.partition("\n")[2] for part in earlier.split(ROLE_TOKENS["assistant"]))
    metadata, line_break, body = last.partition("\n")
    if not line_break:
        return Reply(text, tidy_reply(content), "", metadata)
    return Reply(text, tidy_reply(content), metadata.strip(), body)


_TURNS_TEMPLATE = (
    r"""
{%- for message in turns -%}
{%- if message['role'] in """
    + jinja.TOOL_ROLES
    + r""" -%}{{- '<|observation|>\n' ~ message['content'] -}}
{%- elif message['role'] == 'user' -%}{{- '<|user|>\n' ~ message['content'] -}}
{%- elif message['role'] != 'assistant' -%}ROLE_ERROR
{%- elif not message['tool_calls'] -%}{{- '<|assistant|>\n' ~ message['content'] -}}
{%- else -%}
{%- if message['content'] -%}{{- '<|assistant|>\n' ~ message['content'] -}}{%- endif -%}
{%- set call = message['tool_calls'][0] -%}
CALL
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}
{%- elif messages[-1]['role'] == 'assistant' -%}
{{- '<|observation|>' if messages[-1]['tool_calls'] else 'END' -}}
{%- endif -%}
"""
)


def turns_template(name: str, call: str, end: str) -> str:
    """Return the part of a template that writes `turns`; `call` is the part that writes a `call`."""
    return (
        _TURNS_TEMPLATE.replace("ROLE_ERROR", jinja.refuse_role(name))
        .replace("CALL", call)
        .replace("'END'", f"'{end}'")
    )
