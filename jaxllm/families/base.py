"""What a family consists of."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from jaxllm.errors import InputError
from jaxllm.families.keymap import Key, Linear
from jaxllm.spec import ModelSpec

Config = dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that ties a published family of checkpoints to a ModelSpec.

    Attributes:
      name: the family's name.
      architectures: values of "architectures" in config.json that mean this family.
      model_types: values of "model_type" that mean it where there is no "architectures".
      matches: a further condition on the config, where families share an architecture's name.
      spec_from_hf: published config to spec; refuses keys it does not know.
      spec_to_hf: spec to a published-style config, for models trained here.
      keys: the checkpoint's tensors for a spec.
      aligned_labels: the reference takes labels at the place whose logits predict them, not one place later.
      optional_prefix: what some published files put before every tensor's name.
      ignorable: tensor-name patterns (regular expressions) that published files carry and the model does not need.
      sizes: published sizes, and sizes of our own that say so in their comment.
      chat: key in `tokenizers.chat.CHAT_FORMATS` of a checkpoint, from its config and its vocabulary's special tokens;
        None for families that do not chat.
      reward_class: what the architecture's name of its published reward models ends with.
      counts_past_prefix: its published code, run by peft, gives the first token the position that follows a prefix; not
        so where it numbers new tokens from 0 whatever is cached.
      tokenizer: key in `tokenizers.published.PUBLISHED` of a checkpoint's vocabulary, from its config: how the files in
        its folder are read, and which file is looked for in JAXLLM_ASSETS where the folder has none.
    """

    name: str
    architectures: tuple[str, ...]
    spec_from_hf: Callable[[Config], ModelSpec]
    spec_to_hf: Callable[[ModelSpec], Config]
    keys: Callable[[ModelSpec], Sequence[Key]]
    sizes: Mapping[str, ModelSpec]
    model_types: tuple[str, ...] = ()
    matches: Callable[[Config], bool] | None = None
    aligned_labels: bool = False
    optional_prefix: str = ""
    ignorable: tuple[str, ...] = ()
    reward_class: str = "ForSequenceClassification"
    counts_past_prefix: bool = True
    chat: Callable[[Config, Collection[str]], str | None] = lambda config, tokens: None
    tokenizer: Callable[[Config], str | None] = lambda config: None

    def accepts(self, config: Config) -> bool:
        """Tell whether a published config is one of this family."""
        architectures = config.get("architectures")
        if architectures:
            named = isinstance(architectures, list) and any(name in self.architectures for name in architectures)
        else:
            named = config.get("model_type") in self.model_types
        return named and (self.matches is None or self.matches(config))

    def to_hf(self, spec: ModelSpec) -> Config:
        """Return a published-style config that means exactly this spec.

        Raises:
          InputError: the layout cannot express it; names the fields.
        """
        config = self.spec_to_hf(spec)
        again = self.spec_from_hf(config)
        if again != spec:
            fields = [field.name for field in dataclasses.fields(spec)]
            lost = [name for name in fields if getattr(again, name) != getattr(spec, name)]
            raise InputError(f"a {self.name} config cannot express this model's {', '.join(lost)}")
        return config


def require_parts(spec: ModelSpec, family: str, **parts: type | tuple[type, ...]) -> None:
    """Raise InputError unless the named fields of a spec have the types that a family's config can express."""
    for name, types in parts.items():
        if not isinstance(getattr(spec, name), types):
            raise InputError(f"a {family} config cannot express {name} {type(getattr(spec, name)).__name__}")


def head_width(hidden_size: int, num_heads: int) -> int:
    """Return the width of a head; raises InputError where the heads do not divide the hidden size."""
    if hidden_size % num_heads:
        raise InputError(
            f"config.json: hidden_size {hidden_size} must be a multiple of num_attention_heads {num_heads}"
        )
    return hidden_size // num_heads


def head_key(spec: ModelSpec, name: str) -> Key:
    """Return the row of the output matrix; tied to the embedding it is a copy that files may or may not carry."""
    if spec.head.tie_word_embeddings:
        return Key(name, ("embedding",), copy=True)
    return Key(name, ("head",), Linear((spec.hidden_size,), (spec.vocab_size,)))


