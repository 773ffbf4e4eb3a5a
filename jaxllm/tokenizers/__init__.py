"""Tokenizers: text to ids and back."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from jaxllm.errors import InputError
from jaxllm.tokenizers import tiktoken_bpe
from jaxllm.tokenizers.base import StreamDecoder, Tokenizer

__all__ = ["StreamDecoder", "Tokenizer", "find_tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | PathLike[str]) -> Tokenizer:
    """Read a tokenizer from a folder of our own format, a published Qwen folder, or a vocabulary file of either.

    Raises InputError where nothing lies there, or what lies there is faulty.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"tokenizer {path}: no such file or folder")
    file = _vocabulary_in(path) if path.is_dir() else path
    if file is None:
        raise InputError(f"tokenizer {path}: found no {_KNOWN_FILES} in the folder")
    if file.name == tiktoken_bpe.RANKS_FILE:
        return tiktoken_bpe.load_folder(file.parent)
    if file.name == tiktoken_bpe.QWEN_FILE:
        return tiktoken_bpe.qwen_tokenizer(file)
    raise InputError(f"tokenizer {path}: found a file named {file.name!r}, expected {_KNOWN_FILES}")


def find_tokenizer(
    model_folder: str | PathLike[str] | None = None,
    path: str | PathLike[str] | None = None,
    *,
    published: str | None = None,
) -> Tokenizer | None:
    """Return the first tokenizer of: the model's folder, `path`, the folder that JAXLLM_ASSETS names; None if none is.

    Args:
      model_folder: a checkpoint or run folder that may hold tokenizer files.
      path: the configured tokenizer; must exist where it is given and the model's folder holds none.
      published: file name of the vocabulary that the model's family was published with, for instance
        "qwen.tiktoken": the only file that is looked for in JAXLLM_ASSETS.
    """
    if model_folder is not None and (file := _vocabulary_in(Path(model_folder))):
        return load_tokenizer(file)
    if path is not None:
        return load_tokenizer(path)
    assets = os.environ.get("JAXLLM_ASSETS")
    if assets and published:
        if not Path(assets).is_dir():
            raise InputError(f"JAXLLM_ASSETS: {assets} is no folder")
        if (Path(assets) / published).exists():
            return load_tokenizer(Path(assets) / published)
    return None


_KNOWN_FILES = f"{tiktoken_bpe.RANKS_FILE} or {tiktoken_bpe.QWEN_FILE}"


def _vocabulary_in(folder: Path) -> Path | None:
    candidates = (folder / name for name in (tiktoken_bpe.RANKS_FILE, tiktoken_bpe.QWEN_FILE))
    return next((file for file in candidates if file.exists()), None)
