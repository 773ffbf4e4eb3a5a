"""The training loop: one for every stage, resumable at any point."""

from __future__ import annotations

import collections
import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxllm import __version__
from jaxllm.checkpoint.hf import load_checkpoint
from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.reader import open_checkpoint
from jaxllm.checkpoint.run_folder import RunFolder, open_run
from jaxllm.config import RunConfig, diff_configs, dump_config
from jaxllm.config.loader import load_config
from jaxllm.data.loader import Prefetcher, TrainLoader
from jaxllm.data.shards import ShardSet
from jaxllm.errors import EXIT_OK, EXIT_SAVED_AFTER_SIGNAL, InputError
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import MESH_AXES
from jaxllm.spec import spec_to_json
from jaxllm.train.dry_run import show_run
from jaxllm.train.evaluate import evaluate
from jaxllm.train.feed import gather_lane_states
from jaxllm.train.records import Records
from jaxllm.train.schedule import learning_rate_at
from jaxllm.train.setup import Setup, make_loader, make_setup, open_sources
from jaxllm.train.signals import StopSignal
from jaxllm.train.step import abstract_state, init_state, make_eval_step, make_train_step
from jaxllm.types import TrainState

# A run may be continued with these changed; everything else decides what is computed.
FREE_TO_CHANGE = ("train.steps", "log.*", "mesh.*", "checkpoint.every")


class TrainingDivergedError(RuntimeError):
    """The loss or the gradient is not finite any more."""


def train(
    config: RunConfig, *, dry_run: bool = False, init_from: str | None = None, from_step: int | None = None
) -> int:
    """Run, or continue, the training that a configuration describes.

    Args:
      dry_run: compile and show shapes, memory and the first batch; train and write nothing.
      init_from: a run, one of its checkpoints, or a published folder whose weights a new run starts from.
      from_step: continue from the checkpoint of this step in place of the newest.

    Returns:
      EXIT_OK after the last step, EXIT_SAVED_AFTER_SIGNAL after a checkpoint was saved because of SIGTERM or SIGINT.

    Raises:
      InputError: bad configuration, data, checkpoint or run folder, or a full disk.
      TrainingDivergedError: names the step and the documents of its batch; the last checkpoint is untouched.
    """
    with StopSignal() as signals:
        setup = make_setup(config)
        with jax.set_mesh(setup.mesh):
            if dry_run:
                with tempfile.TemporaryDirectory() as scratch:
                    cache = Path(config.data.cache_dir or scratch)
                    return show_run(setup, *open_sources(setup, cache, print))
            folder = _open_run_folder(config)
            try:
                return _Run(setup, folder, signals).start(init_from, from_step)
            finally:
                folder.close()


def _open_run_folder(config: RunConfig) -> RunFolder:
    """Open the run folder on process 0; what it refuses stops all processes."""
    folder, refusal = RunFolder(config.run_dir), None
    if jax.process_index() == 0:
        try:
            folder = open_run(
                config.run_dir, config_text=dump_config(config), differences=lambda text: _differences(text, config)
            )
        except InputError as error:
            refusal = error
    if jax.process_count() > 1 and multihost_utils.broadcast_one_to_all(np.array(refusal is not None)):
        raise refusal or InputError("process 0 refused the run folder")
    if refusal is not None:
        raise refusal
    return folder


def _differences(old_text: str, config: RunConfig) -> list[str]:
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
        file.write(old_text)
        file.flush()
        old = load_config([file.name])
    return diff_configs(dataclasses.replace(old, run_dir=config.run_dir), config, ignore=FREE_TO_CHANGE)


@dataclasses.dataclass
class _InFlight:
    """A step whose metrics have not been read yet."""

    step: int
    metrics: dict[str, jax.Array]
    learning_rate: float
    document_ids: np.ndarray


