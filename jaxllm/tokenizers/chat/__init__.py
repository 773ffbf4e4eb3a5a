"""Chat formats: how each family writes conversations, as text, token ids and labels, and how its replies are read."""

from __future__ import annotations

from jaxllm.tokenizers.chat.base import IGNORED, ChatFormat, ChatTokens, Sampling, Segment, Special, Text
from jaxllm.tokenizers.chat.chatglm3 import CHATGLM3
from jaxllm.tokenizers.chat.chatml import CHATML, CHATML_INTERNLM2, CHATML_QWEN, CHATML_SMOLLM2
from jaxllm.tokenizers.chat.glm4 import GLM4
from jaxllm.tokenizers.chat.glm_rounds import CHATGLM, CHATGLM2
from jaxllm.tokenizers.chat.plain import BAICHUAN, BAICHUAN2, DEEPSEEK_LLM, DEEPSEEK_V2, INTERNLM, LLAMA2
from jaxllm.tokenizers.chat.react import REACT_QWEN

__all__ = ["CHAT_FORMATS", "IGNORED", "ChatFormat", "ChatTokens", "Sampling", "Segment", "Special", "Text"]

_ALL = (
    CHATML_QWEN,
    REACT_QWEN,
    CHATML_INTERNLM2,
    CHATML_SMOLLM2,
    CHATML,
    LLAMA2,
    BAICHUAN,
    BAICHUAN2,
    CHATGLM,
    CHATGLM2,
    CHATGLM3,
    GLM4,
    INTERNLM,
    DEEPSEEK_LLM,
    DEEPSEEK_V2,
)

CHAT_FORMATS: dict[str, ChatFormat] = {chat_format.name: chat_format for chat_format in _ALL}
"""Name -> chat format; a family names its own."""
