"""What must hold of a run's options beyond their types: bounds, and rules between options."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from jaxllm.config import example_rules, policy_rules
from jaxllm.config.declare import Rule
from jaxllm.config.options import all_options, bounds_name, flatten, pattern
from jaxllm.config.schema import RunConfig
from jaxllm.config.stages import PAIR_STAGES, POLICY_STAGES

_BOUNDS: Mapping[str, Callable[[float, float], bool]] = {
    "ge": lambda number, bound: number >= bound,
    "gt": lambda number, bound: number > bound,
    "le": lambda number, bound: number <= bound,
    "lt": lambda number, bound: number < bound,
}


class Violation(NamedTuple):
    """A broken rule.

    Attributes:
      options: dotted names of the options concerned; the first is the one to blame.
    """

    options: tuple[str, ...]
    message: str

    def __str__(self) -> str:
        return f"{self.options[0]}: {self.message}"


def validate(config: RunConfig) -> list[str]:
    """Return every broken rule as "option: what is wrong"; rules need no files and no devices."""
    return [str(violation) for violation in violations(flatten(config))]


def violations(values: Mapping[str, Any]) -> list[Violation]:
    """Check flattened options; a rule between options is left out where one of them is absent or breaks its bounds."""
    broken = [violation for name, value in values.items() for violation in _check_bounds(name, value)]
    blamed = {violation.options[0] for violation in broken}
    sound = {name: value for name, value in values.items() if name not in blamed}
    for names, check in _RULES:
        if all(name in sound for name in names):
            message = check(*(sound[name] for name in names))
            if message is not None:
                broken.append(Violation(names, message))
    rewards = [Violation(*found) for found in policy_rules.check_rewards(sound)]
    return [*broken, *_check_weights(sound), *rewards]


def _check_bounds(name: str, value: Any) -> Iterator[Violation]:
    if value == "":
        yield Violation((name,), "expected text, found nothing")
    bounds = all_options()[pattern(name)].bounds
    for number in value if isinstance(value, list) else [value]:
        if not isinstance(number, int | float):
            continue
        if not math.isfinite(number):
            yield Violation((name,), f"expected a finite number, found {number}")
        elif not all(_BOUNDS[sign](number, bound) for sign, bound in bounds.items()):
            yield Violation((name,), f"expected {bounds_name(bounds)}, found {number}")


def _check_weights(values: Mapping[str, Any]) -> Iterator[Violation]:
    weights = {name: value for name, value in values.items() if pattern(name) == "data.train.*.weight"}
    if any(weight is not None for weight in weights.values()):
        for name, weight in weights.items():
            if weight is None:
                yield Violation((name,), "missing; expected a weight for every source or for none")


def _divides_batch(divisor: int | None, batch_size: int) -> str | None:
    if divisor is not None and batch_size % divisor:
        return f"expected a divisor of train.batch_size ({batch_size}), found {divisor}"


def _lanes(num_lanes: int | None, batch_size: int) -> str | None:
    if num_lanes is not None and batch_size % num_lanes and num_lanes % batch_size:
        return f"expected a divisor or a multiple of train.batch_size ({batch_size}), found {num_lanes}"


def _divides_ramp(divisor: int | None, start: int, increment: int) -> str | None:
    if divisor is not None and (start % divisor or increment % divisor):
        return f"expected a divisor of train.batch_ramp's start ({start}) and increment ({increment}), found {divisor}"


def _ramp_start(start: int, batch_size: int) -> str | None:
    if start >= batch_size:
        return f"expected less than train.batch_size ({batch_size}), found {start}"


def _ramp_increment(increment: int, start: int, batch_size: int) -> str | None:
    if start < batch_size and (batch_size - start) % increment:
        return f"expected a divisor of train.batch_size - start ({batch_size} - {start}), found {increment}"


def _warmup(warmup: int, total: int | None) -> str | None:
    # A run that is merely shorter than its warm-up is a short trial of a longer one.
    if total is not None and warmup >= total:
        return f"expected less than the schedule.total ({total}), found {warmup}"


def _decay(decay: int | None, kind: str, warmup: int, *run: Any) -> str | None:
    if decay is None:
        return None
    if kind != "wsd":
        return f"only schedule.kind 'wsd' has a decay (found {kind!r}); set it to null"
    total, name = _schedule_length(*run)
    if warmup + decay > total:
        return f"expected at most the {name}, less the warm-up ({warmup}), found {decay}"


def _schedule_length(unit: str, total: int | None, steps: int, batch_size: int, seq_len: int) -> tuple[int, str]:
    """Return the length of the schedule in its unit (at most that, with a batch ramp) and what it is called."""
    if total is not None:
        return total, f"schedule.total ({total})"
    if unit == "steps":
        return steps, f"total, train.steps ({steps})"
    tokens = steps * batch_size * seq_len
    return tokens, f"total, train.steps x train.batch_size x data.seq_len ({tokens})"


_SCHEDULE_LENGTH = ("schedule.unit", "schedule.total", "train.steps", "train.batch_size", "data.seq_len")


def _boundaries(boundaries: list[float], kind: str) -> str | None:
    if kind != "multistep" and boundaries:
        return f"only schedule.kind 'multistep' has boundaries (found {kind!r}); set them to []"
    if kind == "multistep" and not boundaries:
        return "schedule.kind 'multistep' needs at least one, such as [0.8, 0.9]"
    if not all(earlier < later for earlier, later in itertools.pairwise(boundaries)):
        return f"expected rising shares of the total, found {boundaries}"


def _factors(factors: list[float], boundaries: list[float]) -> str | None:
    if len(factors) != len(boundaries):
        return f"expected one for each of the {len(boundaries)} schedule.boundaries, found {len(factors)}"


def _window(window: list[int | None] | None) -> str | None:
    if window == []:
        return "expected an entry for each layer, found none; null is full attention in all layers"


def _scaling_option(name: str) -> Callable[..., str | None]:
    def check(value: Any, kind: str) -> str | None:
        needed, allowed = _SCALING_OPTIONS[kind]
        if value is None and name in needed:
            return f"missing; model.rope.scaling.kind {kind!r} needs it"
        if value is not None and name not in needed + allowed:
            return f"model.rope.scaling.kind {kind!r} has no such option; expected null, found {value!r}"
        return None

    return check


def _yarn_bounds(beta_slow: float | None, beta_fast: float | None) -> str | None:
    if beta_slow is not None and beta_fast is not None and beta_slow >= beta_fast:
        return f"expected less than beta_fast ({beta_fast}), found {beta_slow}"


def _needs_section(section: None, packing: str) -> str | None:
    if packing == "blank_infilling":
        return "missing; data.packing 'blank_infilling' needs it ({} has the defaults)"


def _needs_packing(packing: str, span_prob: float) -> str | None:
    if packing != "blank_infilling":
        return f"expected 'blank_infilling' with the section data.blank_infilling, found {packing!r}"


def _span_shares(span_prob: float, sentence_prob: float) -> str | None:
    if span_prob + sentence_prob > 1:
        return f"expected at most 1 - data.blank_infilling.sentence_prob ({sentence_prob}), found {span_prob}"


def _samples_per_row(samples: int, seq_len: int) -> str | None:
    if seq_len % samples or seq_len // samples < _SHORTEST_SAMPLE:
        return f"expected equal parts of data.seq_len ({seq_len}) of at least {_SHORTEST_SAMPLE} slots, found {samples}"


def _only_for_texts(value: Any, stage: str) -> str | None:
    if stage in (*PAIR_STAGES, *POLICY_STAGES) and value:
        return f"stage {stage!r} has no such loss; found {value}"


def _never_dropped(share: float, capacity_factor: float | None) -> str | None:
    if share and capacity_factor is None:
        return f"expected 0 without train.moe.capacity_factor, found {share}"


def _model_name(name: str | None, weights: str | None) -> str | None:
    if name is None and weights is None:
        return "missing; expected a size from `jaxllm env --models`, a config.json, or model.weights"


def _tokenizer(tokenizer: str | None, weights: str | None) -> str | None:
    if tokenizer is None and weights is None:
        return "missing; expected a folder or file, or model.weights, which has one"


def _train_sources(sources: Any) -> str | None:
    if sources == []:
        return "expected at least one source, found none"


def _eval_every(every: int | None, heldout: Any) -> str | None:
    if every is not None and heldout == []:
        return f"expected null without data.heldout, found {every}"


def _profile_start(start: int, steps: int) -> str | None:
    if start > steps:
        return f"expected at most train.steps ({steps}), found {start}"


# Texts are cut to lengths from 32 on.
_SHORTEST_SAMPLE = 64

_SCALING = "model.rope.scaling"
# Kind: the options that it needs, and those that it may have.
_SCALING_OPTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "none": ((), ()),
    "linear": (("factor",), ()),
    "dynamic": (("factor", "original_length"), ("cached_keys",)),
    "chunked": (("original_length",), ()),
    "yarn": (("factor", "original_length"), ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")),
}
_OF_SOME_KINDS = dict.fromkeys(name for options in _SCALING_OPTIONS.values() for names in options for name in names)

_BLANKS = "data.blank_infilling"

_RAMP = ("train.batch_ramp.start", "train.batch_ramp.increment")

_RULES: tuple[Rule, ...] = (
    (("model.name", "model.weights"), _model_name),
    (("tokenizer", "model.weights"), _tokenizer),
    (("model.window",), _window),
    *(((f"{_SCALING}.{name}", f"{_SCALING}.kind"), _scaling_option(name)) for name in _OF_SOME_KINDS),
    ((f"{_SCALING}.beta_slow", f"{_SCALING}.beta_fast"), _yarn_bounds),
    (("data.train",), _train_sources),
    ((_BLANKS, "data.packing"), _needs_section),
    (("data.packing", f"{_BLANKS}.span_prob"), _needs_packing),
    ((f"{_BLANKS}.span_prob", f"{_BLANKS}.sentence_prob"), _span_shares),
    ((f"{_BLANKS}.samples_per_row", "data.seq_len"), _samples_per_row),
    (("data.num_lanes", "train.batch_size"), _lanes),
    (("data.num_lanes", *_RAMP), _divides_ramp),
    (("train.grad_accum", "train.batch_size"), _divides_batch),
    (("train.batch_ramp.start", "train.batch_size"), _ramp_start),
    (("train.batch_ramp.increment", "train.batch_ramp.start", "train.batch_size"), _ramp_increment),
    (("train.z_loss", "stage"), _only_for_texts),
    (("train.max_z_loss", "stage"), _only_for_texts),
    (("train.embedding_gradient_shrink.start", "stage"), _only_for_texts),
    (("train.moe.never_dropped", "train.moe.capacity_factor"), _never_dropped),
    (("schedule.warmup", "schedule.total"), _warmup),
    (("schedule.decay", "schedule.kind", "schedule.warmup", *_SCHEDULE_LENGTH), _decay),
    (("schedule.boundaries", "schedule.kind"), _boundaries),
    (("schedule.factors", "schedule.boundaries"), _factors),
    (("eval.every", "data.heldout"), _eval_every),
    (("log.profile.start", "train.steps"), _profile_start),
    *example_rules.RULES,
    *policy_rules.RULES,
)
