"""What sampling the answers of a round takes, for people and for scripts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxllm.plan.rollouts import Rollouts, SamplingProgram

_GIB = 2**30
_MIB = 2**20


def rollouts_as_dict(rollouts: Rollouts) -> dict[str, Any]:
    """Return it in terms of JSON; sizes in bytes and times in seconds."""
    memory = {name: getattr(rollouts, name) for name in ("resident", "copied", "cache", "rest", "total", "limit")}
    programs = {"gather": rollouts.gather, "prefill": rollouts.prefill, "decode": rollouts.decode}
    return {
        "answers": rollouts.answers,
        "max_new_tokens": rollouts.max_new_tokens,
        "round": dataclasses.asdict(rollouts.round),
        "fits": rollouts.fits,
        "memory": memory | {"exceeded": rollouts.exceeded},
        "round_s": rollouts.round_s,
        "programs": {name: each and dataclasses.asdict(each) for name, each in programs.items()},
    }


def rollouts_as_text(rollouts: Rollouts) -> Iterator[str]:
    """Yield lines for the terminal."""
    shape, passes = rollouts.round, rollouts.round.num_passes
    times = f", {passes} times" if passes > 1 else ""
    yield (
        f"rollouts: {rollouts.answers:,} answers at once{times}, of {rollouts.max_new_tokens:,} tokens at most; "
        f"{shape.prompts:,} prompts of {shape.slots:,}, each read for {shape.samples}"
    )
    parts = {
        "held by training": rollouts.resident,
        "gathered weights": rollouts.copied,
        "cache": rollouts.cache,
        "rest": rollouts.rest,
    }
    verdict = "fits" if rollouts.fits else f"does not fit: {rollouts.exceeded:,} bytes too many"
    listed = ", ".join(f"{name} {size / _GIB:.3f}" for name, size in parts.items() if size)
    yield f"  GiB of a device: {listed}; total {rollouts.total / _GIB:.3f} of {rollouts.limit / _GIB:.2f}: {verdict}"
    if rollouts.round_s is not None:
        yield from _times(rollouts)


def _times(rollouts: Rollouts) -> Iterator[str]:
    gather, prefill, decode = rollouts.gather, rollouts.prefill, rollouts.decode
    tokens = rollouts.answers * rollouts.round.num_passes * rollouts.max_new_tokens
    rate = tokens / rollouts.round_s / rollouts.chips
    yield f"  estimated round of full answers: {rollouts.round_s:.4g} s at most, {rate:,.0f} tokens/s/chip"
    parts = [] if gather is None else [f"gathering weights once {gather.estimate.step_s:.3g} s"]
    parts += [f"reading prompts {prefill.estimate.step_s:.3g} s", _decoding(decode)]
    yield "  " + ", ".join(parts)


def _decoding(decode: SamplingProgram) -> str:
    estimate = decode.estimate
    links = max([0.0, *estimate.link_bytes.values()]) / _MIB
    return (
        f"a token {estimate.step_s:.3g} s, limited by {estimate.binding} (moves {estimate.device_hbm_bytes / _GIB:.2f} "
        f"GiB of memory, {links:,.2f} MiB over the busiest link)"
    )
