"""A published checkpoint in whichever format it comes: its config, and its tensors as they lie on disk."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.tensors import SAFETENSORS, TensorFolder, Tensors
from jaxllm.checkpoint.torch_file import TORCH
from jaxllm.errors import InputError

_GGUF_SUFFIX = ".gguf"


def is_published(path: Path) -> bool:
    """Tell a published checkpoint, a folder with config.json or a .gguf file, from a run folder."""
    return path.suffix == _GGUF_SUFFIX or (path / "config.json").is_file()


def open_published(path: Path) -> tuple[dict[str, Any], Tensors]:
    """Open a published folder (config.json and safetensors or torch's .bin files) or a .gguf file.

    Returns:
      (the raw config, the tensors).

    Raises:
      InputError: neither lies there, or a file of it is faulty.
    """
    path = Path(path)
    if path.suffix == _GGUF_SUFFIX and path.is_file():
        checkpoint = GGUFCheckpoint(path)
        return checkpoint.config, checkpoint
    if not path.is_dir():
        raise InputError(f"{path}: no such folder or {_GGUF_SUFFIX} file")
    return read_config(path), open_tensors(path)


def open_tensors(folder: Path) -> TensorFolder:
    """Open the tensors of a folder: safetensors, or without them torch's .bin files.

    Raises:
      InputError: neither is there, or they are faulty.
    """
    folder = Path(folder)
    for layout in (SAFETENSORS, TORCH):
        if any((folder / name).exists() for name in (layout.index, layout.single)):
            return TensorFolder(folder, layout)
    names = " or ".join(name for layout in (SAFETENSORS, TORCH) for name in (layout.single, layout.index))
    raise InputError(f"{folder}: no tensors; expected {names}")


def common_dtype(dtypes: list[np.dtype]) -> np.dtype:
    """Return the narrowest dtype that holds all floating-point numbers of these dtypes; float32 if there are none."""
    import jax.numpy as jnp  # numpy has no rule for bfloat16 and float16

    floating = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return np.dtype(functools.reduce(jnp.promote_types, floating)) if floating else np.dtype(np.float32)


def read_config(folder: Path) -> dict[str, Any]:
    """Read config.json.

    Raises:
      InputError: it is missing, not JSON, or no object.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: no config.json; expected a published checkpoint folder")
    return read_json(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
      InputError: not JSON, or no object.
    """
    return parse_json(path.read_bytes(), str(path))


def parse_json(content: bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object; InputError, naming `source`, where it is none."""
    try:
        found = json.loads(content, object_pairs_hook=functools.partial(_unrepeated, source))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{source}: not valid JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f"{source}: expected a JSON object, found {type(found).__name__}")
    return found


def _unrepeated(source: str, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise InputError(f"{source}: the key {twice!r} stands there twice")
    return found


def parse_dtype(name: str) -> np.dtype:
    """Return the dtype of a name.

    Raises:
      InputError: not one of float32, bfloat16, float16.
    """
    if name not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype {name!r}: expected float32, bfloat16 or float16")
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
