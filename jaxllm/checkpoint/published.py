"""What a run folder keeps of the published checkpoint that it was imported from, so that export gives it back.

RUN/published/{config.json, tensors.json, buffers.safetensors, tokenizer and generation files}.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from jaxllm.checkpoint.formats import read_config, read_json
from jaxllm.checkpoint.hf import Source, read_side_files
from jaxllm.checkpoint.tensors import DTYPES, SafetensorsFile, write_safetensors
from jaxllm.errors import InputError
from jaxllm.families.base import Config

FOLDER = "published"
_TENSORS = "tensors.json"
_BUFFERS = "buffers.safetensors"
_DTYPE_NAMES = {dtype.name: dtype for dtype in DTYPES.values()}


def write_published(run: Path, config: Config, source: Source) -> None:
    """Write the folder published/ of a run folder."""
    folder = run / FOLDER
    folder.mkdir()
    tensors = {name: {"dtype": source.dtypes[name].name, "file": file} for name, file in source.files.items()}
    for name, content in (("config.json", config), (_TENSORS, tensors)):
        (folder / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    for name, content in source.side_files.items():
        (folder / name).write_bytes(content)
    if source.buffers:
        write_safetensors(folder / _BUFFERS, source.buffers)


def read_published(run: Path) -> tuple[Config, Source] | None:
    """Read it back; None where the run was not imported.

    Raises:
      InputError: a file of it is faulty.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return None
    tensors = read_json(folder / _TENSORS)
    for name, entry in tensors.items():
        dtype, file = (entry.get("dtype"), entry.get("file")) if isinstance(entry, dict) else (None, None)
        is_plain = isinstance(file, str) and os.path.basename(file) == file and file.endswith(".safetensors")
        if dtype not in _DTYPE_NAMES or not is_plain:
            raise InputError(f"{folder / _TENSORS}: {name}: found {entry!r:.80}, expected its dtype and file")
    buffers = SafetensorsFile(folder / _BUFFERS) if (folder / _BUFFERS).exists() else None
    source = Source(
        dtypes={name: _DTYPE_NAMES[entry["dtype"]] for name, entry in tensors.items()},
        files={name: entry["file"] for name, entry in tensors.items()},
        buffers={name: buffers.read(name) for name in buffers.names()} if buffers else {},
        side_files=read_side_files(folder),
    )
    return read_config(folder), source
