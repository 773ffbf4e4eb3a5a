"""Tokenizers: text to ids and back."""

from __future__ import annotations

import os
from os import PathLike
from pathlib import Path

from jaxllm.errors import InputError
from jaxllm.tokenizers import sentencepiece_model, tiktoken_bpe
from jaxllm.tokenizers.base import StreamDecoder, Tokenizer
from jaxllm.tokenizers.gguf_vocabulary import tokenizer_from_gguf
from jaxllm.tokenizers.published import file_names, read_published

__all__ = ["StreamDecoder", "Tokenizer", "find_tokenizer", "load_tokenizer", "tokenizer_from_gguf"]

_OWN_FORMATS = {
    tiktoken_bpe.RANKS_FILE: tiktoken_bpe.load_folder,
    sentencepiece_model.CONFIG_FILE: sentencepiece_model.load_folder,
}


def load_tokenizer(path: str | PathLike[str], *, published: str | None = None) -> Tokenizer:
    """Read a tokenizer from a file, or from a folder that holds one.

    Args:
      path: a file, or a folder with a file of our own formats, else with a published one.
      published: a key of `published.PUBLISHED`, which says whose file a `tokenizer.model` is. Without it a
        sentencepiece model is taken for LLaMA's, a file in tiktoken's format for GLM-4's.

    Raises:
      InputError: nothing lies there, or what lies there is faulty or of a kind that is not understood.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"tokenizer {path}: no such file or folder")
    file = _tokenizer_in(path, published) if path.is_dir() else path
    if file is None:
        names = ", ".join([*_OWN_FORMATS, *file_names(published)])
        raise InputError(f"tokenizer {path}: found none of {names} in the folder")
    if file.name in _OWN_FORMATS:
        return _OWN_FORMATS[file.name](file.parent)
    return read_published(file, published)


def find_tokenizer(
    model_folder: str | PathLike[str] | None = None,
    path: str | PathLike[str] | None = None,
    *,
    published: str | None = None,
    num_rows: int | None = None,
) -> Tokenizer | None:
    """Return the first tokenizer of: the model's folder, `path`, the folder that JAXLLM_ASSETS names; None if none is.

    Args:
      model_folder: a checkpoint or run folder that may hold tokenizer files.
      path: the configured tokenizer; must exist where it is given and the model's folder holds none.
      published: the tokenizer that the model's family was published with, a key of `published.PUBLISHED`; the file of
        that name is the only one that is looked for in JAXLLM_ASSETS.
      num_rows: of the model's embedding. A larger vocabulary is an error in its folder, and not its in JAXLLM_ASSETS.

    Raises:
      InputError: what lies there is faulty, or does not belong to the model.
    """
    if model_folder is not None and (file := _tokenizer_in(Path(model_folder), published)):
        tokenizer = load_tokenizer(file, published=published)
        if num_rows is not None and tokenizer.vocab_size > num_rows:
            raise InputError(f"{file}: has {tokenizer.vocab_size:,} ids, but the model has {num_rows:,} embeddings")
        return tokenizer
    if path is not None:
        return load_tokenizer(path, published=published)
    assets = os.environ.get("JAXLLM_ASSETS")
    if assets and published:
        if not Path(assets).is_dir():
            raise InputError(f"JAXLLM_ASSETS: {assets} is no folder")
        if (Path(assets) / published).exists():
            tokenizer = load_tokenizer(Path(assets) / published, published=published)
            return tokenizer if num_rows is None or tokenizer.vocab_size <= num_rows else None
    return None


def _tokenizer_in(folder: Path, published: str | None) -> Path | None:
    candidates = (folder / name for name in (*_OWN_FORMATS, *file_names(published)))
    return next((file for file in candidates if file.is_file()), None)
