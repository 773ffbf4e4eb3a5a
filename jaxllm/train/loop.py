"""The training loop: one for every stage, resumable at any point."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

import jax
import numpy as np
import yaml

from jaxllm import __version__
from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.checkpoint.run_folder import RunFolder
from jaxllm.config import RunConfig, dump_config
from jaxllm.errors import (
    EXIT_BAD_INPUT,
    EXIT_FAILURE,
    EXIT_OK,
    EXIT_SAVED_AFTER_SIGNAL,
    InputError,
    TrainingDivergedError,
)
from jaxllm.sharding.processes import (
    AgreedError,
    gather,
    is_main,
    leaving_together,
    on_main,
    require_same_start,
    together,
)
from jaxllm.spec import spec_to_json
from jaxllm.train.dry_run import show_run
from jaxllm.train.health import Health
from jaxllm.train.records import Records
from jaxllm.train.schedule import learning_rate_at
from jaxllm.train.setup import Setup, make_setup
from jaxllm.train.signals import StopSignal, Votes
from jaxllm.train.start import Start, begin, open_run_folder
from jaxllm.types import TrainState

_SHOWN_DOCUMENTS = 8


def train(config: RunConfig, *, dry_run: bool = False, from_step: int | None = None) -> int:
    """Run, or continue, the training that a configuration describes.

    When a run has several processes, every one of them calls this with the same arguments.

    Args:
      dry_run: compile and show shapes, memory and the first batch; train and write nothing.
      from_step: continue from the checkpoint of this step in place of the newest.

    Returns:
      EXIT_OK after the last step, EXIT_SAVED_AFTER_SIGNAL after a checkpoint was saved because of SIGTERM or SIGINT,
      EXIT_BAD_INPUT or EXIT_FAILURE in all processes but the first, which alone raises the error.

    Raises:
      InputError: bad configuration, data, checkpoint or run folder, or a full disk.
      TrainingDivergedError: names the step and the documents of its batch; the last checkpoint is untouched.
    """
    try:
        with leaving_together(TrainingDivergedError), StopSignal() as signals:
            require_same_start([dump_config(config), dry_run, from_step])
            setup = together(lambda: make_setup(config))
            with jax.set_mesh(setup.mesh):
                if dry_run:
                    return show_run(setup)
                with open_run_folder(config) as folder:
                    return _train(setup, folder, signals, from_step)
    except AgreedError:
        if is_main():
            raise
        return EXIT_BAD_INPUT
    except TrainingDivergedError:
        if is_main():
            raise
        return EXIT_FAILURE


def _train(setup: Setup, folder: RunFolder, signals: StopSignal, from_step: int | None) -> int:
    config = setup.config
    with (
        CheckpointManager(
            folder.checkpoints, keep_last=config.checkpoint.keep_last, keep_every=config.checkpoint.keep_every
        ) as manager,
        Records(
            folder.path,
            total_steps=config.train.steps,
            speed=setup.speed(),
            is_main=is_main(),
            tensorboard=config.log.tensorboard,
            log_every=config.log.every,
        ) as records,
    ):
        start = begin(setup, folder, manager, records, signals, from_step=from_step)
        if start is None or any(gather(signals.received is not None)):
            records.event(f"stopped by {signals.received or 'a signal'} before the first step")
            return EXIT_SAVED_AFTER_SIGNAL
        return _Run(setup, folder, signals, manager, records, start).train(start.state)


@dataclasses.dataclass
class _InFlight:
    """A step whose metrics have not been read yet."""

    step: int
    metrics: dict[str, jax.Array | float]
    learning_rate: float
    document_ids: np.ndarray


class _Run:
    """One process's part of a run, from the first step it does to the last."""

    def __init__(
        self,
        setup: Setup,
        folder: RunFolder,
        signals: StopSignal,
        manager: CheckpointManager,
        records: Records,
        start: Start,
    ):
        self.setup, self.config, self.folder, self.signals = setup, setup.config, folder, signals
        self.manager, self.records = manager, records
        self.init_from, self.models = start.init_from, start.models
        self.source, self.evaluator, self.frozen = start.source, start.evaluator, start.frozen
        self.saved_step = start.restored_step
        self.votes = Votes(setup.mesh, signals)
        self.in_flight: collections.deque[_InFlight] = collections.deque()
        self.health = Health.of_run(self.config, setup.objective)
        if start.health is not None:
            self.health.restore(start.health)
        self.unhealthy = False
        self.profiling = False

    def train(self, state: TrainState) -> int:
        """Do the steps that are left."""
        config, setup = self.config, self.setup
        step, last = int(state.step), config.train.steps
        train_step = setup.train_step()
        if step >= last:
            self.records.event(f"{step} of {last} steps are done already")
        if self._evaluation_missing(step):
            self._evaluate(state, step)
        with self.source.running(step, self.votes):
            while not (self.source.may_stop(step) and (step >= last or self._stopping())):
                self._profile(step)
                fed = self.source.next(state, self.frozen, step)
                if fed is None:
                    break
                rate = learning_rate_at(config, step=step, tokens=setup.batch_sizes.tokens_before(step))
                state, metrics = train_step(fed.state, fed.batch, np.float32(rate), self.votes.cast(), self.frozen)
                step += 1
                self.in_flight.append(_InFlight(step, metrics | fed.metrics, rate, fed.document_ids))
                self._read_metrics(keep=1)
                if self._save_due(step):
                    self._save(state, step)
                if self._evaluation_due(step):
                    self._evaluate(state, step)
            self._read_metrics(keep=0)
            self._save(state, step)
        self._profile(None)
        self.manager.wait()
        self.records.events(self.manager.notes)
        if self.unhealthy:
            self.records.event(f"stopped because of the warning above (health.strict): step {step} of {last} is saved")
            return EXIT_FAILURE
        if step < last or self._evaluation_missing(step):
            self.records.event(f"stopped by {self.signals.received or 'a signal'}: step {step} of {last} is saved")
            return EXIT_SAVED_AFTER_SIGNAL
        self.records.event(f"done: {step} steps; checkpoint in {self.folder.checkpoints / str(step)}")
        return EXIT_OK

    def _stopping(self) -> bool:
        return self.votes.stopping or self.unhealthy

    def _save_due(self, step: int) -> bool:
        """Tell whether a checkpoint is due; one that fell between two places to stop is made up for at the next."""
        every = self.config.checkpoint.every
        return self.source.may_stop(step) and step // every > (self.saved_step or 0) // every

    def _evaluation_due(self, step: int) -> bool:
        every, last = self.config.eval.every, self.config.train.steps
        return self.evaluator is not None and step > 0 and (step >= last or (every is not None and step % every == 0))

    def _evaluation_missing(self, step: int) -> bool:
        """Tell whether the evaluation at this step was cut short by a signal or a kill."""
        return self._evaluation_due(step) and not any(gather(self.records.evaluated(step)))

    def _evaluate(self, state: TrainState, step: int) -> None:
        self._read_metrics(keep=0)
        with self.records.untimed():
            result = self.evaluator(state, self.frozen, self.votes)
        if result is not None:
            self._record(self.records.evaluation, step, result)

    def _record(self, write: Callable[[int, Mapping[str, float]], None], step: int, values: dict[str, float]) -> None:
        try:
            write(step, values)
        except InputError as error:
            self.votes.fail(error)

    def _read_metrics(self, *, keep: int) -> None:
        """Record the finished steps; the newest `keep` are left alone, so that the host does not wait for them."""
        while len(self.in_flight) > keep:
            done = self.in_flight.popleft()
            self.votes.count(done.metrics.pop("votes", None))
            metrics = {name: np.asarray(value).item() for name, value in done.metrics.items()}
            if metrics["train_loss"] == metrics["loss"]:
                del metrics["train_loss"]
            tokens = self.setup.batch_sizes.tokens_before(done.step)
            record = metrics | {"learning_rate": done.learning_rate, "tokens": tokens}
            for warning in self.health.observe(done.step, record):
                self.records.event(f"warning: step {done.step}: {warning}")
                self.unhealthy |= self.config.health.strict
            if not all(map(math.isfinite, metrics.values())):
                self._diverged(done, metrics)
            self._record(self.records.train_step, done.step, record)

    def _diverged(self, done: _InFlight, metrics: dict[str, float]) -> NoReturn:
        self.manager.wait()
        documents = sorted(set().union(*gather(self.source.describe(done.document_ids))))
        shown = ", ".join(documents[:_SHOWN_DOCUMENTS])
        rest = len(documents) - _SHOWN_DOCUMENTS
        values = ", ".join(f"{name} {value}" for name, value in metrics.items())
        newest = self.manager.latest_step()
        message = (
            f"step {done.step} is not finite ({values}); documents in its batch: {shown}"
            + (f" and {rest} more; " if rest > 0 else "; ")
            + ("there is no checkpoint yet" if newest is None else f"the checkpoint of step {newest} is untouched")
        )
        self.records.event(message)
        raise TrainingDivergedError(message)

    def _save(self, state: TrainState, step: int) -> None:
        self._read_metrics(keep=0)
        together(self.votes.raise_failure)
        if step == self.saved_step:
            return
        with self.records.untimed():
            on_main(self.records.sync)
            position = self.source.position() | {"health": self.health.state()}
            self.manager.save(state, data_state=position, meta=self._meta(step))
        self.saved_step = step
        self.records.events(self.manager.notes)

    def _meta(self, step: int) -> dict[str, Any]:
        return {
            "step": step,
            "tokens": self.setup.batch_sizes.tokens_before(step),
            "config": yaml.safe_load(dump_config(self.config)),
            "spec": spec_to_json(self.setup.spec),
            "chat_format": self.setup.chat_format,
            "init_from": self.init_from,
            "models": self.models,
            "processes": jax.process_count(),
            "versions": {"jaxllm": __version__, "jax": jax.__version__},
        }

    def _profile(self, step: int | None) -> None:
        """Start or stop the trace before this step; None: no more steps follow."""
        profile = self.config.log.profile
        if profile is not None and step == profile.start:
            jax.profiler.start_trace(self.folder.path / "profile")
            self.profiling = True
        elif self.profiling and (step is None or step == profile.start + profile.steps):
            self._read_metrics(keep=0)
            jax.profiler.stop_trace()
            self.profiling = False
