"""The tokenizer files that families are published with, by a name that their description uses.

The name is that of the file in the folder JAXLLM_ASSETS, where the files of several families lie side by side; in a
model's own folder many are just called `tokenizer.model`.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from jaxllm.errors import InputError
from jaxllm.tokenizers.base import Tokenizer
from jaxllm.tokenizers.files import read_bytes
from jaxllm.tokenizers.sentencepiece_families import sentencepiece_tokenizer
from jaxllm.tokenizers.tiktoken_files import cl100k_tokenizer, glm4_tokenizer, qwen_tokenizer
from jaxllm.tokenizers.tokenizer_json import Names, json_tokenizer

Kind = Literal["tiktoken", "json", "sentencepiece"]


@dataclasses.dataclass(frozen=True)
class Published:
    """How a family's tokenizer was published.

    Attributes:
      file: its name in a model's folder.
      kind: what the file is.
      read: builds the tokenizer from the file; raises InputError.
    """

    file: str
    kind: Kind
    read: Callable[[Path], Tokenizer]


def _sentencepiece(family: str, file: str = "tokenizer.model") -> Published:
    return Published(file, "sentencepiece", functools.partial(sentencepiece_tokenizer, family=family))


_DEEPSEEK_NAMES = Names(
    bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", pad="<｜end▁of▁sentence｜>", add_bos=True
)
_DEEPSEEK = Published("tokenizer.json", "json", functools.partial(json_tokenizer, defaults=_DEEPSEEK_NAMES))

PUBLISHED = {
    "tokenizer.json": Published("tokenizer.json", "json", json_tokenizer),
    "qwen.tiktoken": Published("qwen.tiktoken", "tiktoken", qwen_tokenizer),
    "glm4.tiktoken": Published("tokenizer.model", "tiktoken", glm4_tokenizer),
    "cl100k_base.tiktoken": Published("cl100k_base.tiktoken", "tiktoken", cl100k_tokenizer),
    "deepseek_llm_tokenizer.json": _DEEPSEEK,
    "deepseek_v2_tokenizer.json": _DEEPSEEK,
    "deepseek_v3_tokenizer.json": _DEEPSEEK,
    "llama.model": _sentencepiece("llama"),
    "baichuan.model": _sentencepiece("baichuan"),
    "baichuan2.model": _sentencepiece("baichuan2"),
    "internlm.model": _sentencepiece("internlm"),
    "internlm2.model": _sentencepiece("internlm2"),
    "chatglm.model": _sentencepiece("chatglm", "ice_text.model"),
    "chatglm2.model": _sentencepiece("chatglm2"),
    "chatglm3.model": _sentencepiece("chatglm3"),
    "glm130b.model": _sentencepiece("glm130b", "ice_text.model"),
    "glm_10b_chinese.model": _sentencepiece("glm_10b_chinese", "cog-pretrain.model"),
    "glm_large_chinese.model": _sentencepiece("glm_large_chinese", "cog-pretrain.model"),
}

_DEFAULT = {"tiktoken": "glm4.tiktoken", "json": "tokenizer.json", "sentencepiece": "llama.model"}
"""What a file is taken for where neither its name nor its model's family says more."""

_SHARED_NAMES = ("tokenizer.model", "tokenizer.json")


def file_names(published: str | None) -> list[str]:
    """Return the names under which a model's folder may hold a tokenizer, the family's own first."""
    first = [] if published is None else [PUBLISHED[published].file]
    return list(dict.fromkeys([*first, *(entry.file for entry in PUBLISHED.values())]))


def read_published(file: Path, published: str | None) -> Tokenizer:
    """Read a published file; `published`, a key of PUBLISHED, says whose it is where its own name does not.

    Raises:
      InputError: the file is faulty, or its name says nothing about it.
    """
    if file.name in PUBLISHED and file.name not in _SHARED_NAMES:
        return PUBLISHED[file.name].read(file)
    kind = _kind_of(file)
    if published is not None and PUBLISHED[published].kind == kind:
        return PUBLISHED[published].read(file)
    if file.name in _SHARED_NAMES:
        return PUBLISHED[_DEFAULT[kind]].read(file)
    named = (name for name, entry in PUBLISHED.items() if entry.file == file.name)
    return PUBLISHED[next(named, _DEFAULT[kind])].read(file)


def _kind_of(file: Path) -> Kind:
    if file.suffix == ".json":
        return "json"
    if file.suffix == ".model":
        # tiktoken's lines are base64 and a number; a sentencepiece model begins with a field of a protobuf, 0x0a.
        return "tiktoken" if re.match(rb"[A-Za-z0-9+/]+=* \d+\s", read_bytes(file)) else "sentencepiece"
    expected = ", ".join(file_names(None))
    raise InputError(f"tokenizer {file}: found a file named {file.name!r}, expected one of {expected}")
