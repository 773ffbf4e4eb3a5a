"""How a run begins: its folder, its data, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from jaxllm.checkpoint.formats import is_published, open_published
from jaxllm.checkpoint.hf import load_checkpoint
from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.reader import CheckpointReader, open_checkpoint
from jaxllm.checkpoint.run_folder import RunFolder, open_run
from jaxllm.config import RunConfig, diff_configs, dump_config, load_config
from jaxllm.data.loader import TrainLoader
from jaxllm.data.shards import ShardSet, remove_partial
from jaxllm.errors import InputError
from jaxllm.families import family_of_config
from jaxllm.sharding.processes import AgreedError, gather, is_main, on_main, together
from jaxllm.spec import ModelSpec, spec_from_json, spec_to_json
from jaxllm.tokenizers import load_tokenizer
from jaxllm.train.records import Records
from jaxllm.train.setup import Setup, make_loader, open_sources
from jaxllm.train.signals import StopRequested, StopSignal
from jaxllm.train.spec_changes import change_spec
from jaxllm.train.step import init_state
from jaxllm.types import Params, TrainState

# A run may be continued with these changed; everything else decides what is computed.
FREE_TO_CHANGE = ("run_dir", "train.steps", "log.*", "mesh.*", "checkpoint.every")
_SECONDS_BETWEEN_NOTES = 30.0


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


@dataclasses.dataclass(frozen=True)
class Start:
    """What a run goes on from.

    Attributes:
      restored_step: of the checkpoint that the state comes from; None for a new run.
      init_from: where the weights of step 0 came from; None: they were drawn.
    """

    state: TrainState
    loader: TrainLoader
    heldout: list[ShardSet]
    restored_step: int | None
    init_from: str | None


def begin(
    setup: Setup,
    folder: RunFolder,
    manager: CheckpointManager,
    records: Records,
    signals: StopSignal,
    *,
    init_from: str | None,
    from_step: int | None,
) -> Start | None:
    """Restore the newest checkpoint (or that of `from_step`), or set up a new run.

    Returns:
      None if a signal came to one of the processes meanwhile.

    Raises:
      InputError: bad data, a damaged checkpoint, or one that is not of this run.
    """
    for notes in (folder.notes, manager.notes):
        records.events(notes)
    newest = gather(manager.latest_step())[0]
    weights = None
    if newest is None:
        if from_step is not None:
            raise AgreedError(f"{folder.path}: --from-step {from_step}: this run has no checkpoint yet")
        on_main(lambda: _write_model_files(folder, setup))
        if init_from is not None:
            weights = together(lambda: load_weights(init_from, setup))
    else:
        step = newest if from_step is None else from_step
        init_from = together(lambda: _require_same_run(setup, folder, manager.read_meta(step), init_from))
    opened = _open_data(setup, folder, signals, records.event)
    if opened is None:
        return None
    training, heldout = opened
    loader = together(lambda: make_loader(setup, training))
    if newest is None:
        state = _draw(setup, weights)
        if init_from is not None:
            records.event(f"weights from {init_from}")
    else:
        state = together(lambda: _restore(setup, manager, loader, step))
        records.event(f"resuming at step {step}")
    on_main(lambda: records.resume_at(int(state.step)))
    return Start(state, loader, heldout, None if newest is None else step, init_from)


def _draw(setup: Setup, weights: Params | None) -> TrainState:
    state = init_state(setup.spec, setup.optimizer, setup.mesh, seed=setup.config.seed, initializer=setup.initializer)
    return state if weights is None else state.replace(params=weights)


def _restore(setup: Setup, manager: CheckpointManager, loader: TrainLoader, step: int) -> TrainState:
    state, position, _ = manager.restore(setup.state, step)
    loader.restore({int(lane): where for lane, where in position["lanes"].items()})
    return state


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


def _open_data(
    setup: Setup, folder: RunFolder, signals: StopSignal, note: Callable[[str], None]
) -> tuple[list[ShardSet], list[ShardSet]] | None:
    """Open (training, held-out) sources; process 0 tokenises text, then the others find its copy.

    Returns:
      None if a signal came to one of the processes.

    Raises:
      InputError: bad data, with file and line.
    """
    own_cache = folder.path / "data"
    on_main(lambda: remove_partial(own_cache))
    cache = Path(setup.config.data.cache_dir or own_cache)
    next_note = time.monotonic() + _SECONDS_BETWEEN_NOTES

    def watch(documents: int, tokens: int) -> None:
        nonlocal next_note
        signals.check()
        if time.monotonic() > next_note:
            note(f"tokenizing: {documents:,} documents, {tokens:,} tokens so far")
            next_note = time.monotonic() + _SECONDS_BETWEEN_NOTES

    def open_mine() -> tuple[list[ShardSet], list[ShardSet]] | None:
        with contextlib.suppress(StopRequested):
            return open_sources(setup, cache, note=note, progress=watch)

    opened = None
    for on_duty in (is_main(), not is_main()):
        opened = together(open_mine if on_duty else lambda: None) or opened
        if any(gather(signals.received is not None)):
            return None
    return opened


def _write_model_files(folder: RunFolder, setup: Setup) -> None:
    """Write spec.json and tokenizer/ of a new run."""
    temporary = folder.spec.with_name(folder.spec.name + ".tmp")
    temporary.write_text(spec_to_json(setup.spec))
    temporary.replace(folder.spec)
    setup.tokenizer.save(folder.tokenizer)


def _require_same_run(setup: Setup, folder: RunFolder, meta: dict, init_from: str | None) -> str | None:
    """Check that a checkpoint is of the run that was asked for; return where its first weights came from.

    Raises:
      InputError: the run began with other weights, or its model or tokenizer is not what the config's names mean now.
    """
    name, began_with = setup.config.model.name, meta.get("init_from")
    if init_from not in (None, began_with):
        raise InputError(
            f"{folder.path}: --init-from {init_from}: this folder holds a run that began with "
            f"{began_with or 'random weights'}; use a new folder, or leave it out to resume that run"
        )
    if lines := _spec_differences(spec_from_json(meta["spec"], "meta.json"), setup.spec):
        raise InputError(f"{folder.path}: the run's checkpoint is not of what model.name {name} means now:{lines}")
    if load_tokenizer(folder.tokenizer).fingerprint != setup.tokenizer.fingerprint:
        found, began = setup.config.tokenizer, folder.tokenizer
        raise InputError(
            f"tokenizer: {found} is not the tokenizer that this run began with, a copy of which is {began}"
        )
    return began_with


def load_weights(path: str, setup: Setup) -> Params:
    """Read the parameters of a run, a checkpoint or a published folder onto the mesh.

    Raises:
      InputError: there is none at `path`, or one of another model.
    """
    source = Path(path)
    if is_published(source):
        config, _ = open_published(source)
        _require_spec(path, family_of_config(config, str(source / "config.json")).spec_from_hf(config), setup)
        return load_checkpoint(source, dtype=np.dtype(np.float32), mesh=setup.mesh)[1]
    reader, step = open_checkpoint(path)
    _require_spec(path, spec_from_json(reader.read_meta(step)["spec"], path), setup)
    return reader.restore_params(setup.state.params, step)


def _require_spec(path: str, found: ModelSpec, setup: Setup) -> None:
    # What the run changes has no weights. Nor have windows, which published configs cannot state. Only a model of
    # another structure cannot take the changes, and its differences are told as they are.
    with contextlib.suppress(InputError):
        found = dataclasses.replace(change_spec(found, setup.config.model), window=setup.spec.window)
    if lines := _spec_differences(found, setup.spec):
        raise InputError(f"--init-from {path}: weights of another model:{lines}")


def _spec_differences(found: ModelSpec, expected: ModelSpec) -> str:
    pairs = {
        field.name: (getattr(found, field.name), getattr(expected, field.name))
        for field in dataclasses.fields(ModelSpec)
    }
    return "".join(f"\n  {name}: found {a}, expected {b}" for name, (a, b) in pairs.items() if a != b)
