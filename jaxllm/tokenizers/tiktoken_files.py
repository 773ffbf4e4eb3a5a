"""Published vocabularies in tiktoken's format: Qwen v1, GLM-4, cl100k_base."""

from __future__ import annotations

import hashlib
from os import PathLike
from pathlib import Path

from jaxllm.errors import InputError
from jaxllm.tokenizers import patterns
from jaxllm.tokenizers.files import read_bytes
from jaxllm.tokenizers.rank_file import parse_tokens
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE, number_from

QWEN_SHA256 = "b2b1b8dfb5cc5f024bafc373121c6aba3f66f9a5a0269e243470a1de16a33186"
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{k}|>" for k in range(205)))

CL100K_SHA256 = "223921b76ee99bde995b7ff738513eef100fb51d18c93597a113bcffe865b2a7"
CL100K_SPECIALS = {
    "<|endoftext|>": 100257,
    "<|fim_prefix|>": 100258,
    "<|fim_middle|>": 100259,
    "<|fim_suffix|>": 100260,
    "<|endofprompt|>": 100276,
}

GLM4_SPECIALS = (
    *("<|endoftext|>", "[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>"),
    *("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"),
    *("<|begin_of_image|>", "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"),
)
LLAMA3_RANKS = 128_000


def qwen_tokenizer(path: str | PathLike[str]) -> TiktokenBPE:
    """Read the published Qwen v1 vocabulary, `qwen.tiktoken`: 151,643 ranks and 208 special tokens.

    Raises InputError for a file that is missing or is not the published one.
    """
    tokens = _published_tokens(Path(path), QWEN_SHA256)
    return TiktokenBPE(
        tokens,
        pattern=patterns.QWEN,
        special_tokens=number_from(len(tokens), QWEN_SPECIALS),
        normalization="NFC",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
    )


def cl100k_tokenizer(path: str | PathLike[str]) -> TiktokenBPE:
    """Read the published `cl100k_base.tiktoken`: 100,256 ranks and 5 special tokens, their ids as published.

    Raises InputError for a file that is missing or is not the published one.
    """
    return TiktokenBPE(
        _published_tokens(Path(path), CL100K_SHA256),
        pattern=patterns.CL100K,
        special_tokens=CL100K_SPECIALS,
        normalization=None,
        eos_token="<|endoftext|>",
    )


def glm4_tokenizer(path: str | PathLike[str]) -> TiktokenBPE:
    """Read a vocabulary of GLM-4's kind: ranks (151,329 as published), then the special tokens; no normalization.

    Raises InputError for a file that is missing or no such file.
    """
    path = Path(path)
    tokens = parse_tokens(read_bytes(path), path)
    if len(tokens) == LLAMA3_RANKS:
        raise InputError(f"{path}: found the {LLAMA3_RANKS:,} ranks of Llama 3; expected GLM-4's, or a tokenizer.json")
    try:
        return TiktokenBPE(
            tokens,
            pattern=patterns.CL100K,
            special_tokens=number_from(len(tokens), GLM4_SPECIALS),
            normalization=None,
            eos_token="<|endoftext|>",
            pad_token="<|endoftext|>",
            prefix_tokens=("[gMASK]", "<sop>"),
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _published_tokens(path: Path, expected: str) -> list[bytes]:
    content = read_bytes(path)
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise InputError(f"{path}: found sha256 {found}, expected the published vocabulary's {expected}")
    return parse_tokens(content, path)
