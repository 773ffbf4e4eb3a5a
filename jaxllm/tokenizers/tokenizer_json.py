"""`tokenizer.json` of the tokenizers library, where it holds byte-level BPE: GPT-2, Llama 3, DeepSeek, GLM-4 and kin.

Every field that decides about ids is either understood or refused, by name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import regex

from jaxllm.errors import InputError
from jaxllm.tokenizers import patterns
from jaxllm.tokenizers.byte_level import MergeVocabulary, read_vocabulary
from jaxllm.tokenizers.files import read_json_object
from jaxllm.tokenizers.tiktoken_bpe import TiktokenBPE

_NO_INFLUENCE = ("version", "truncation", "padding")
"""Keys that do not change the ids of a text (transformers sets the last two for each batch)."""


@dataclasses.dataclass(frozen=True)
class Names:
    """Texts of the tokens that the files beside tokenizer.json name, and whether prompts begin with the first.

    Attributes:
      add_bos: None where the file does not say so; then the post-processor decides.
    """

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    add_bos: bool | None = None


def json_tokenizer(path: str | PathLike[str], defaults: Names | None = None) -> TiktokenBPE:
    """Read a tokenizer.json, and the names of begin, end and padding token from the files beside it.

    Those are tokenizer_config.json, else the ids in generation_config.json or config.json, else `defaults`.

    Raises:
      InputError: a file or field that is missing, faulty or not understood.
    """
    path = Path(path)
    content = _Object(read_json_object(path), str(path))
    added = _added_tokens(content.take("added_tokens", []), content.where("added_tokens"))
    post_processor = content.take("post_processor")
    normalization = _normalization(content.take("normalizer"), content.where("normalizer"))
    *first, last = patterns.at_once(_patterns(content.take("pre_tokenizer"), content.where("pre_tokenizer")))
    decoder = content.take("decoder")
    if decoder is not None and _Object(decoder, content.where("decoder")).take("type") != "ByteLevel":
        raise InputError(f"{content.where('decoder')}: found {decoder!r}, expected one of type ByteLevel")
    model = _Object(content.take("model"), content.where("model"))
    content.refuse_others(_NO_INFLUENCE)
    vocabulary = _vocabulary(model, {token["content"]: token["id"] for token in added}, content.where("added_tokens"))
    special = {token["content"]: token["id"] for token in added if token["special"]}
    names = _names(path.parent, {token["id"]: token["content"] for token in added}, defaults or Names())
    prefix, suffix = _template(post_processor, content.where("post_processor"))
    if names.add_bos is not None and names.bos is not None:
        prefix = (names.bos,) if names.add_bos else ()
    named = {names.bos, names.eos, names.pad, *prefix, *suffix}
    special |= {token["content"]: token["id"] for token in added if token["content"] in named}
    try:
        return TiktokenBPE(
            vocabulary.tokens,
            ids=vocabulary.ids,
            decode_only=vocabulary.decode_only,
            absent_bytes=vocabulary.absent_bytes,
            first_patterns=first,
            pattern=last,
            normalization=normalization,
            special_tokens=special,
            added_tokens={token["content"]: token["id"] for token in added if token["content"] not in special},
            raw_tokens=[token["content"] for token in added if not token["normalized"]],
            bos_token=names.bos,
            eos_token=names.eos,
            pad_token=names.pad,
            prefix_tokens=prefix,
            suffix_tokens=suffix,
        )
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


class _Object:
    """A JSON object whose keys are taken one by one, so that those nobody took can be refused."""

    def __init__(self, found: Any, where: str):
        if not isinstance(found, dict):
            raise InputError(f"{where}: found {_shown(found)}, expected an object")
        self._left = dict(found)
        self._where = where

    def take(self, key: str, default: Any = None) -> Any:
        return self._left.pop(key, default)

    def expect(self, key: str, *expected: Any) -> None:
        """Take a key that must have one of some values, the first of which is the default."""
        found = self._left.pop(key, expected[0])
        # In Python 0 == False and 1 == True, in JSON not.
        if not any(found == value and type(found) is type(value) for value in expected):
            wanted = " or ".join(map(_shown, expected))
            raise InputError(f"{self.where(key)}: found {_shown(found)}, expected {wanted}: else is not understood")

    def refuse_others(self, ignored: Sequence[str] = ()) -> None:
        for key, value in self._left.items():
            if key not in ignored:
                raise InputError(f"{self.where(key)}: found {_shown(value)}, but the key is not understood")

    def where(self, key: str) -> str:
        return f"{self._where}: {key}" if self._where.endswith(".json") else f"{self._where}.{key}"


def _added_tokens(found: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(found, list):
        raise InputError(f"{where}: found {_shown(found)}, expected a list")
    tokens = []
    for k, entry in enumerate(found):
        token = _Object(entry, f"{where}[{k}]")
        special = token.take("special", False)
        tokens.append(
            {
                "id": token.take("id"),
                "content": token.take("content"),
                "special": special,
                "normalized": token.take("normalized", not special),
            }
        )
        for key in ("single_word", "lstrip", "rstrip"):
            token.expect(key, False)
        token.refuse_others()
        if type(tokens[-1]["id"]) is not int or not isinstance(tokens[-1]["content"], str):
            raise InputError(f"{where}[{k}]: found {_shown(entry)}, expected an id and its content")
    return tokens


def _normalization(found: Any, where: str) -> Literal["NFC"] | None:
    if found is None:
        return None
    normalizer = _Object(found, where)
    kind = normalizer.take("type")
    if kind == "NFC":
        return "NFC"
    if kind == "Sequence":
        parts = [_normalization(part, f"{where}.normalizers") for part in normalizer.take("normalizers", [])]
        return "NFC" if "NFC" in parts else None
    raise InputError(f"{where}: found the type {kind!r}, expected NFC, a Sequence of it, or null")


def _patterns(found: Any, where: str) -> tuple[str, ...]:
    """Return the patterns of a pre-tokenizer that ends in ByteLevel."""
    step = _Object(found, where)
    kind = step.take("type")
    steps = [(step, kind, where)]
    if kind == "Sequence":
        parts = step.take("pretokenizers", [])
        wheres = [f"{where}.pretokenizers[{k}]" for k in range(len(parts))]
        objects = [_Object(part, at) for part, at in zip(parts, wheres, strict=True)]
        steps = [(part, part.take("type"), at) for part, at in zip(objects, wheres, strict=True)]
    collected: list[str] = []
    for k, (part, part_kind, at) in enumerate(steps):
        if (part_kind == "ByteLevel") != (k == len(steps) - 1):
            raise InputError(f"{at}: found the type {part_kind!r}, expected ByteLevel as the last step and only there")
        collected += _step_patterns(part, part_kind, at)
    if not steps:
        raise InputError(f"{where}: found no steps, expected ByteLevel as the last one")
    # Without any pattern the whole text is one piece.
    return tuple(collected) or (r"[\s\S]+",)


def _step_patterns(step: _Object, kind: Any, where: str) -> list[str]:
    if kind == "ByteLevel":
        step.expect("add_prefix_space", False)
        uses_regex = step.take("use_regex", True)
        step.refuse_others(("trim_offsets",))
        return [patterns.GPT2] if uses_regex else []
    if kind == "Digits":
        individual = step.take("individual_digits", False)
        step.refuse_others()
        return [r"\p{N}" if individual else r"\p{N}+"]
    if kind == "Split":
        step.expect("behavior", "Isolated")
        step.expect("invert", False)
        pattern = _Object(step.take("pattern"), f"{where}.pattern")
        step.refuse_others()
        plain, expression = pattern.take("String"), pattern.take("Regex")
        pattern.refuse_others()
        if isinstance(plain, str) and expression is None:
            return [regex.escape(plain)]
        if isinstance(expression, str) and plain is None:
            return [patterns.portable(expression, f"{where}.pattern.Regex")]
        raise InputError(f"{where}.pattern: expected either a Regex or a String")
    raise InputError(f"{where}: found the type {kind!r}, expected Split, Digits or ByteLevel")


def _vocabulary(model: _Object, fixed: Mapping[str, int], where_fixed: str) -> MergeVocabulary:
    model.expect("type", "BPE")
    model.expect("dropout", None, 0.0)
    model.expect("continuing_subword_prefix", None, "")
    model.expect("end_of_word_suffix", None, "")
    model.expect("byte_fallback", False)
    whole_pieces = model.take("ignore_merges", False)
    vocabulary, merges = model.take("vocab"), model.take("merges")
    # The unknown token stands for characters outside the vocabulary; text that needs an absent byte is refused here.
    model.refuse_others(("unk_token", "fuse_unk"))
    if not isinstance(vocabulary, dict) or not all(type(token_id) is int for token_id in vocabulary.values()):
        raise InputError(f"{model.where('vocab')}: expected an object of token: id")
    for text, token_id in fixed.items():
        if vocabulary.get(text, token_id) != token_id:
            raise InputError(
                f"{where_fixed}: {text!r} has the id {token_id}, expected {vocabulary[text]} as in model.vocab"
            )
    if not isinstance(merges, list):
        raise InputError(f"{model.where('merges')}: found {_shown(merges)}, expected a list")
    pairs = [tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in merges]
    for step, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise InputError(f"{model.where('merges')}[{step}]: found {_shown(merges[step])}, expected two tokens")
    return read_vocabulary(
        vocabulary,
        pairs,
        fixed=fixed.keys(),
        whole_pieces=bool(whole_pieces),
        fields=(model.where("vocab"), model.where("merges")),
    )


def _template(found: Any, where: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the special tokens that a post-processor puts before and after a text."""
    if found is None:
        return (), ()
    processor = _Object(found, where)
    kind = processor.take("type")
    if kind == "ByteLevel":  # It only moves offsets.
        return (), ()
    if kind == "Sequence":
        parts = [_template(part, f"{where}.processors") for part in processor.take("processors", [])]
        if sum(part != ((), ()) for part in parts) > 1:
            raise InputError(f"{where}: found several templates, expected one")
        return max(parts, key=lambda part: part != ((), ()), default=((), ()))
    if kind != "TemplateProcessing":
        raise InputError(f"{where}: found the type {kind!r}, expected ByteLevel, TemplateProcessing or null")
    around: tuple[list[str], list[str]] = ([], [])
    seen_text = False
    for entry in processor.take("single", []):
        if "Sequence" in entry and not seen_text:
            seen_text = True
        elif "SpecialToken" in entry:
            around[seen_text].append(entry["SpecialToken"]["id"])
        else:
            raise InputError(f"{where}.single: found {_shown(entry)}, expected special tokens around one sequence")
    return tuple(around[0]), tuple(around[1])


