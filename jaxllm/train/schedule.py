"""Learning rate and batch size over a run, as plain float64 functions of a step or token count.

A learning rate belongs to the update that follows `step` finished ones, so the first update of a run with a warm-up
has rate 0. Every schedule takes a number or an array for `step`, counts it in the same unit (steps or tokens) as
`warmup`, `total` and `decay`, and stays at its last value past the end. A warm-up longer than the run is allowed: the
run then ends inside it. (The factor of the embedding's gradient is here too, as a function of a traced step.)
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from jaxllm.config.schema import RunConfig


def linear_ramp(x: npt.ArrayLike, *, start: float, end: float, length: float) -> npt.NDArray[np.float64]:
    """Rise linearly from `start` at x = 0 to `end` at x = `length`, then stay (DeepSeek-V2's batch size,
    arXiv:2405.04434 section 3.1.2)."""
    if length == 0:
        return np.full(np.shape(x), end, np.float64)[()]
    return start + (end - start) * _progress(x, 0, length)


def constant(step: npt.ArrayLike, *, peak: float, warmup: int) -> npt.NDArray[np.float64]:
    """Warm up linearly from 0, then stay at `peak`."""
    return linear_ramp(step, start=0.0, end=peak, length=warmup)


def cosine(step: npt.ArrayLike, *, peak: float, warmup: int, total: int, floor: float) -> npt.NDArray[np.float64]:
    """Warm up, then follow half a cosine wave down to `floor` * `peak` at `total` (arXiv:1608.03983 eq. 5)."""
    wave = 0.5 * (1 + np.cos(np.pi * _progress(step, warmup, total)))
    return constant(step, peak=peak, warmup=warmup) * (floor + (1 - floor) * wave)


def multistep(
    step: npt.ArrayLike,
    *,
    peak: float,
    warmup: int,
    total: int,
    boundaries: Sequence[float],
    factors: Sequence[float],
) -> npt.NDArray[np.float64]:
    """Warm up, then hold `factors[i]` * `peak` from step round(`boundaries[i]` * `total`) on (DeepSeek LLM,
    arXiv:2401.02954 section 2.3: boundaries 0.8, 0.9 and factors 0.316, 0.1)."""
    first_steps = np.array([round(share * total) for share in boundaries])
    stage = np.searchsorted(first_steps, step, side="right")
    return constant(step, peak=peak, warmup=warmup) * np.array([1.0, *factors])[stage]


def wsd(
    step: npt.ArrayLike, *, peak: float, warmup: int, total: int, decay: int, floor: float
) -> npt.NDArray[np.float64]:
    """Warm up, stay at `peak`, and fall linearly to `floor` * `peak` over the last `decay` steps (warm-up, stable,
    decay: arXiv:2404.06395 section 4; the linear fall: arXiv:2405.18392)."""
    fall = 1 - (1 - floor) * _progress(step, total - decay, total)
    return constant(step, peak=peak, warmup=warmup) * fall


def _progress(x: npt.ArrayLike, start: float, end: float) -> npt.NDArray[np.float64]:
    """Share of the way from `start` to `end`, held to 0..1; a way of no length is done once x reaches it."""
    x = np.asarray(x, np.float64)
    if end <= start:
        return (x >= start).astype(np.float64)[()]
    return np.clip((x - start) / (end - start), 0.0, 1.0)


def learning_rate_at(config: RunConfig, *, step: int, tokens: int) -> float:
    """Return the learning rate of the update that follows `step` finished updates and `tokens` trained tokens."""
    schedule, peak = config.schedule, config.optimizer.learning_rate
    x = step if schedule.unit == "steps" else tokens
    total = schedule.total if schedule.total is not None else _run_length(config)
    span = {"peak": peak, "warmup": schedule.warmup}
    match schedule.kind:
        case "constant":
            rate = constant(x, **span)
        case "cosine":
            rate = cosine(x, **span, total=total, floor=schedule.floor)
        case "multistep":
            rate = multistep(x, **span, total=total, boundaries=schedule.boundaries, factors=schedule.factors)
        case "wsd":
            decay = schedule.decay if schedule.decay is not None else total // 10
            rate = wsd(x, **span, total=total, decay=decay, floor=schedule.floor)
    return float(rate)


def _run_length(config: RunConfig) -> int:
    if config.schedule.unit == "steps":
        return config.train.steps
    return BatchSizes(config).tokens_before(config.train.steps)


def embedding_gradient_scale(step: jax.Array, *, start: float, until_step: int, over: int) -> jax.Array:
    """Return the factor of the token embedding's gradient: `start`, rising to 1 in `over` steps from `until_step` on
    (GLM-130B, arXiv:2210.02414 section 3.3; 6000 and 500: its training log).

    Args:
      step: int [], finished updates; traced, for the factor is worked out on the device.

    Returns:
      float32 [].
    """
    risen = jnp.clip((step - until_step) / over, 0, 1)
    return (start + (1 - start) * risen).astype(jnp.float32)


def batch_ramp(consumed_samples: int, *, start: int, increment: int, batch_size: int, ramp_samples: int) -> int:
    """Return the batch size after `consumed_samples` sequences: from `start` up to `batch_size` in equal stages of
    `increment` that together last `ramp_samples` sequences (GLM-130B, arXiv:2210.02414)."""
    stages = (batch_size - start) // increment
    return min(start + increment * (consumed_samples * stages // ramp_samples), batch_size)


@dataclasses.dataclass(frozen=True)
class _Stage:
    first_step: int
    samples: int
    batch_size: int


class BatchSizes:
    """Batch size at each step of a run and the samples and tokens before it, without walking over the steps."""

    def __init__(self, config: RunConfig):
        self._seq_len = config.data.seq_len
        self._stages = list(_stages(config))
        self._first_steps = [stage.first_step for stage in self._stages]

    def at(self, step: int) -> int:
        """Return the sequences in the batch that follows `step` finished steps."""
        return self._stage(step).batch_size

    def samples_before(self, step: int) -> int:
        """Return the sequences seen in the first `step` steps."""
        stage = self._stage(step)
        return stage.samples + (step - stage.first_step) * stage.batch_size

    def tokens_before(self, step: int) -> int:
        """Return the token slots, padding included, seen in the first `step` steps."""
        return self.samples_before(step) * self._seq_len

    def sizes(self) -> list[int]:
        """Return every batch size that occurs, in order: the shapes that the step is compiled for."""
        return [stage.batch_size for stage in self._stages]

    def _stage(self, step: int) -> _Stage:
        return self._stages[bisect.bisect_right(self._first_steps, step) - 1]


def _stages(config: RunConfig) -> Iterator[_Stage]:
    """Yield the stages in order; one that a single step jumps over is left out."""
    full, ramp = config.train.batch_size, config.train.batch_ramp
    if ramp is None:
        yield _Stage(0, 0, full)
        return
    count = (full - ramp.start) // ramp.increment
    step = samples = 0
    size = ramp.start
    while size < full:
        yield _Stage(step, samples, size)
        stage = (size - ramp.start) // ramp.increment
        stage_end = _ceil_div((stage + 1) * ramp.samples, count)
        steps = _ceil_div(stage_end - samples, size)
        step, samples = step + steps, samples + steps * size
        size = batch_ramp(
            samples, start=ramp.start, increment=ramp.increment, batch_size=full, ramp_samples=ramp.samples
        )
    yield _Stage(step, samples, full)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
