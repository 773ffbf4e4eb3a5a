"""Drop token ids from a published checkpoint: rows of the embedding and the head, ids in its configs, the tokenizer.

ChatGLM-6B was slimmed like this: without the first 20,000 ids, which stood for pieces of images, 150,528 rows become
130,528 and every other id is lower by 20,000.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Collection, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.formats import open_tensors, parse_json, read_config
from jaxllm.checkpoint.hf import published_rows, read_side_files
from jaxllm.checkpoint.slim_tokenizer import slim_tokenizer
from jaxllm.checkpoint.tensors import Tensors, safetensors_files, write_tensors
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families.base import Config, Family
from jaxllm.files import new_folder, require_new_folder
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers.files import to_json

VOCABULARY_PARAMETERS = {"embedding", "head"}
"""Parameters with a row, or a column, for each id; published, they have one row each."""

_GENERATION = "generation_config.json"
_SIZES = ("vocab_size", "padded_vocab_size")
_HOLDS_IDS = re.compile(r".*_token_ids?|.*_words_ids|(begin_)?suppress_tokens")


@dataclasses.dataclass(frozen=True)
class SlimSummary:
    """What became of a checkpoint.

    Attributes:
      rows_before, rows_after: number of ids.
      tokenizer: what became of its tokenizer and what is left to do, for the user to read.
    """

    rows_before: int
    rows_after: int
    tokenizer: str


def slim_checkpoint(
    folder: str | PathLike[str],
    output: str | PathLike[str],
    *,
    drop: range | None = None,
    keep: Collection[int] | None = None,
) -> SlimSummary:
    """Write a published folder anew without some of its ids, all or nothing, tensor by tensor.

    The ids that are left keep their order and are numbered anew from 0.

    Args:
      output: a new or empty folder.
      drop: the ids to drop.
      keep: or else the ids to keep.

    Raises:
      InputError: ids out of range; an id that config.json, generation_config.json or the tokenizer needs is dropped;
        a tokenizer whose ids cannot follow; faulty files, as for `load_pretrained`.
    """
    folder, output = Path(folder), Path(output)
    require_new_folder(output)
    config = read_config(folder)
    family = family_of_config(config, str(folder / "config.json"))
    spec = family.spec_from_hf(config)
    kept = _kept_ids(spec.vocab_size, drop, keep)
    tensors = open_tensors(folder)
    vocabulary = _vocabulary_tensors(family, spec, tensors)
    files = read_side_files(folder)
    jsons = {"config.json": config}
    if _GENERATION in files:
        jsons[_GENERATION] = parse_json(files[_GENERATION], str(folder / _GENERATION))
    jsons = {name: _renumbered(content, kept, spec.vocab_size, folder / name) for name, content in jsons.items()}
    slim = slim_tokenizer(folder, files, family.tokenizer(config), kept, spec.vocab_size)
    files = {name: content for name, content in files.items() if name not in slim.replaced}
    files |= {name: to_json(content) for name, content in (jsons | slim.jsons).items()}
    with new_folder(output) as temporary:
        _write_tensors(temporary, tensors, vocabulary, kept)
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        if slim.tokenizer is not None:
            slim.tokenizer.save(temporary)
    return SlimSummary(rows_before=spec.vocab_size, rows_after=len(kept), tokenizer=slim.note)


def _kept_ids(vocab_size: int, drop: range | None, keep: Collection[int] | None) -> list[int]:
    assert (drop is None) != (keep is None), "either the ids to drop or those to keep"
    asked = drop if keep is None else keep
    for token_id in asked:
        if not 0 <= token_id < vocab_size:
            raise InputError(f"token id {token_id}: expected 0 to {vocab_size - 1:,}, the ids of the checkpoint")
    asked = set(asked)
    kept = [token_id for token_id in range(vocab_size) if (token_id in asked) == (drop is None)]
    if len(kept) in (0, vocab_size):
        raise InputError(f"{len(kept):,} of {vocab_size:,} ids would be kept; expected to drop some, and not all")
    return kept


def _vocabulary_tensors(family: Family, spec: ModelSpec, tensors: Tensors) -> set[str]:
    """Name the tensors with a row for each id, after a look at their shapes."""
    rows = published_rows(family, spec, tensors.files)
    names = {name for name, (key, _) in rows.items() if VOCABULARY_PARAMETERS & set(key.paths)}
    for name in names:
        if name not in tensors.files:
            raise InputError(f"{tensors.folder}: the tensor {name!r} is missing")
        if tensors.shape(name)[0] != spec.vocab_size:
            raise InputError(f"{tensors.folder}: {name} has {tensors.shape(name)[0]} rows, expected {spec.vocab_size}")
    return names


def _write_tensors(folder: Path, tensors: Tensors, vocabulary: set[str], kept: Sequence[int]) -> None:
    files = safetensors_files(tensors)
    rows = np.asarray(kept)
    read = ((name, tensors.read(name)) for name in sorted(files, key=lambda name: (files[name], name)))
    write_tensors(folder, ((name, array[rows] if name in vocabulary else array) for name, array in read), files)


def _renumbered(config: Config, kept: Sequence[int], vocab_size: int, path: Path) -> Config:
    """Return a config with its vocabulary sizes and token ids after the cut."""
    new_ids = {token_id: new_id for new_id, token_id in enumerate(kept)}

    def renumber(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [renumber(key, element) for element in value]
        # Published configs say null or -1 for "none".
        if type(value) is not int or value < 0:
            return value
        if value not in new_ids:
            found = "is among the ids to drop" if value < vocab_size else f"is not below vocab_size {vocab_size}"
            raise InputError(f"{path}: {key}: the id {value} {found}")
        return new_ids[value]

    renumbered = {key: renumber(key, value) if _HOLDS_IDS.fullmatch(key) else value for key, value in config.items()}
    # An unpadded size counts the ids below it that are left.
    sizes = {key: bisect.bisect_left(kept, config[key]) for key in _SIZES if type(config.get(key)) is int}
    return renumbered | sizes