class _Run:
    """One process's part of a run, from the first step it does to the last."""

    def __init__(self, setup: Setup, folder: RunFolder, signals: StopSignal):
        config = setup.config
        self.setup, self.config, self.folder, self.signals = setup, config, folder, signals
        self.is_main = jax.process_index() == 0
        self.manager = CheckpointManager(
            folder.checkpoints, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every
        )
        self.records = Records(
            folder.path,
            total_steps=config.train.steps,
            speed=setup.speed(),
            is_main=self.is_main,
            tensorboard=config.log.tensorboard,
            log_every=config.log.every,
        )
        self.in_flight: collections.deque[_InFlight] = collections.deque()
        self.saved_step: int | None = None
        self.stop_seen = False
        self.profiling_until: int | None = None

    def start(self, init_from: str | None, from_step: int | None) -> int:
        """Set up or restore the state, and train."""
        try:
            for note in (*self.folder.notes, *self.manager.notes):
                self.records.event(note)
            state, loader, heldout = self._begin(init_from, from_step)
            return self._train(state, loader, heldout)
        finally:
            self.manager.close()
            self.records.close()

    def _begin(self, init_from: str | None, from_step: int | None) -> tuple[TrainState, TrainLoader, list[ShardSet]]:
        setup, data = self.setup, self.config.data
        if self.is_main:
            self._write_model_files()
        cache = Path(data.cache_dir) if data.cache_dir else self.folder.path / "data"
        training, heldout = open_sources(setup, cache, self.records.event)
        loader = make_loader(setup, training)
        abstract = abstract_state(setup.spec, setup.optimizer, setup.mesh)
        if self.manager.latest_step() is not None:
            if init_from is not None:
                raise InputError(f"{self.folder.path}: holds a run that would be resumed; --init-from is for a new one")
            state, lanes, _ = self.manager.restore(abstract, from_step)
            loader.restore({int(lane): position for lane, position in lanes["lanes"].items()})
            self.saved_step = int(state.step)
            self.records.resume_at(self.saved_step)
            self.records.event(f"resuming at step {self.saved_step}")
            return state, loader, heldout
        if from_step is not None:
            raise InputError(f"{self.folder.path}: --from-step {from_step}: this run has no checkpoint yet")
        state = init_state(
            setup.spec, setup.optimizer, setup.mesh, seed=self.config.seed, initializer=setup.initializer
        )
        if init_from is not None:
            state = state.replace(params=_load_weights(init_from, setup))
            self.records.event(f"weights from {init_from}")
        self.records.resume_at(0)
        return state, loader, heldout

    def _write_model_files(self) -> None:
        self.folder.spec.write_text(spec_to_json(self.setup.spec))
        if not self.folder.tokenizer.exists():
            self.setup.tokenizer.save(self.folder.tokenizer)

    def _train(self, state: TrainState, loader: TrainLoader, heldout: list[ShardSet]) -> int:
        config, setup = self.config, self.setup
        step, last = int(state.step), config.train.steps
        if step >= last:
            self.records.event(f"nothing to do: {step} of {last} steps are done")
            return EXIT_OK
        train_step = make_train_step(
            setup.objective, setup.optimizer, state, setup.mesh, grad_accum=config.train.grad_accum
        )
        eval_step = make_eval_step(setup.objective)
        with Prefetcher(loader, setup.batch_sizes.at, start_step=step, depth=config.data.prefetch) as batches:
            while step < last and not self.stop_seen:
                self._profile(step)
                rows = batches.next_batch()
                batch = setup.feed.to_devices(rows, setup.batch_sizes.at(step))
                rate = learning_rate_at(config, step=step, tokens=setup.batch_sizes.tokens_before(step))
                state, metrics = train_step(state, batch, np.float32(rate), self._stop_flags())
                step += 1
                self.in_flight.append(_InFlight(step, metrics, rate, rows["document_ids"]))
                self._read_metrics(loader, keep=1)
                if heldout and config.eval.every and step % config.eval.every == 0 and step < last:
                    self._evaluate(state, eval_step, heldout, loader, step)
                if step % config.checkpoint.every == 0 and step < last:
                    self._save(state, batches, loader, step)
            self._read_metrics(loader, keep=0)
            if step >= last and heldout:
                self._evaluate(state, eval_step, heldout, loader, step)
            self._save(state, batches, loader, step)
        self._profile(None)
        self.manager.wait()
        if step < last:
            self.records.event(f"stopped by {self.signals.received or 'a signal'}: step {step} of {last} is saved")
            return EXIT_SAVED_AFTER_SIGNAL
        self.records.event(f"done: {step} steps; checkpoint in {self.folder.checkpoints / str(step)}")
        return EXIT_OK

    def _stop_flags(self) -> jax.Array | None:
        """Return one flag per device: this process's wish to stop, which the step shares with all processes."""
        if jax.process_count() == 1:
            self.stop_seen = self.signals.received is not None
            return None
        mine = np.full((1,), self.signals.received is not None, np.int32)
        sharding = NamedSharding(self.setup.mesh, PartitionSpec(MESH_AXES))
        return jax.make_array_from_callback((self.setup.mesh.size,), sharding, lambda index: mine)

    def _read_metrics(self, loader: TrainLoader, *, keep: int) -> None:
        """Record the finished steps; the newest `keep` are left alone, so that the host does not wait for them."""
        while len(self.in_flight) > keep:
            done = self.in_flight.popleft()
            metrics = {name: np.asarray(value).item() for name, value in done.metrics.items()}
            if metrics.pop("stop", 0):
                self.stop_seen = True
            if metrics["train_loss"] == metrics["loss"]:
                del metrics["train_loss"]
            if not all(map(math.isfinite, metrics.values())):
                self._diverged(done, metrics, loader)
            tokens = self.setup.batch_sizes.tokens_before(done.step)
            self.records.train_step(done.step, metrics | {"learning_rate": done.learning_rate, "tokens": tokens})

    def _diverged(self, done: _InFlight, metrics: dict[str, float], loader: TrainLoader) -> None:
        documents = loader.describe(done.document_ids)
        shown = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        newest = self.manager.latest_step()
        kept = "there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is untouched"
        message = f"step {done.step} is not finite ({values}); documents in its batch: {shown}; {kept}"
        self.records.event(message)
        raise TrainingDivergedError(message)

    def _evaluate(
        self, state: TrainState, eval_step: Callable, heldout: list[ShardSet], loader: TrainLoader, step: int
    ) -> None:
        self._read_metrics(loader, keep=0)
        # With several processes all must evaluate the same batches, so only a lone one may be cut short.
        stopped = (lambda: self.signals.received is not None) if jax.process_count() == 1 else (lambda: False)
        with self.records.untimed():
            result = evaluate(self.setup, eval_step, state.params, heldout, stopped)
        if result is not None:
            self.records.evaluation(step, result)

    def _save(self, state: TrainState, batches: Prefetcher, loader: TrainLoader, step: int) -> None:
        self._read_metrics(loader, keep=0)
        if step == self.saved_step:
            return
        with self.records.untimed():
            self.records.sync()
            data_state = {"num_lanes": self.setup.feed.num_lanes, "lanes": gather_lane_states(batches.state())}
            self.manager.save(state, data_state=data_state, meta=self._meta(step))
        self.saved_step = step

    def _meta(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": self.setup.batch_sizes.tokens_before(step),
            "config": yaml.safe_load(dump_config(self.config)),
            "spec": spec_to_json(self.setup.spec),
            "processes": jax.process_count(),
            "versions": {"jaxllm": __version__, "jax": jax.__version__},
        }

    def _profile(self, step: int | None) -> None:
        profile = self.config.log.profile
        if profile is None:
            return
        if step == profile.start:
            jax.profiler.start_trace(self.folder.path / "profile")
            self.profiling_until = profile.start + profile.steps
        elif self.profiling_until is not None and (step is None or step >= self.profiling_until):
            jax.profiler.stop_trace()
            self.profiling_until = None


def _load_weights(path: str, setup: Setup) -> Any:
    """Load the parameters of a run, a checkpoint or a published folder onto the mesh."""
    if (Path(path) / "config.json").is_file():
        spec, params, _, _ = load_checkpoint(Path(path), dtype=np.dtype(np.float32), mesh=setup.mesh)
        if dataclasses.replace(spec, window=setup.spec.window) != setup.spec:
            raise InputError(
                f"--init-from {path}: the checkpoint is of another model:\n  {spec}\nexpected\n  {setup.spec}"
            )
        return params
    reader, step = open_checkpoint(path)
    return reader.restore_params(abstract_params(setup.spec, setup.mesh), step)
