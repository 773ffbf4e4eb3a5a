"""Published checkpoint folders: config.json and safetensors, in and out."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxllm.checkpoint.formats import open_published
from jaxllm.checkpoint.gguf import GGUFCheckpoint
from jaxllm.checkpoint.tensors import Tensors, safetensors_files, split_into_files, write_tensors
from jaxllm.errors import InputError
from jaxllm.families import family_of_config, family_of_spec
from jaxllm.families.base import Config, Family
from jaxllm.families.keymap import Row, expand, get_path, published_tensor, set_path
from jaxllm.files import new_folder, require_new_folder
from jaxllm.nn.model import abstract_params
from jaxllm.spec import ModelSpec
from jaxllm.tokenizers import Tokenizer
from jaxllm.types import Params

SIDE_FILES = (
    "added_tokens.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
SIDE_SUFFIXES = (".tiktoken", ".model", ".jinja", ".py")


@dataclasses.dataclass(frozen=True)
class Source:
    """What a published folder held beside the parameters, kept so that saving gives it back.

    Attributes:
      dtypes, files: stored dtype and file of each tensor.
      buffers: tensors that the model does not need.
      side_files: contents of the tokenizer, generation and remote-code files, by name.
    """

    dtypes: dict[str, np.dtype]
    files: dict[str, str]
    buffers: dict[str, np.ndarray]
    side_files: dict[str, bytes]


def load_checkpoint(
    folder: Path, *, dtype: jnp.dtype, mesh: Mesh | None = None
) -> tuple[ModelSpec, Params, Config, Source]:
    """Load a published folder or a .gguf file straight onto the devices, tensor by tensor.

    Returns:
      (spec, parameters in `dtype`, raw config, what else the folder held).

    Raises:
      InputError: unknown config keys; missing, unknown or mis-shaped tensors, or tensors of integers, by name.
    """
    folder = Path(folder)
    config, tensors = open_published(folder)
    family = family_of_config(config, str(folder / "config.json"))
    spec = family.spec_from_hf(config)
    rows = published_rows(family, spec, tensors.files)
    loaded, source = read_tensors(tensors, rows, family, abstract_params(spec, mesh, dtype))
    return spec, loaded, config, source


def read_tensors(tensors: Tensors, rows: dict[str, Row], family: Family, params: Params) -> tuple[Params, Source]:
    """Read a checkpoint's tensors straight onto the devices, one by one.

    Args:
      rows: of the tensors, by name. params: tree of jax.ShapeDtypeStruct that the rows fill.

    Raises:
      InputError: missing, unknown or mis-shaped tensors, or tensors of integers, by name.
    """
    ignored = check_names(tensors, rows, family)
    dtypes = {name: tensors.dtype(name) for name in tensors.files}
    for name in rows:
        if not jnp.issubdtype(dtypes[name], jnp.floating):
            file = tensors.folder / tensors.files[name]
            raise InputError(f"{file}: {name} has dtype {dtypes[name]}, expected floats")
    loaded: Params = {}
    for name in sorted(rows, key=lambda name: (rows[name][0].copy, tensors.files[name], name)):
        if rows[name][0].copy:
            _check_copy(name, rows, tensors)
        else:
            _place(loaded, params, rows[name], name, tensors)
    source = Source(
        dtypes=dtypes,
        files=safetensors_files(tensors),
        buffers={name: tensors.read(name) for name in ignored},
        side_files=tensors.side_files if isinstance(tensors, GGUFCheckpoint) else read_side_files(tensors.folder),
    )
    return loaded, source


def published_rows(family: Family, spec: ModelSpec, names: Collection[str] | None = None) -> dict[str, Row]:
    """Return the published tensors of a model, by name.

    Args:
      names: of a checkpoint's tensors. Copies that it does not have are left out, and where it gives its tensors the
        prefix of the class around the model, the rows have it too. None: all tensors, without a prefix.
    """
    if names is not None and spec.num_layers > len(names):
        raise InputError(f"config.json means {spec.num_layers:,} layers, but the checkpoint has {len(names):,} tensors")
    rows = expand(family.keys(spec), spec.num_layers)
    if names is None:
        return rows
    if family.optional_prefix and any(name.startswith(family.optional_prefix) for name in names):
        rows = {family.optional_prefix + name: row for name, row in rows.items()}
    return {name: row for name, row in rows.items() if not row[0].copy or name in names}


def check_names(tensors: Tensors, rows: dict[str, Row], family: Family) -> list[str]:
    """Check that a checkpoint has the tensors of its model; return the names of those that the model does not need.

    Raises:
      InputError: tensors are missing or unknown, by name.
    """
    folder = tensors.folder
    missing = sorted(set(rows) - set(tensors.files))
    if missing:
        raise InputError(f"{folder}: {len(missing)} tensors are missing, first {missing[:5]}")
    extra = sorted(set(tensors.files) - set(rows))
    unknown = [name for name in extra if not any(re.fullmatch(pattern, name) for pattern in family.ignorable)]
    if unknown:
        raise InputError(f"{folder}: {len(unknown)} tensors are unknown to {family.name}, first {unknown[:5]}")
    return extra


def _check_copy(name: str, rows: dict[str, Row], tensors: Tensors) -> None:
    """Refuse a copy that differs from the tensor it is tied to, as the files have them."""
    paths = rows[name][0].paths
    original = next(other for other, (key, _) in rows.items() if key.paths == paths and not key.copy)
    if not np.array_equal(tensors.read(name), tensors.read(original)):
        raise InputError(
            f"{tensors.folder / tensors.files[name]}: {name} differs from {original}, which config.json ties it to "
            "(tie_word_embeddings); expected the same values"
        )


def _place(loaded: Params, params: Params, row: Row, name: str, tensors: Tensors) -> None:
    key, place = row
    try:
        parts = key.op.to_jax(tensors.read(name))
    except InputError as error:
        raise InputError(f"{tensors.folder / tensors.files[name]}: {name}: {error}") from error
    for path, part in zip(key.paths, parts, strict=True):
        target = get_path(params, path)
        expected = target.shape[len(place) :]
        if part.shape != expected:
            file = tensors.folder / tensors.files[name]
            raise InputError(f"{file}: {name} has shape {tensors.shape(name)}; {path} expected {expected}")
        part = part.astype(target.dtype, copy=False)
        if not place:
            set_path(loaded, path, _on_devices(part, target.sharding))
            continue
        try:
            stacked = get_path(loaded, path)
        except KeyError:
            stacked = _zeros(target.shape, target.dtype, target.sharding)
        part = _on_devices(part, _unstacked_sharding(target.sharding, len(place)))
        set_path(loaded, path, _write(stacked, part, place))


def _on_devices(array: np.ndarray, sharding: Any) -> jax.Array:
    if sharding is None:
        return jnp.asarray(array)
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _unstacked_sharding(sharding: NamedSharding | None, num_stacked: int) -> NamedSharding | None:
    return None if sharding is None else NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[num_stacked:]))


def _zeros(shape: tuple[int, ...], dtype: jnp.dtype, sharding: NamedSharding | None) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding)


@functools.partial(jax.jit, donate_argnums=0)
def _write(stacked: jax.Array, part: jax.Array, place: tuple[jax.Array, ...]) -> jax.Array:
    start = (*place, *(0 for _ in part.shape))
    return jax.lax.dynamic_update_slice(stacked, part.reshape((1,) * len(place) + part.shape), start)


def save_checkpoint(
    folder: Path,
    spec: ModelSpec,
    params: Params,
    *,
    config: Config | None = None,
    source: Source | None = None,
    dtype: jnp.dtype | None = None,
    tokenizer: Tokenizer | None = None,
    side_files: Mapping[str, bytes] | None = None,
) -> None:
    """Write a published-style folder, all or nothing.

    Every tensor gets its published name and, unless `dtype` is given, the dtype and file it was loaded from.

    Args:
      config: the raw config the model was loaded with; None writes a fresh one.
      tokenizer: saved beside the model; None where the side files hold the tokenizer's own.
      side_files: contents by name; default: those of `source`.

    Raises:
      InputError: the folder is not empty or cannot be written, or no published layout can express the spec.
    """
    folder = Path(folder)
    require_new_folder(folder)
    family = family_of_spec(spec) if config is None else family_of_config(config)
    if config is None:
        stored = params["embedding"].dtype if dtype is None else np.dtype(dtype)
        config = family.to_hf(spec) | {"torch_dtype": stored.name}
    elif dtype is not None:
        config = config | {"dtype" if "dtype" in config else "torch_dtype": np.dtype(dtype).name}
    rows = published_rows(family, spec, None if source is None else source.files)
    if side_files is None:
        side_files = {} if source is None else source.side_files
    save_rows(
        folder,
        rows,
        params,
        config,
        source=source,
        dtype=dtype,
        side_files=side_files,
        tokenizer=tokenizer,
    )


def save_rows(
    folder: Path,
    rows: dict[str, Row],
    params: Params,
    config: Config,
    *,
    source: Source | None = None,
    dtype: jnp.dtype | None,
    side_files: Mapping[str, bytes],
    tokenizer: Tokenizer | None,
) -> None:
    """Write the tensors that `rows` name as a published folder, all or nothing; otherwise as `save_checkpoint`."""
    files = _files(rows, params, source, dtype)
    with new_folder(folder) as temporary:
        write_tensors(temporary, _published(rows, params, files, source, dtype), files)
        (temporary / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")
        for name, content in side_files.items():
            (temporary / name).write_bytes(content)
        if tokenizer is not None:
            tokenizer.save(temporary)


def holds(dtype: np.dtype, stored: np.dtype) -> bool:
    """Tell whether every number of a stored floating-point dtype has a place in another."""
    return jnp.promote_types(dtype, stored) == dtype


def _published(
    rows: dict[str, Row],
    params: Params,
    files: dict[str, str],
    source: Source | None,
    dtype: jnp.dtype | None,
) -> Iterator[tuple[str, np.ndarray]]:
    buffers = {} if source is None else source.buffers
    for name in sorted(files, key=lambda name: (files[name], name)):
        if name in buffers:
            yield name, buffers[name]
            continue
        array = published_tensor(rows[name], lambda path: get_path(params, path))
        if dtype is not None or source is not None:
            if dtype is None and not holds(array.dtype, source.dtypes[name]):
                raise InputError(
                    f"{name} was stored as {source.dtypes[name]} and loaded as {array.dtype}, which cannot give it "
                    "back as it was; load it as it was stored, or say which dtype to save"
                )
            array = array.astype(source.dtypes[name] if dtype is None else dtype)
        yield name, array


def _files(rows: dict[str, Row], params: Params, source: Source | None, dtype: jnp.dtype | None) -> dict[str, str]:
    if source is not None:
        return source.files
    sizes = {}
    for name, (key, place) in rows.items():
        arrays = [get_path(params, path) for path in key.paths]
        itemsize = np.dtype(arrays[0].dtype if dtype is None else dtype).itemsize
        sizes[name] = sum(math.prod(array.shape[len(place) :]) for array in arrays) * itemsize
    return split_into_files(sizes)


def read_side_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer, generation and remote-code files of a folder, by name."""
    files = (path for path in sorted(folder.iterdir()) if path.name in SIDE_FILES or path.suffix in SIDE_SUFFIXES)
    return {path.name: path.read_bytes() for path in files if path.is_file()}


def has_vocabulary(side_files: Mapping[str, bytes]) -> bool:
    """Tell whether a tokenizer's own files are among these."""
    return any(name.endswith(("tokenizer.json", ".tiktoken", ".model")) for name in side_files)


def published_names(
    spec: ModelSpec, tree: Params, config: Config | None = None, names: Collection[str] | None = None
) -> dict[str, np.ndarray]:
    """Rename a tree shaped like the parameters (gradients, say) to the published tensors it maps to.

    Args:
      names: of the checkpoint that was loaded, see `published_rows`.
    """
    family = family_of_spec(spec) if config is None else family_of_config(config)
    tree = jax.tree.map(np.asarray, tree)
    rows = published_rows(family, spec, names)
    return {
        name: published_tensor(row, lambda path: get_path(tree, path)) for name, row in rows.items() if not row[0].copy
    }
