"""GGUF files of the llama architecture as published checkpoints: config.json's keys and the tensors' published names.

GGUF orders the rows of q and k for rotation of neighbouring pairs; published `llama` folders for half against half.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.gguf_file import GGUFFile
from jaxllm.errors import InputError
from jaxllm.tokenizers import Tokenizer, tokenizer_from_gguf

_ARCHITECTURE = "llama"
_NEUTRAL = {
    "attention.causal": (True,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "rope.scaling.type": ("none", "linear"),
}
"""Metadata that may be there with these values only."""
_READ = (
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length"),
    *("rope.dimension_count", "rope.freq_base", "rope.scaling.factor", "rope.scale_linear"),
)
_IGNORED = ("tensor_data_layout", "rope.scaling.finetuned", "rope.scaling.original_context_length")
_WHOLE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_IN_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFCheckpoint:
    """A GGUF file as a published llama checkpoint (see `Tensors`).

    Attributes:
      config: what config.json would say. side_files: likewise, generation_config.json.
      metadata: the file's own, tokenizer included.
    """

    def __init__(self, path: Path):
        """Open a file.

        Raises:
          InputError: unreadable; another architecture; metadata or tensors that change the model in unknown ways.
        """
        self.folder = path.parent
        self._path = path
        self._file = GGUFFile(path)
        self.metadata = self._file.metadata
        self._stored_names = {self._published_name(name): name for name in self._file.names()}
        self.files = dict.fromkeys(self._stored_names, path.name)
        self.config = self._config()
        generation = {key: value for key, value in self._special_ids().items() if value is not None}
        self.side_files = {"generation_config.json": (json.dumps(generation, indent=2) + "\n").encode()}

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype that `read` gives: float32 for quantised tensors, else as stored."""
        return self._file.dtype(self._stored_names[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape."""
        return self._file.shape(self._stored_names[name])

    def read(self, name: str) -> np.ndarray:
        """Read one tensor as published."""
        array = self._file.read(self._stored_names[name])
        key = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
        return array if key is None else _half_split_rows(array, self.config[key])

    def tokenizer(self) -> Tokenizer | None:
        """Build the file's tokenizer; None if it has none. InputError where it is of a kind that is not understood."""
        return tokenizer_from_gguf(self.metadata) if "tokenizer.ggml.model" in self.metadata else None

    def _published_name(self, name: str) -> str:
        if name in _WHOLE:
            return _WHOLE[name]
        match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
        if match is None or match[2] not in _IN_LAYER:
            raise InputError(
                f"{self._path}: tensor {name!r:.80} is unknown to {_ARCHITECTURE}; without it the model differs"
            )
        return f"model.layers.{match[1]}.{_IN_LAYER[match[2]]}.{match[3]}"

    def _config(self) -> dict[str, Any]:
        self._refuse_unknown()
        width, heads = self._size("embedding_length"), self._size("attention.head_count")
        head_dim = self._size("attention.key_length", width // heads)
        for key in ("attention.value_length", "rope.dimension_count"):
            if self._size(key, head_dim) != head_dim:
                raise self._wrong(key, f"{head_dim}, the width of a head")
        tokens = self.metadata.get("tokenizer.ggml.tokens")
        special_ids = self._special_ids()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": "model.layers.0.self_attn.q_proj.bias" in self.files,
            "bos_token_id": special_ids["bos_token_id"],
            "eos_token_id": special_ids["eos_token_id"],
            "head_dim": head_dim,
            "hidden_act": "silu",
            "hidden_size": width,
            "intermediate_size": self._size("feed_forward_length"),
            "max_position_embeddings": self._size("context_length"),
            "mlp_bias": "model.layers.0.mlp.up_proj.bias" in self.files,
            "num_attention_heads": heads,
            "num_hidden_layers": self._size("block_count"),
            "num_key_value_heads": self._size("attention.head_count_kv", heads),
            "pad_token_id": special_ids["pad_token_id"],
            "rms_norm_eps": self._number("attention.layer_norm_rms_epsilon"),
            "rope_scaling": self._rope_scaling(),
            "rope_theta": self._number("rope.freq_base", 10_000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.files,
            "torch_dtype": "float32",
            "vocab_size": self._size("vocab_size", len(tokens) if isinstance(tokens, list) else None),
        }

    def _refuse_unknown(self) -> None:
        if (found := self.metadata.get("general.architecture")) != _ARCHITECTURE:
            raise InputError(f"{self._path}: general.architecture = {found!r:.80}, expected {_ARCHITECTURE!r}")
        if (kind := self.metadata.get("general.type", "model")) != "model":
            raise InputError(f"{self._path}: general.type = {kind!r:.80}, expected 'model'")
        if (parts := self.metadata.get("split.count", 0)) not in (0, 1):
            raise InputError(f"{self._path}: one part of a file split into {parts!r:.80}; merge them first")
        for key, value in self.metadata.items():
            own = key.removeprefix(_ARCHITECTURE + ".")
            if own == key or own in _READ or own in _IGNORED:
                continue
            if own not in _NEUTRAL:
                raise InputError(f"{self._path}: unknown metadata {key!r:.80}; refusing to guess what it changes")
            if value not in _NEUTRAL[own]:
                raise self._wrong(own, " or ".join(map(repr, _NEUTRAL[own])))

    def _rope_scaling(self) -> dict[str, Any] | None:
        factor = self._number("rope.scaling.factor", self._number("rope.scale_linear", 1.0))
        if self.metadata.get(f"{_ARCHITECTURE}.rope.scaling.type", "linear") == "none" or factor == 1.0:
            return None
        return {"type": "linear", "factor": factor}

    def _special_ids(self) -> dict[str, Any]:
        def token(name: str) -> int | None:
            key = f"tokenizer.ggml.{name}_token_id"
            value = self.metadata.get(key)
            if value is not None and type(value) is not int:
                raise InputError(f"{self._path}: {key} = {value!r:.80}, expected an integer")
            return value

        stops = [each for each in dict.fromkeys((token("eos"), token("eot"))) if each is not None]
        return {
            "bos_token_id": token("bos"),
            "eos_token_id": stops if len(stops) > 1 else next(iter(stops), None),
            "pad_token_id": token("padding"),
        }

    def _size(self, key: str, default: int | None = None) -> int:
        return self._checked(key, default, lambda value: type(value) is int and value > 0, "a positive integer")

    def _number(self, key: str, default: float | None = None) -> float:
        value = self._checked(key, default, lambda value: type(value) is float and value > 0, "a positive number")
        return float(str(np.float32(value)))  # stored in float32: 9.999999747378752e-06 was 1e-05

    def _checked(self, key: str, default: Any, valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.metadata.get(f"{_ARCHITECTURE}.{key}", default)
        if value is None:
            raise InputError(f"{self._path}: metadata {_ARCHITECTURE}.{key} is missing")
        if not valid(value):
            raise self._wrong(key, expected)
        return value

    def _wrong(self, key: str, expected: str) -> InputError:
        name = f"{_ARCHITECTURE}.{key}"
        return InputError(f"{self._path}: {name} = {self.metadata.get(name)!r:.80}, expected {expected}")


def _half_split_rows(array: np.ndarray, num_heads: int) -> np.ndarray:
    """Reorder rows (or a bias) of each head from neighbouring pairs to halves."""
    if array.shape[0] % (2 * num_heads):
        raise InputError(f"{array.shape[0]} rows are not {num_heads} heads of pairs")
    pairs = array.reshape(num_heads, -1, 2, *array.shape[1:])
    return pairs.swapaxes(1, 2).reshape(array.shape)
