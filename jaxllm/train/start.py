"""How a run begins: its folder, its data, and the weights or the checkpoint it starts from."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.reader import CheckpointReader
from jaxllm.checkpoint.run_folder import RunFolder, open_run
from jaxllm.config import RunConfig, diff_configs, dump_config, load_config
from jaxllm.data.shards import remove_partial
from jaxllm.errors import InputError
from jaxllm.files import atomic_file
from jaxllm.sharding.processes import AgreedError, gather, is_main, on_main, together
from jaxllm.spec import spec_from_json, spec_to_json
from jaxllm.tokenizers import load_tokenizer
from jaxllm.train.found_model import Pin
from jaxllm.train.precomputed import compute_reference, needs_reference
from jaxllm.train.records import Records
from jaxllm.train.setup import Setup, open_in_turn
from jaxllm.train.signals import StopSignal, Votes
from jaxllm.train.sources import BatchSource
from jaxllm.train.stages import Evaluator, make_evaluator, make_source
from jaxllm.train.step import init_state
from jaxllm.train.weights import RunWeights, spec_differences
from jaxllm.types import Params, TrainState

# A run may be continued with these changed; everything else decides what is computed. The weights of its beginning are
# compared with those that it began with.
FREE_TO_CHANGE = ("run_dir", "model.weights", "train.steps", "log.*", "mesh.*", "checkpoint.every", "health.*")


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
      frozen: what the step reads beside the state, or None.
      evaluator: None where nothing is held out.
      health: what the watch over the run remembers, or None.
      restored_step: of the checkpoint that the state comes from; None for a new run.
      init_from: where the weights of step 0 came from; None: they were drawn.
      models: which weights were read from which path, see `RunWeights.pins`.
    """

    state: TrainState
    frozen: Params | None
    source: BatchSource
    evaluator: Evaluator | None
    health: dict[str, Any] | None
    restored_step: int | None
    init_from: str | None
    models: dict[str, Pin]


def begin(
    setup: Setup,
    folder: RunFolder,
    manager: CheckpointManager,
    records: Records,
    signals: StopSignal,
    *,
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
    init_from = setup.config.model.weights
    models: dict[str, Pin] = {}
    if newest is None:
        if from_step is not None:
            raise AgreedError(f"{folder.path}: --from-step {from_step}: this run has no checkpoint yet")
        on_main(lambda: _write_model_files(folder, setup))
    else:
        step = newest if from_step is None else from_step
        meta = together(lambda: manager.read_meta(step))
        init_from = together(lambda: _require_same_run(setup, folder, meta))
        models |= meta.get("models", {})
    on_main(lambda: remove_partial(folder.path / "data"))
    opened = open_in_turn(setup, _cache_dir(setup, folder), signals, records.event)
    if opened is None:
        return None
    # An adapter that was trained on is in the checkpoint.
    adapter = setup.config.adapter if newest is None else None
    weights = RunWeights(setup, init_from, setup.tokenizer, None if adapter is None else adapter.weights, models)
    if needs_reference(setup):
        votes, cache = Votes(setup.mesh, signals), _cache_dir(setup, folder)
        logps = together(lambda: compute_reference(setup, opened, weights, cache, votes, records.event))
        if logps is None:
            return None
        opened = opened._replace(reference=logps)
    source = together(lambda: make_source(setup, opened, weights))
    health = None
    if newest is None:
        state, frozen = together(lambda: _fresh(setup, weights))
        if init_from is not None:
            records.event(f"weights from {init_from}{weights.tokenizer_note()}")
    else:
        state, frozen, health = together(lambda: _restore(setup, manager, source, weights, step))
        records.event(f"resuming at step {step}")
    on_main(lambda: records.resume_at(int(state.step)))
    evaluator = make_evaluator(setup, opened, source)
    return Start(state, frozen, source, evaluator, health, None if newest is None else step, init_from, models)


def _fresh(setup: Setup, weights: RunWeights) -> tuple[TrainState, Params | None]:
    objective = setup.objective
    drawn = init_state(
        objective.declarations(), setup.optimizer, setup.mesh, seed=setup.config.seed, initializer=setup.initializer
    )
    params, frozen = objective.place(lambda: drawn.params, weights)
    state = drawn.replace(params=params)
    # Not the same buffers: those of the parameters are donated.
    return (state.replace(reference=jax.tree.map(jnp.copy, params)) if objective.moves_reference else state), frozen


def _restore(
    setup: Setup, manager: CheckpointManager, source: BatchSource, weights: RunWeights, step: int
) -> tuple[TrainState, Params | None, dict[str, Any] | None]:
    state, position, _ = manager.restore(setup.state, step)
    source.restore(position)
    frozen = None if setup.frozen is None else setup.objective.place(lambda: state.params, weights)[1]
    return state, frozen, position.get("health")


def _cache_dir(setup: Setup, folder: RunFolder) -> Path:
    return Path(setup.config.data.cache_dir or folder.path / "data")


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


def _write_model_files(folder: RunFolder, setup: Setup) -> None:
    """Write spec.json and tokenizer/ of a new run."""
    with atomic_file(folder.spec) as file:
        file.write(spec_to_json(setup.spec))
    setup.tokenizer.save(folder.tokenizer)


def _require_same_run(setup: Setup, folder: RunFolder, meta: dict) -> str | None:
    """Check that a checkpoint is of the run that was asked for; return where its first weights came from.

    Raises:
      InputError: the run began with other weights, or its model or tokenizer is not what the config's names mean now.
    """
    name, weights, began_with = setup.config.model.label, setup.config.model.weights, meta.get("init_from")
    if weights not in (None, began_with):
        instead = "leave it out" if began_with is None else "name those"
        raise InputError(
            f"{folder.path}: model.weights: found {weights}, but this folder holds a run that began with "
            f"{began_with or 'random weights'}; use a new folder, or {instead} to resume that run"
        )
    if lines := spec_differences(spec_from_json(meta["spec"], "meta.json"), setup.spec):
        raise InputError(f"{folder.path}: the run's checkpoint is not of what model {name} means now:{lines}")
    if load_tokenizer(folder.tokenizer).fingerprint != setup.tokenizer.fingerprint:
        found, began = setup.config.tokenizer or weights, folder.tokenizer
        raise InputError(
            f"tokenizer: {found} is not the tokenizer that this run began with, a copy of which is {began}"
        )
    return began_with
