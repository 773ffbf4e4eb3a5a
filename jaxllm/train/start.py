"""How a run begins: its folder, its data, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.hf import load_checkpoint, read_config
from jaxllm.checkpoint.reader import CheckpointReader, open_checkpoint
from jaxllm.checkpoint.run_folder import RunFolder, open_run
from jaxllm.config import RunConfig, diff_configs, dump_config, load_config
from jaxllm.data.shards import ShardSet
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.sharding.processes import gather, is_main, on_main, together
from jaxllm.spec import ModelSpec, spec_from_json, spec_to_json
from jaxllm.tokenizers import load_tokenizer
from jaxllm.train.setup import Setup, open_sources
from jaxllm.train.signals import StopRequested, StopSignal
from jaxllm.types import Params

# A run may be continued with these changed; everything else decides what is computed.
FREE_TO_CHANGE = ("run_dir", "train.steps", "log.*", "mesh.*", "checkpoint.every")


@contextlib.contextmanager
def open_run_folder(config: RunConfig) -> Iterator[RunFolder]:
    """Open the run folder, with process 0 as its only writer, until the block ends.

    A new run that is refused before its first step leaves nothing behind.

    Raises:
      InputError: the folder holds another run or other files, or another process writes it.
    """
    folder = RunFolder(config.run_dir)
    existed, is_new = folder.path.is_dir(), not folder.config.is_file()

    def differences(_: str) -> list[str]:
        return diff_configs(load_config([folder.config]), config, ignore=FREE_TO_CHANGE)

    def open_it() -> None:
        nonlocal folder
        folder = open_run(folder.path, config_text=dump_config(config), differences=differences)

    on_main(open_it)
    try:
        yield folder
    except InputError:
        if is_main() and is_new and not _has_begun(folder):
            _empty(folder.path, and_remove=not existed)
        raise
    finally:
        folder.close()


def _has_begun(folder: RunFolder) -> bool:
    recorded = folder.metrics.is_file() and folder.metrics.stat().st_size > 0
    return recorded or CheckpointReader(folder.checkpoints).latest_step() is not None


def _empty(path: Path, *, and_remove: bool) -> None:
    for entry in path.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    if and_remove:
        path.rmdir()


def open_data(
    setup: Setup, folder: RunFolder, signals: StopSignal, note: Callable[[str], None]
) -> tuple[list[ShardSet], list[ShardSet]] | None:
    """Open (training, held-out) sources; process 0 tokenises text, then the others find its copy.

    Returns:
      None if a signal came to one of the processes.

    Raises:
      InputError: bad data, with file and line.
    """
    data = setup.config.data
    cache = Path(data.cache_dir) if data.cache_dir else folder.path / "data"

    def open_mine() -> tuple[list[ShardSet], list[ShardSet]] | None:
        with contextlib.suppress(StopRequested):
            return open_sources(setup, cache, note=note, progress=lambda *counts: signals.check())

    opened = None
    for on_duty in (is_main(), not is_main()):
        opened = together(open_mine if on_duty else lambda: None) or opened
        if any(gather(signals.received is not None)):
            return None
    return opened


def write_model_files(folder: RunFolder, setup: Setup) -> None:
    """Write spec.json and tokenizer/ of a new run."""
    temporary = folder.spec.with_name(folder.spec.name + ".tmp")
    temporary.write_text(spec_to_json(setup.spec))
    temporary.replace(folder.spec)
    setup.tokenizer.save(folder.tokenizer)


def require_same_model(folder: RunFolder, setup: Setup, meta: dict) -> None:
    """Check that a checkpoint's model and tokenizer are still what the config's names mean.

    Args:
      meta: of the checkpoint.

    Raises:
      InputError: says what differs.
    """
    name = setup.config.model.name
    if lines := _spec_differences(spec_from_json(meta["spec"], "meta.json"), setup.spec):
        raise InputError(f"{folder.path}: the run's checkpoint is not of what model.name {name} means now:{lines}")
    if load_tokenizer(folder.tokenizer).fingerprint != setup.tokenizer.fingerprint:
        found, began = setup.config.tokenizer, folder.tokenizer
        raise InputError(
            f"tokenizer: {found} is not the tokenizer that this run began with, a copy of which is {began}"
        )


def load_weights(path: str, setup: Setup) -> Params:
    """Read the parameters of a run, a checkpoint or a published folder onto the mesh.

    Raises:
      InputError: there is none at `path`, or one of another model.
    """
    expected, published = setup.spec, Path(path) / "config.json"
    if published.is_file():
        raw = read_config(Path(path))
        _require_spec(path, family_of_config(raw, str(published)).spec_from_hf(raw), expected)
        return load_checkpoint(Path(path), dtype=np.dtype(np.float32), mesh=setup.mesh)[1]
    reader, step = open_checkpoint(path)
    _require_spec(path, spec_from_json(reader.read_meta(step)["spec"], path), expected)
    return reader.restore_params(setup.state.params, step)


def _require_spec(path: str, found: ModelSpec, expected: ModelSpec) -> None:
    # Windows have no weights, and published configs cannot state them.
    if lines := _spec_differences(dataclasses.replace(found, window=expected.window), expected):
        raise InputError(f"--init-from {path}: weights of another model:{lines}")


def _spec_differences(found: ModelSpec, expected: ModelSpec) -> str:
    pairs = {
        field.name: (getattr(found, field.name), getattr(expected, field.name))
        for field in dataclasses.fields(ModelSpec)
    }
    return "".join(f"\n  {name}: found {a}, expected {b}" for name, (a, b) in pairs.items() if a != b)