def _names(folder: Path, added: Mapping[int, str], defaults: Names) -> Names:
    """Read which tokens begin, end and pad a text."""
    path = folder / "tokenizer_config.json"
    if path.is_file():
        config = read_json_object(path)
        texts = {key: _text_of(config.get(f"{key}_token"), f"{path}: {key}_token") for key in ("bos", "eos", "pad")}
        add_bos = config.get("add_bos_token")
        if add_bos not in (None, True, False):
            raise InputError(f"{path}: add_bos_token: found {_shown(add_bos)}, expected true or false")
        return Names(**texts, add_bos=add_bos)
    for name in ("generation_config.json", "config.json"):
        if (folder / name).is_file():
            config = read_json_object(folder / name)
            ids = {key: config.get(f"{key}_token_id") for key in ("bos", "eos", "pad")}
            firsts = {key: found[0] if isinstance(found, list) and found else found for key, found in ids.items()}
            texts = {key: added.get(found) if type(found) is int else None for key, found in firsts.items()}
            if any(texts.values()):
                return Names(**texts)
    return defaults


def _text_of(token: Any, where: str) -> str | None:
    """Return the text of a token that is written as such, or as an object with "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    if text is not None and not isinstance(text, str):
        raise InputError(f"{where}: found {_shown(token)}, expected a text or an object with its content")
    return text


def _shown(found: Any) -> str:
    text = repr(found)
    return text if len(text) <= 120 else f"{text[:117]}..."
