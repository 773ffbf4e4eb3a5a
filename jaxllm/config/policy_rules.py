"""Rules between the options of the stages that learn from sampled answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jaxllm.config.declare import Rule
from jaxllm.config.stages import POLICY_STAGES

_READ_BY_PATTERN = ("exact", "math", "reasoning_gym")


def _needs_rollout(rollout: None, stage: str) -> str | None:
    if stage in POLICY_STAGES:
        return f"missing; stage {stage!r} needs it (prompts, samples, max_new_tokens)"


def _needs_rewards(rewards: list, stage: str) -> str | None:
    if stage in POLICY_STAGES:
        return f"expected at least one, found none; stage {stage!r} learns from nothing else"


def _whole_batches(prompts: int, samples: int, batch_size: int, stage: str) -> str | None:
    if stage in POLICY_STAGES and prompts * samples % batch_size:
        found = f"found {prompts} x {samples}"
        return f"expected prompts x samples to be a multiple of train.batch_size ({batch_size}), {found}"


def _whole_rounds(steps: int, epochs: int, prompts: int, samples: int, batch_size: int, stage: str) -> str | None:
    if stage not in POLICY_STAGES or prompts * samples % batch_size:
        return None
    updates = epochs * prompts * samples // batch_size
    if steps % updates:
        return f"expected a multiple of the {updates} updates of a round, found {steps}"


def _no_ramp(start: int, stage: str) -> str | None:
    if stage in POLICY_STAGES:
        return f"stage {stage!r} has batches of one size; expected train.batch_ramp null"


def _answers_fit(max_new_tokens: int, seq_len: int, stage: str) -> str | None:
    if stage in POLICY_STAGES and max_new_tokens >= seq_len:
        return f"expected less than data.seq_len ({seq_len}), as a prompt comes first, found {max_new_tokens}"


def _groups(samples: int, stage: str) -> str | None:
    if stage == "grpo" and samples < 2:
        return f"stage 'grpo' compares answers to the same prompt; expected at least 2, found {samples}"


def _moving_reference(every: int | None, weights: str | None, kl_coef: float, stage: str) -> str | None:
    if stage != "grpo" or every is None:
        return None
    if weights is not None:
        return "the reference begins as the policy; expected rollout.reference_weights null, or this null"
    if not kl_coef:
        return f"expected null with grpo.kl_coef 0, found {every}"


def _pretrain_texts(weight: float, pretrain: Any) -> str | None:
    if weight and pretrain == []:
        return f"expected 0 without data.pretrain, found {weight}"


def _no_pretrain_texts(path: str, weight: float, stage: str) -> str | None:
    if stage != "ppo" or not weight:
        return "only stage 'ppo' with a ppo.pretrain_weight reads data.pretrain; expected []"


def _only_for_policies(_: Any, stage: str) -> str | None:
    if stage not in POLICY_STAGES:
        return f"only stages 'ppo' and 'grpo' sample answers; expected none with stage {stage!r}"


def _needs_path(path: str | None, kind: str) -> str | None:
    if (kind in ("model", "function")) != (path is not None):
        return "missing; kinds 'model' and 'function' need it" if path is None else f"kind {kind!r} has no path"
    module, _, name = (path or "").partition(":")
    if kind == "function" and not (module and name.isidentifier()):
        return f"expected package.module:function, found {path!r}"


def _needs_pattern(pattern: str | None, kind: str) -> str | None:
    if pattern is None:
        return "missing; kind 'regex' needs it" if kind == "regex" else None
    if kind not in ("regex", *_READ_BY_PATTERN):
        return f"kind {kind!r} has no pattern; expected null, found {pattern!r}"
    import regex  # which most configs do without

    try:
        groups = regex.compile(pattern).groups
    except regex.error as error:
        return f"{pattern!r} is no regular expression: {error}"
    if kind in _READ_BY_PATTERN and not groups:
        return f"{pattern!r} has no group; expected one around the answer, as in 'A: (.*)'"


def _needs_target(target: int | None, kind: str) -> str | None:
    if (kind == "length") != (target is not None):
        return "missing; kind 'length' needs it" if target is None else f"kind {kind!r} has no target"


def _needs_consent(allow_code: bool, kind: str) -> str | None:
    if kind == "code" and not allow_code:
        return (
            "kind 'code' runs what the model wrote on this machine, held back by limits but in no security sandbox; "
            "expected true"
        )


def _only_for_models(system: str | None, kind: str) -> str | None:
    if system is not None and kind != "model":
        return f"only kind 'model' reads a system message; expected null with kind {kind!r}"


_REWARD_RULES: tuple[tuple[str, Callable[[Any, str], str | None]], ...] = (
    ("path", _needs_path),
    ("system", _only_for_models),
    ("pattern", _needs_pattern),
    ("target", _needs_target),
    ("allow_code", _needs_consent),
)
"""An option of a reward, and what says what is wrong with it for a kind."""

RULES: tuple[Rule, ...] = (
    (("rollout", "stage"), _needs_rollout),
    (("rollout.prompts", "stage"), _only_for_policies),
    (("rewards.0.kind", "stage"), _only_for_policies),
    (("rewards", "stage"), _needs_rewards),
    (("rollout.prompts", "rollout.samples", "train.batch_size", "stage"), _whole_batches),
    (
        ("train.steps", "rollout.epochs", "rollout.prompts", "rollout.samples", "train.batch_size", "stage"),
        _whole_rounds,
    ),
    (("train.batch_ramp.start", "stage"), _no_ramp),
    (("rollout.max_new_tokens", "data.seq_len", "stage"), _answers_fit),
    (("rollout.samples", "stage"), _groups),
    (("grpo.reference_every", "rollout.reference_weights", "grpo.kl_coef", "stage"), _moving_reference),
    (("ppo.pretrain_weight", "data.pretrain"), _pretrain_texts),
    (("data.pretrain.0.path", "ppo.pretrain_weight", "stage"), _no_pretrain_texts),
)


def check_rewards(values: Mapping[str, Any]) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield what is wrong with the parts of a reward: their options, and their names, which must differ."""
    names: dict[str, str] = {}
    for option in (name for name in values if name.startswith("rewards.") and name.endswith(".kind")):
        prefix, kind = option.removesuffix("kind"), values[option]
        for name, check in _REWARD_RULES:
            if prefix + name in values and (message := check(values[prefix + name], kind)):
                yield (prefix + name, option), message
        name = values.get(f"{prefix}name") or kind
        if name in names:
            yield (f"{prefix}name",), f"expected another name than that of {names[name]}, found {name!r}"
        names[name] = prefix.removesuffix(".")
    missing = {"safety", "helpfulness"} - set(names)
    if values.get("ppo.combine") == "llama2" and missing:
        yield (
            ("ppo.combine",),
            f"'llama2' needs rewards named safety and helpfulness; found {', '.join(names) or 'none'}",
        )
