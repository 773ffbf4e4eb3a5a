"""Import of checkpoints of all formats, as run folders or as published folders of safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxllm import __version__
from jaxllm.checkpoint.export import with_vocabulary
from jaxllm.checkpoint.formats import open_published
from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.hf import check_names, published_rows, read_side_files
from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.megatron_shards import CONFIGS, MegatronShards
from jaxllm.checkpoint.opened import open_published_model
from jaxllm.checkpoint.published import write_published
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.checkpoint.tensors import Tensors, safetensors_files, write_tensors
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.families.base import Config
from jaxllm.files import new_folder, require_new_folder
from jaxllm.spec import spec_to_json
from jaxllm.tokenizers import Tokenizer
from jaxllm.types import TrainState


def import_run(source: str | Path, output: str | Path) -> int:
    """Write a published folder or a .gguf file as a run folder with a checkpoint of step 0, all or nothing.

    The run keeps the published config, dtypes, files and buffers, so that exporting it gives the source back.

    Returns:
      how many tensors were read.

    Raises:
      InputError: the source is faulty, or `output` is not empty or cannot be written.
    """
    output = Path(output)
    require_new_folder(output)
    opened = open_published_model(Path(source))
    with new_folder(output) as temporary:
        run = RunFolder(temporary)
        run.spec.write_text(spec_to_json(opened.spec))
        if opened.tokenizer is not None:
            opened.tokenizer.save(run.tokenizer)
        write_published(run.path, opened.config, opened.source)
        state = TrainState(step=jnp.int32(0), params=opened.params, opt_state={}, rng=jnp.zeros(2, jnp.uint32))
        meta = {
            "step": 0,
            "spec": spec_to_json(opened.spec),
            "init_from": Path(source).name,
            "versions": {"jaxllm": __version__, "jax": jax.__version__},
        }
        with CheckpointManager(run.checkpoints, keep_last=1, keep_every=None) as manager:
            manager.save(state, data_state={}, meta=meta)
    return len(opened.source.files)


def import_folder(source: str | Path, output: str | Path) -> int:
    """Write a checkpoint of any format as a published folder of safetensors under the same names, all or nothing.

    Returns:
      how many tensors were written.

    Raises:
      InputError: as `import_run`.
    """
    path, output = Path(source), Path(output)
    require_new_folder(output)
    config, tensors = open_published(path)
    if isinstance(tensors, GGUFCheckpoint):
        side_files, tokenizer = with_vocabulary(tensors.side_files, tensors.tokenizer())
    else:
        side_files, tokenizer = read_side_files(path), None
    return _write_folder(output, config, tensors, side_files, tokenizer)


def import_shards(
    source: str | Path, output: str | Path, *, family: str, num_attention_heads: int | None = None
) -> int:
    """Merge the tensor-parallel shards of a GLM into a published folder, all or nothing; memory holds one file of it.

    Args:
      family: "glm130b" or "glm".
      num_attention_heads: where the tensors are not of a published size.

    Returns:
      how many tensors were written.

    Raises:
      InputError: a shard is missing, faulty or of another model, or `output` is not empty or cannot be written.
    """
    path, output = Path(source), Path(output)
    require_new_folder(output)
    if family not in CONFIGS:
        raise InputError(f"--family {family}: shards are merged for {' and '.join(CONFIGS)} only")
    tensors = MegatronShards(path, family)
    config = CONFIGS[family](tensors, num_attention_heads)
    return _write_folder(output, config, tensors, read_side_files(path), None)


def _write_folder(
    output: Path, config: Config, tensors: Tensors, side_files: Mapping[str, bytes], tokenizer: Tokenizer | None
) -> int:
    family = family_of_config(config, str(tensors.folder / "config.json"))
    check_names(tensors, published_rows(family, family.spec_from_hf(config), tensors.files), family)
    files = safetensors_files(tensors)
    names = sorted(files, key=lambda name: (files[name], name))
    with new_folder(output) as temporary:
        write_tensors(temporary, ((name, tensors.read(name)) for name in names), files)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for name, content in side_files.items():
            (temporary / name).write_bytes(content)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return len(names)