class ConfigReader:
    """Reads a published config key by key and refuses what was not read.

    A key that changes the model but is not understood would load silently as a different model.
    """

    def __init__(self, config: Config, family: str):
        self._config = config
        self._family = family
        self._seen: set[str] = set()

    def get(self, *names: str, default: Any = dataclasses.MISSING) -> Any:
        """Return the value of the first of these spellings that is present.

        Raises:
          InputError: none is present and there is no default, or two are present and differ.
        """
        self._seen.update(names)
        found = {name: self._config[name] for name in names if self._config.get(name) is not None}
        values = list(found.values())
        if any(value != values[0] for value in values):
            raise InputError(f"config.json ({self._family}): {found} contradict each other")
        if found:
            return values[0]
        if default is dataclasses.MISSING:
            raise InputError(f"config.json ({self._family}): missing key {names[0]!r}")
        return default

    def size(self, *names: str, default: Any = dataclasses.MISSING) -> Any:
        """Return a positive integer; otherwise as `get`."""
        return self._checked(_is_positive_integer, "a positive integer", names, default)

    def number(self, *names: str, default: Any = dataclasses.MISSING) -> Any:
        """Return a positive number as a float; otherwise as `get`."""
        value = self._checked(_is_positive_number, "a positive number", names, default)
        return None if value is None else float(value)

    def count(self, *names: str, default: int) -> int:
        """Return an integer of at least 0; otherwise as `get`."""
        return self._checked(_is_count, "an integer of at least 0", names, default)

    def weight(self, *names: str, default: float) -> float:
        """Return a number of at least 0 as a float; otherwise as `get`."""
        return float(self._checked(_is_weight, "a number of at least 0", names, default))

    def flag(self, *names: str, default: bool) -> bool:
        """Return true or false; otherwise as `get`."""
        return self._checked(lambda value: type(value) is bool, "true or false", names, default)

    def table(self, *names: str) -> ConfigReader:
        """Return a reader of an object inside the config; absent or null is an empty one."""
        value = self._checked(lambda value: isinstance(value, dict), "an object", names, {})
        return ConfigReader(value, f"{self._family}, {' or '.join(names)}")

    def _checked(self, valid: Callable[[Any], bool], expected: str, names: tuple[str, ...], default: Any) -> Any:
        value = self.get(*names, default=default)
        if value is not default and not valid(value):
            name = next(name for name in names if self._config.get(name) is not None)
            raise InputError(f"config.json ({self._family}): {name} = {value!r}, expected {expected}")
        return value

    def expect(self, name: str, *values: Any) -> None:
        """Accept a key only with one of these values (or absent): others are variants this family does not build."""
        self._seen.add(name)
        if name in self._config and self._config[name] not in values:
            raise InputError(
                f"config.json ({self._family}): {name} = {self._config[name]!r} is not supported, expected "
                + " or ".join(repr(value) for value in values)
            )

    def ignore(self, *names: str) -> None:
        """Accept keys that do not change the model."""
        self._seen.update(names)

    def finish(self) -> None:
        """Refuse the keys that nobody asked for.

        Raises:
          InputError: names them.
        """
        unknown = sorted(set(self._config) - self._seen)
        if unknown:
            raise InputError(
                f"config.json ({self._family}): unknown keys {unknown}; refusing to guess what they change"
            )


def _is_positive_integer(value: Any) -> bool:
    return type(value) is int and value > 0


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_weight(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < float("inf")


def _is_positive_number(value: Any) -> bool:
    return _is_weight(value) and value > 0


BOOKKEEPING = (
    "architectures",
    "model_type",
    "torch_dtype",
    "dtype",
    "transformers_version",
    "auto_map",
    "use_cache",
    "_name_or_path",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "tokenizer_class",
    "initializer_range",
    "max_length",
    "_from_model_config",
    "attn_implementation",
    "gradient_checkpointing",
)
"""Keys of published configs that do not change the forward pass."""
