"""The tokenizer of a checkpoint that loses token ids."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from pathlib import Path

from jaxllm.checkpoint.formats import read_json
from jaxllm.errors import InputError
from jaxllm.families.base import Config
from jaxllm.tokenizers import Tokenizer, find_tokenizer
from jaxllm.tokenizers.sentencepiece_families import ICETK_NUM_IMAGES
from jaxllm.tokenizers.sentencepiece_model import SentencePieceTokenizer
from jaxllm.tokenizers.shrink import keep_ids
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

CHATGLM = "chatglm.model"
"""The published tokenizer whose config says how many ids of images come first."""

_CONFIG = "tokenizer_config.json"
_FILES = {
    *("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "vocab.json"),
    *(_CONFIG, "sentencepiece.json"),
}
_SUFFIXES = (".tiktoken", ".model")


@dataclasses.dataclass(frozen=True)
class SlimTokenizer:
    """What takes the place of a folder's tokenizer files.

    Attributes:
      note: what became of the tokenizer, for the user to read.
      tokenizer: saved in the new folder, or None.
      replaced: names of the files that are not copied.
      jsons: files that are written anew.
    """

    note: str
    tokenizer: Tokenizer | None = None
    replaced: frozenset[str] = frozenset()
    jsons: dict[str, Config] = dataclasses.field(default_factory=dict)


def slim_tokenizer(
    folder: Path, files: Collection[str], published: str | None, kept: Sequence[int], vocab_size: int
) -> SlimTokenizer:
    """Let a tokenizer follow its model.

    Args:
      folder, files: where the tokenizer is looked for, and the names of the files there.
      published: the family's, see `find_tokenizer`.
      kept: the ids that stay, in order, out of `vocab_size`.

    Raises:
      InputError: the tokenizer cannot do without the other ids.
    """
    dropped = _lowest_ids(kept, vocab_size)
    if published == CHATGLM and dropped:
        config = read_json(folder / _CONFIG) if _CONFIG in files else {}
        if dropped == config.get("num_image_tokens", ICETK_NUM_IMAGES):
            note = "the tokenizer is copied; its num_image_tokens is now 0"
            return SlimTokenizer(note, jsons={_CONFIG: config | {"num_image_tokens": 0}})
    tokenizer = find_tokenizer(folder, published=published)
    if tokenizer is None:
        return SlimTokenizer("the folder holds no tokenizer")
    if list(kept[: tokenizer.vocab_size]) == list(range(tokenizer.vocab_size)):
        return SlimTokenizer("the tokenizer is copied as it is: its ids are all kept")
    slim = _without_other_ids(tokenizer, kept, dropped, folder)
    replaced = frozenset(name for name in files if name in _FILES or name.endswith(_SUFFIXES))
    return SlimTokenizer(f"the tokenizer is written anew: its {slim.vocab_size:,} ids are those kept", slim, replaced)


def _without_other_ids(tokenizer: Tokenizer, kept: Sequence[int], dropped: int, folder: Path) -> Tokenizer:
    if isinstance(tokenizer, TiktokenBPE):
        return keep_ids(tokenizer, kept)
    if not isinstance(tokenizer, SentencePieceTokenizer) or not 0 < dropped <= tokenizer.first_id:
        raise InputError(
            f"{folder}: the tokenizer is not byte-level BPE, so only ids after its last and before its first can be "
            "dropped; without its files the model alone can be slimmed"
        )
    return SentencePieceTokenizer(
        tokenizer.content,
        special_tokens={text: token_id - dropped for text, token_id in tokenizer.added_specials.items()},
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        prefix_tokens=tokenizer.prefix_tokens,
        suffix_tokens=tokenizer.suffix_tokens,
        text_of_pieces=tokenizer.text_of_pieces,
        first_id=tokenizer.first_id - dropped,
    )


def _lowest_ids(kept: Sequence[int], vocab_size: int) -> int:
    """Return how many ids are dropped where these are the lowest ones, else 0."""
    num_dropped = vocab_size - len(kept)
    return num_dropped if kept[0] == num_dropped else 0
