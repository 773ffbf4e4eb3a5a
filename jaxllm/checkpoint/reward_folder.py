"""Published reward models: a language model's folder with a scalar head in place of the output matrix.

transformers calls them ...ForSequenceClassification with one label, its head score.weight [1, D]; InternLM2's own code
calls its reward model InternLM2ForRewardModel and the head v_head.weight.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxllm.checkpoint.formats import open_published
from jaxllm.checkpoint.hf import Source, published_rows, read_tensors, save_rows
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES, family_of_config, family_of_spec
from jaxllm.families.base import Config
from jaxllm.families.keymap import Key, Linear, Row
from jaxllm.nn import score
from jaxllm.nn.model import abstract_params
from jaxllm.nn.param import abstract_values
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.types import Params

_HEADS = {"ForSequenceClassification": "score.weight", "ForRewardModel": "v_head.weight"}
"""What the architecture's name ends with -> the tensor of the head."""
_LANGUAGE_MODEL = re.compile(r"(?:For[A-Z]\w+|LMHeadModel|Model)$")
_LABEL_KEYS = ("num_labels", "id2label", "label2id", "problem_type", "reward_token_id")
_CODE_KEYS = ("auto_map",)


def is_reward_config(config: Config) -> bool:
    """Tell whether a published config is that of a reward model."""
    return any(_architecture(config).endswith(suffix) for suffix in _HEADS)


def language_model_config(config: Config) -> Config:
    """Return a reward model's config as that of the language model below its head.

    Raises:
      InputError: no such family, or a head with several labels.
    """
    name = _architecture(config)
    stem = name.removesuffix(_suffix(name))
    labels = config.get("num_labels", len(config.get("id2label") or [0]))
    if labels != 1:
        raise InputError(f"config.json: {name} has {labels} labels; expected a reward model, which has one")
    found = [known for family in FAMILIES for known in family.architectures if _stem(known) == stem]
    if not found:
        raise InputError(f"config.json: architectures = [{name!r}] is a reward model of no known family")
    kept = {key: value for key, value in config.items() if key not in _LABEL_KEYS}
    return kept | {"architectures": found[:1]}


def load_reward_folder(
    folder: Path, *, dtype: jnp.dtype, mesh: Mesh | None = None
) -> tuple[ModelSpec, Params, Config, Source]:
    """Load a published reward model; otherwise as `hf.load_checkpoint`.

    Returns:
      (spec, {"model", "score": {"kernel": [D]}} in `dtype`, raw config, what else the folder held).
    """
    config, tensors = open_published(folder)
    plain = language_model_config(config)
    family = family_of_config(plain, str(folder / "config.json"))
    spec = family.spec_from_hf(plain)
    rows = _rows(published_rows(family, spec, tensors.files), spec, _HEADS[_suffix(_architecture(config))])
    params = abstract_params(spec, mesh, dtype) | {"score": abstract_values(score.declarations(spec), mesh, dtype)}
    loaded, source = read_tensors(tensors, rows, family, params)
    return spec, {"score": loaded.pop("score"), "model": loaded}, config, source


def save_reward_folder(
    folder: Path,
    spec: ModelSpec,
    params: Params,
    *,
    config: Config | None,
    dtype: jnp.dtype | None,
    side_files: Mapping[str, bytes],
    tokenizer: Tokenizer | None,
    pad_id: int | None = None,
) -> None:
    """Write a reward model as a published folder, all or nothing.

    Args:
      params: {"model", "score"}.
      config: of the language model below, or of the reward model as it was published; None writes a fresh one.
      dtype: of all tensors; None: as they are.
      tokenizer: saved beside the model; None where the side files hold the tokenizer's own.
      pad_id: what transformers tells padding by, for a fresh config. No answer may end with it.

    Raises:
      InputError: the folder is not empty or cannot be written, or no published layout can express the spec.
    """
    dtype = np.dtype(dtype or params["score"]["kernel"].dtype)
    given = config or family_of_spec(spec).to_hf(spec)
    plain = language_model_config(given) if is_reward_config(given) else given
    family = family_of_config(plain)
    stem = _stem(_architecture(plain))
    if not stem:
        raise InputError(f"a reward model of the family {family.name} has no published layout")
    suffix = family.reward_class
    labels = {"id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0}}
    labels |= {key: given[key] for key in _LABEL_KEYS if key in given}
    pad = {} if pad_id is None else {"pad_token_id": pad_id}
    written = pad | {key: value for key, value in plain.items() if key not in _CODE_KEYS} | labels
    written |= {"architectures": [stem + suffix], "dtype" if "dtype" in plain else "torch_dtype": dtype.name}
    rows = {name: row for name, row in published_rows(family, spec).items() if not row[0].copy}
    tree = params["model"] | {"score": params["score"]}
    side_files = {name: content for name, content in side_files.items() if not name.endswith(".py")}
    save_rows(
        folder,
        _rows(rows, spec, _HEADS[suffix]),
        tree,
        written,
        dtype=dtype,
        side_files=side_files,
        tokenizer=tokenizer,
    )


def _rows(rows: dict[str, Row], spec: ModelSpec, head: str) -> dict[str, Row]:
    """Return a language model's rows with the scalar head in place of the output matrix."""
    kept = {name: row for name, row in rows.items() if row[0].paths != ("head",)}
    return kept | {head: (Key(head, ("score/kernel",), Linear((spec.hidden_size,), ())), ())}


def _architecture(config: Config) -> str:
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and names and isinstance(names[0], str) else ""


def _suffix(name: str) -> str:
    return next(suffix for suffix in _HEADS if name.endswith(suffix))


def _stem(architecture: str) -> str:
    return _LANGUAGE_MODEL.sub("", architecture)
