"""Tensor-parallel shards of GLM checkpoints (mp_rank_00_model_states.pt ...), merged tensor by tensor.

Which axis each tensor is cut along: tools/convert_tp.py of THUDM/GLM-130B, change_mp.py of THUDM/GLM.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.torch_file import TorchFile
from jaxllm.errors import InputError

_PATTERN = r"mp_rank_(\d+)_model_states\.pt"
_PREFIX = "module."
_CUT_ROWS = r".*(word_embeddings|query_key_value|dense_h_to_4h)\.(weight|bias)"
_CUT_COLUMNS = r".*(attention\.dense|dense_4h_to_h)\.weight"
_GLM130B_HIDDEN, _GLM130B_HEADS = 12288, 96
_GLM_HEAD_DIM = 64

SECTIONS = {"glm130b": {"dense_h_to_4h": 2}, "glm": {"query_key_value": 3}}
"""By family, tensors that lie in equal sections, each of them cut: GLM-130B's up projection and gate; GLM's q, k, v."""


class MegatronShards:
    """The tensors of a folder of shards (see `Tensors`); each is merged when it is read.

    Attributes:
      num_shards: how many there are.
    """

    def __init__(self, folder: Path, family: str):
        """Open all shards.

        Args:
          family: a key of SECTIONS.

        Raises:
          InputError: no shards, one is missing or damaged, or they disagree about their tensors.
        """
        self.folder = Path(folder)
        self._sections: Mapping[str, int] = SECTIONS[family]
        self._paths = _find_shards(self.folder)
        self._shards = [TorchFile(path, _PREFIX) for path in self._paths]
        self.num_shards = len(self._shards)
        self._require_same_tensors()
        self.files = dict.fromkeys(self._shards[0].names(), self._paths[0].name)

    def dtype(self, name: str) -> np.dtype:
        """Return a tensor's dtype."""
        return self._shards[0].dtype(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a merged tensor."""
        shape, axis = list(self._shards[0].shape(name)), _axis(name)
        if axis is not None:
            shape[axis] *= self.num_shards
        return tuple(shape)

    def read(self, name: str) -> np.ndarray:
        """Merge one tensor.

        Raises:
          InputError: the shards hold different copies of a tensor that is not cut.
        """
        parts = [shard.read(name) for shard in self._shards]
        axis = _axis(name)
        if axis is not None:
            sections = [np.split(part, self._num_sections(name)) for part in parts]
            return np.concatenate([part for section in zip(*sections, strict=True) for part in section], axis)
        for part, path in zip(parts, self._paths, strict=True):
            if part.tobytes() != parts[0].tobytes():
                raise InputError(f"{path}: {name} differs from that of {self._paths[0].name}; expected copies")
        return parts[0]

    def _num_sections(self, name: str) -> int:
        return next((count for part, count in self._sections.items() if f".{part}." in name), 1)

    def _require_same_tensors(self) -> None:
        tables = [{name: (each.dtype(name), each.shape(name)) for name in each.names()} for each in self._shards]
        for table, path in zip(tables, self._paths, strict=True):
            if different := sorted(name for name in {*tables[0], *table} if tables[0].get(name) != table.get(name)):
                raise InputError(f"{path}: {different[:5]} are not as in {self._paths[0].name}")
        for name, (_, shape) in tables[0].items():
            if len(shape) <= (_axis(name) or 0) or shape[0] % self._num_sections(name):
                raise InputError(f"{self._paths[0]}: {name} has shape {shape}, which is no shard of such a tensor")


def glm130b_config(shards: MegatronShards, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Write the config.json that GLM-130B was never published with; sizes are read from the tensors.

    Args:
      num_attention_heads: no tensor shows it; default: the published 96 where the hidden size is the published one.

    Raises:
      InputError: a tensor that shows a size is missing, or the number of heads is unknown or does not fit.
    """
    vocab_size, hidden_size = _matrix(shards, "transformer.word_embeddings.weight")
    _, inner_size = _matrix(shards, "transformer.layers.0.mlp.dense_4h_to_h.weight")
    if num_attention_heads is None and hidden_size == _GLM130B_HIDDEN:
        num_attention_heads = _GLM130B_HEADS
    return {
        "model_type": "glm-130b",
        "num_layers": _num_layers(shards),
        "hidden_size": hidden_size,
        "inner_hidden_size": inner_size,
        "vocab_size": vocab_size,
        "num_attention_heads": _checked_heads(shards, num_attention_heads, hidden_size),
        "max_sequence_length": 2048,
        "layernorm_order": "post",
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": False,
        "tie_word_embeddings": True,
        "tokenizer_type": "icetk-glm-130B",
    }


def glm_config(shards: MegatronShards, num_attention_heads: int | None = None) -> dict[str, Any]:
    """Write the config.json of a GLM (110M to 10B) whose original shards have none; sizes are read from the tensors.

    Args:
      num_attention_heads: no tensor shows it; default: heads of 64, as all published sizes have.

    Raises:
      InputError: as `glm130b_config`.
    """
    vocab_size, hidden_size = _matrix(shards, "word_embeddings.weight")
    positions, _ = _matrix(shards, "transformer.position_embeddings.weight")
    if num_attention_heads is None and hidden_size % _GLM_HEAD_DIM == 0:
        num_attention_heads = hidden_size // _GLM_HEAD_DIM
    return {
        "architectures": ["GLMModel"],
        "model_type": "glm",
        "attention_scale": 1.0,
        "block_position_encoding": True,
        "hidden_size": hidden_size,
        "max_sequence_length": positions - 1,
        "num_attention_heads": _checked_heads(shards, num_attention_heads, hidden_size),
        "num_layers": _num_layers(shards),
        "output_predict": True,
        "parallel_output": False,
        "relative_encoding": False,
        "vocab_size": vocab_size,
    }


CONFIGS = {"glm130b": glm130b_config, "glm": glm_config}


def _find_shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    paths = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(_PATTERN, path.name))}
    if not paths:
        raise InputError(f"{folder}: no shards; expected mp_rank_00_model_states.pt and so on")
    if missing := sorted(set(range(max(paths) + 1)) - set(paths)):
        raise InputError(f"{folder}: shards {missing[:5]} are missing, found {len(paths)} up to {max(paths)}")
    return [paths[rank] for rank in sorted(paths)]


def _axis(name: str) -> int | None:
    """Return the axis along which a tensor is cut; None: each shard holds a copy."""
    if re.fullmatch(_CUT_ROWS, name):
        return 0
    return 1 if re.fullmatch(_CUT_COLUMNS, name) else None


def _num_layers(shards: MegatronShards) -> int:
    found = (re.match(r"transformer\.layers\.(\d+)\.", name) for name in shards.files)
    return 1 + max(int(match[1]) for match in found if match)


def _matrix(shards: MegatronShards, name: str) -> tuple[int, int]:
    if name not in shards.files or len(shards.shape(name)) != 2:
        raise InputError(f"{shards.folder}: no matrix {name}, from which the sizes are read")
    rows, columns = shards.shape(name)
    return rows, columns


def _checked_heads(shards: MegatronShards, num_heads: int | None, hidden_size: int) -> int:
    if num_heads is None:
        raise InputError(
            f"{shards.folder}: hidden size {hidden_size} is not a published one, and no tensor shows the number of "
            "heads; give it with --num-attention-heads"
        )
    if hidden_size % num_heads or num_heads % shards.num_shards:
        raise InputError(
            f"{shards.folder}: {num_heads} attention heads do not divide the hidden size {hidden_size}, or do not fall "
            f"evenly to {shards.num_shards} shards"
        )
    return num_heads
