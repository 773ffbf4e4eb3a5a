"""Adapters in peft's format: adapter_model.safetensors and adapter_config.json; prefixes in THUDM's too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxllm.checkpoint.formats import open_tensors, read_json
from jaxllm.checkpoint.peft_prefix import ENCODER, prefix_from_peft, prefix_from_thudm, prefix_to_peft
from jaxllm.checkpoint.peft_read import lora_from_peft
from jaxllm.checkpoint.peft_write import lora_to_peft
from jaxllm.checkpoint.tensors import SafetensorsFile, TensorFile, write_safetensors
from jaxllm.checkpoint.torch_file import TorchFile
from jaxllm.config.alignment import AdapterConfig
from jaxllm.errors import InputError
from jaxllm.families import family_of_spec
from jaxllm.families.base import Family
from jaxllm.files import new_folder
from jaxllm.nn.adapter import Adapter
from jaxllm.spec import ModelSpec

CONFIG_FILE = "adapter_config.json"
_WITH_ENCODER = ("chatglm", "chatglm2")
_FILES = {"adapter_model.safetensors": SafetensorsFile, "adapter_model.bin": TorchFile}


def is_adapter(folder: Path) -> bool:
    """Tell a folder in peft's format."""
    return (folder / CONFIG_FILE).is_file()


def save_adapter(
    folder: Path,
    spec: ModelSpec,
    adapter: Adapter,
    config: AdapterConfig,
    *,
    family: Family | None = None,
    base_model: str | None = None,
) -> None:
    """Write an adapter as peft reads it beside the published form of its model, all or nothing.

    A prefix for ChatGLM-6B, ChatGLM2 or ChatGLM3 is also written as THUDM's PrefixEncoder, in model.safetensors.

    Args:
      adapter: as `train.tuning.Tuning.join` gives it.
      family: whose published layout the model has; None: the first that can express it.
      base_model: name or folder of the published model, for the readers of the file.

    Raises:
      InputError: the folder is not empty; the adapter is of a kind that peft has no format for.
    """
    family = family or family_of_spec(spec)
    if config.kind == "partial":
        raise InputError("adapter.kind: peft's format is for lora and prefix; a partly trained model is exported whole")
    to_peft = lora_to_peft if config.kind == "lora" else prefix_to_peft
    tensors, fields = to_peft(spec, adapter, config, family)
    fields = {
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "task_type": "CAUSAL_LM",
    } | fields
    with new_folder(Path(folder)) as temporary:
        arrays = {name: np.asarray(tensor, np.float32) for name, tensor in sorted(tensors.items())}
        write_safetensors(temporary / "adapter_model.safetensors", arrays)
        if config.kind == "prefix" and family.name in _WITH_ENCODER:
            encoder = {f"{ENCODER}embedding.weight": arrays["prompt_embeddings"]}
            write_safetensors(temporary / "model.safetensors", encoder)
        (temporary / CONFIG_FILE).write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def load_adapter(folder: Path, spec: ModelSpec, *, family: Family | None = None) -> tuple[AdapterConfig, Adapter]:
    """Read an adapter for a model: peft's LoRA or prefix tuning, or the prefix encoder of THUDM's P-tuning.

    Returns:
      (its options, its arrays in float32 as `train/tuning/base` joins them): `make_tuning(spec, options).start(arrays)`
      gives what is trained.

    Raises:
      InputError: it is for another model, or of a kind or with options that are not read here; names them.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; expected a run, or an adapter in peft's format")
    if not is_adapter(folder):
        return _load_thudm(folder, spec)
    path = folder / CONFIG_FILE
    fields = read_json(path)
    readers = {"LORA": lora_from_peft, "PREFIX_TUNING": prefix_from_peft}
    kind = fields.get("peft_type")
    if kind not in readers:
        raise InputError(f"{path}: peft_type = {kind!r}, expected {' or '.join(readers)}")
    try:
        return readers[kind](spec, _read_tensors(folder), fields, family)
    except InputError as error:
        raise InputError(f"{folder}: {error}{_hint(fields)}") from error


def _hint(fields: dict[str, Any]) -> str:
    base = fields.get("base_model_name_or_path")
    return f" ({CONFIG_FILE} says that it is for {base!r})" if base else ""


def _load_thudm(folder: Path, spec: ModelSpec) -> tuple[AdapterConfig, Adapter]:
    tensors = open_tensors(folder)
    names = [name for name in tensors.files if name.startswith(ENCODER)]
    if not names:
        raise InputError(f"{folder}: no {CONFIG_FILE} and no tensors {ENCODER}*; expected an adapter")
    try:
        return prefix_from_thudm(spec, {name: tensors.read(name).astype(np.float32) for name in names})
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
    for name, open_file in _FILES.items():
        if (folder / name).is_file():
            file: TensorFile = open_file(folder / name)
            return {tensor: file.read(tensor).astype(np.float32) for tensor in file.names()}
    raise InputError(f"no {' or '.join(_FILES)}")
