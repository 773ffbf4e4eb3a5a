"""Tokenizers of bytes with a chat format's special tokens, conversations, and sets of examples made from rows."""

import json

from jaxllm.config.alignment import ChatConfig
from jaxllm.config.schema import SourceConfig
from jaxllm.data.example_set import prepare_examples
from jaxllm.data.examples import Encoder, Places
from jaxllm.data.prefix_layout import PrefixIds
from jaxllm.families import spec as published_spec
from jaxllm.tokenizers.chat import CHAT_FORMATS, Special
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE
from tests.tiny_models import LLAMA

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather of a city", "parameters": {"type": "object"}},
}
CODE = {"type": "code_interpreter"}


def talk(*contents):
    """Return a conversation of the user and the assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def tool_talk():
    call = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris"}}}
    return [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Let me see", "tool_calls": [call]},
        {"role": "tool", "content": '{"celsius": 22}'},
        {"role": "assistant", "content": "It is mild"},
    ]


def code_talk():
    call = {"type": "code_interpreter", "code_interpreter": {"input": "print(6 * 7)"}}
    return [
        {"role": "user", "content": "6 * 7?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        {"role": "assistant", "content": "Forty-two"},
    ]


def chat_tokenizer(name="chatml"):
    """Return a tokenizer of bytes, its special tokens those of a format, and an end of text."""
    chat_format = CHAT_FORMATS[name]
    samples = [(talk("q", "a"), None)]
    if chat_format.rules.tool_types:
        samples.append((tool_talk(), [WEATHER]))
    if "code_interpreter" in chat_format.rules.tool_types:
        samples.append((code_talk(), [CODE]))
    segments = [*chat_format.stop_tokens]
    for messages, tools in samples:
        segments += chat_format.segments(messages, tools)
    texts = dict.fromkeys(segment.text for segment in segments if isinstance(segment, Special))
    texts = [*dict.fromkeys([*texts, "<|endoftext|>", "[MASK]"])]
    specials = {text: 256 + number for number, text in enumerate(texts)}
    tokens = [bytes([byte]) for byte in range(256)]
    return TiktokenBPE(
        tokens, pattern=r"[\s\S]", special_tokens=specials, normalization=None, eos_token="<|endoftext|>"
    )


def make_encoder(name="chatml", spec=LLAMA, **options):
    """Return the encoder of a format, of ChatGLM-6B's positions for its own; None: of prompts without a format."""
    tokenizer = chat_tokenizer(name or "chatml")
    prefix_ids = None
    if name == "chatglm":
        spec = published_spec("chatglm-6b")
        gmask, sop, eop, mask = (tokenizer.special_tokens[text] for text in ("[gMASK]", "<sop>", "<eop>", "[MASK]"))
        prefix_ids = PrefixIds(mask=mask, gmask=gmask, smask=None, sop=sop, eop=eop)
    chat = None if name is None else CHAT_FORMATS[name]
    return Encoder(tokenizer=tokenizer, chat=chat, options=ChatConfig(**options), places=Places(spec, prefix_ids))


def write_rows(path, rows):
    """Write rows as jsonl and return the path."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def make_set(folder, rows, purpose="sft", encoder=None, *, kind="auto", system=None, **options):
    """Return rows as an example set; a folder has one."""
    source = SourceConfig(path=str(write_rows(folder / "rows.jsonl", rows)), rows=kind, system=system)
    options = {"seq_len": 4096} | options
    return prepare_examples(source, purpose, encoder or make_encoder(), folder / "cache", **options)
