"""docs/scale.md from the rows that plan_scale.py keeps."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from scale_rows import Row, same_options

from jaxllm.config import RunConfig
from jaxllm.files import atomic_file
from jaxllm.nn.model import count_active_params, count_params
from jaxllm.spec import MLA, ModelSpec

Kept = dict[str, Any]
"""A row's JSON: a plan, or with "failed" the reason why there is none."""

ASSUMED = {
    "internlm-104b": "the feed-forward layer (plain, four times as wide), its activation, biases, positions and eps"
}
"""What of a published size is not published, see jaxllm/families."""
_NOT_THE_CONFIG = ("versions", "sources_sha256")
_GIB = 2**30

_INTRODUCTION = """\
# Scale

Every pretraining config on the slice that its header names, and some of post-training, as [`jaxllm plan`](plan.md) sees
them. This page is generated from the files in `docs/scale/` by `scripts/plan_scale.py`; [recipes.md](recipes.md) says
where the recipes come from.

**Fact and estimate.** That a step compiles, the memory it takes on a device and the collectives it has are facts of the
compiler named with each row: it is the one that runs on the machines, and the step is the one that `jaxllm train` would
run. Compile times are facts of a shared machine with two cores. Step time, tokens/s/chip, MFU, the binding limit and
what is waited for are estimates: arithmetic over the compiled schedule with the shares of the peaks that
`jaxllm/plan/estimate.py` assumes. None of these runs has been made.
"""

_COLUMNS = """\
GiB of one device: `state` is parameters and optimizer, `kept` what the forward pass keeps of each layer for the
backward pass, `temporaries` what else lives only within a step, gradients among it; the share is of what a program may
use of the chip. `waits`: the share of the step in which nothing but a collective goes on, and the one that moves most
of what is not hidden. Rows x tokens are those of a step; `/ n`: in n microbatches. Remat `dots` is
`dots_with_no_batch_dims`.
"""

_TUNED = """\
Columns as above; `state` is also what is read and not trained: the weights beside which an adapter stands, a reference.
Times are of an update; MFU is by what the step owes its models: of frozen weights no gradient, of a reference its
forward pass.
"""
_ROLLOUTS = """\
What samples the answers of a round, GiB of one device, with the state of training that lies beside it; reward models
come on top. Times are estimates, at most: every answer of full length, and the whole cache read for every token.
"""


def is_current(plan: Kept, config: RunConfig, request: Kept, ignored: Collection[str] = ()) -> bool:
    """Tell whether a plan is of a configuration and a request, but for what is ignored of the request."""
    asked = all(plan["request"].get(key) == value for key, value in request.items() if key not in ignored)
    return asked and same_options(plan["config"], config)


def write_page(
    path: Path,
    rows: Sequence[Row],
    configs: dict[str, RunConfig],
    requests: dict[str, Kept],
    specs: dict[str, ModelSpec],
) -> None:
    """Write the page.

    Args:
      configs, requests: by the name of a row, what decides it now.
      specs: by the name of a model.
    """
    kept = {row.name: json.loads(row.kept.read_text(encoding="utf-8")) for row in rows if row.kept.exists()}
    old = {name for name, plan in kept.items() if not is_current(plan, configs[name], requests[name], _NOT_THE_CONFIG)}
    lines = [
        _INTRODUCTION,
        *_origin(kept.values()),
        "## Plans",
        _COLUMNS,
        *_plans([row for row in rows if not row.overrides and not row.is_tuned], kept, old),
        "",
        *_tuned([row for row in rows if row.is_tuned], kept, old),
        *_troubles(kept),
        "## Sizes",
        *_sizes(specs),
        "",
        *_comparison([row for row in rows if row.overrides], kept),
    ]
    with atomic_file(path) as file:
        file.write("\n".join(lines).rstrip() + "\n")


def _origin(kept: Collection[Kept]) -> Iterator[str]:
    plans = [each for each in kept if "failed" not in each]
    if not plans:
        return
    dates = sorted(each["date"][:10] for each in plans)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    found = defaultdict(set)
    for each in plans:
        for package, version in each["request"]["versions"].items():
            found[package].add(version)
    versions = ", ".join(f"{package} {' and '.join(sorted(names))}" for package, names in found.items())
    sources = len({each["request"]["sources_sha256"] for each in plans})
    states = "" if sources == 1 else f" The rows come from {sources} states of jaxllm's sources, see their files."
    yield f"Planned {when} with {versions}.{states}\n"


def _plans(rows: Sequence[Row], kept: dict[str, Kept], old: set[str]) -> Iterator[str]:
    yield _line(
        "config", "params", "slice", "mesh", "rows x tokens", "remat", "state", "kept", "temporaries", "total",
        "compile, s", "step, s", "tokens/s/chip", "MFU", "binding", "waits", "date",
    )  # fmt: skip
    yield _line(*["---"] * 4, *["---:"] * 10, *["---"] * 3)
    for row in rows:
        name = f"`{row.name}` (as it was before its config changed)" if row.name in old else f"`{row.name}`"
        yield _line(name, *_cells(row, kept.get(row.name)))


def _tuned(rows: Sequence[Row], kept: dict[str, Kept], old: set[str]) -> Iterator[str]:
    if not rows:
        return
    yield "## Post-training"
    yield _TUNED
    yield from _plans(rows, kept, old)
    yield ""
    yield from _rollouts({row.name: plan for row in rows if (plan := kept.get(row.name, {})).get("rollouts")})


def _rollouts(plans: dict[str, Kept]) -> Iterator[str]:
    """Yield the table of what samples answers."""
    if not plans:
        return
    yield _ROLLOUTS
    yield _line(
        "config", "answers at once", "of tokens", "held by training", "gathered weights", "cache", "total",
        "gathering, s", "prompts, s", "a token, s", "a round, s", "compile, s",
    )  # fmt: skip
    yield _line("---", *["---:"] * 11)
    for name, plan in plans.items():
        rollouts = plan["rollouts"]
        memory, programs = rollouts["memory"], rollouts["programs"]
        passes = f" x {rollouts['round']['num_passes']}" if rollouts["round"]["num_passes"] > 1 else ""
        total = f"{memory['total'] / _GIB:.1f} ({memory['total'] / memory['limit']:.0%})"
        seconds = [each and each["estimate"] and each["estimate"]["step_s"] for each in programs.values()]
        yield _line(
            f"`{name}`",
            f"{rollouts['answers']:,}{passes}",
            f"{rollouts['max_new_tokens']:,}",
            *(f"{memory[part] / _GIB:.1f}" for part in ("resident", "copied", "cache")),
            total + ("" if rollouts["fits"] else " **does not fit**"),
            *("" if each is None else f"{each:.3g}" for each in seconds),
            "" if rollouts["round_s"] is None else f"{rollouts['round_s']:.1f}",
            f"{sum(each['seconds_to_compile'] for each in programs.values() if each):.0f}",
        )
    yield ""


def _cells(row: Row, plan: Kept | None) -> list[str]:
    if plan is None or "failed" in plan:
        verdict = "not compiled yet" if plan is None else "**not compiled**, see below"
        return ["", row.topology, verdict, *[""] * 13]
    memory, step = plan["memory"], plan["step"]
    share = f"{memory['total'] / _GIB:.1f} ({memory['total'] / memory['limit']:.0%})"
    known = [
        f"{plan['model']['params'] / 1e9:.1f}B",
        row.topology,
        mesh_text(plan["mesh"]),
        f"{step['rows']:,} x {step['seq_len']:,}" + (f" / {step['microbatches']}" if step["microbatches"] > 1 else ""),
        step["remat"].replace("dots_with_no_batch_dims", "dots"),
        f"{(memory['params'] + memory['optimizer'] + memory.get('frozen', 0)) / _GIB:.1f}",
    ]
    if not plan["fits"]:
        return [*known, "", "", f"{share} **does not fit**", *[""] * 6, plan["date"][:10]]
    estimate = plan["estimate"]
    return [
        *known,
        f"{memory['activations'] / _GIB:.1f}",
        f"{(memory['temporaries'] + memory['gradients']) / _GIB:.1f}",
        share,
        f"{plan['seconds']['compile']:.0f}",
        f"{estimate['step_s']:.2f}",
        f"{estimate['tokens_per_second_per_chip']:,.0f}",
        f"{estimate['mfu']:.1%}",
        estimate["binding"],
        waiting_text(plan),
        plan["date"][:10],
    ]


def mesh_text(mesh: dict[str, int]) -> str:
    """Return the axes of a mesh that are not 1; FSDP with its part of each dimension of the torus."""
    fsdp = "x".join(str(size) for axis, size in mesh.items() if axis.startswith("fsdp") and size > 1)
    others = [f"{axis} {size}" for axis, size in mesh.items() if not axis.startswith("fsdp") and size > 1]
    return ", ".join([*([f"fsdp {fsdp}"] if fsdp else []), *others]) or "one device"


def waiting_text(plan: Kept) -> str:
    """Return the share of a step that waits for collectives, and which of those that are not hidden moves most."""
    spent = plan["estimate"]["spent"]
    share = (spent.get("ici", 0.0) + spent.get("dcn", 0.0)) / plan["estimate"]["step_s"]
    moved = Counter()
    for each in plan["collectives"]:
        if not each["overlapped"]:
            moved[each["kind"], " x ".join(each["axes"])] += (each["ici_bytes"] + each["dcn_bytes"]) * each["count"]
    if not moved:
        return f"{share:.0%}"
    kind, axes = max(moved, key=lambda key: moved[key])
    return f"{share:.0%}: {kind} over {axes}"


def _troubles(kept: dict[str, Kept]) -> Iterator[str]:
    """Yield why rows have no plan, or one that does not fit."""
    for name, plan in kept.items():
        if "failed" in plan:
            yield f"- `{name}` was not compiled ({plan['date'][:10]}): {plan['failed']}\n"
        elif not plan["fits"]:
            yield f"- `{name}` does not fit: {plan['memory']['exceeded']:,} bytes too many\n"


def _sizes(specs: dict[str, ModelSpec]) -> Iterator[str]:
    yield "What was compiled, as jaxllm's own description of each model has it.\n"
    yield _line(
        "model", "layers", "width", "heads", "feed-forward", "vocabulary", "parameters", "of a token", "assumed"
    )
    yield _line("---", *["---:"] * 2, *["---"] * 2, *["---:"] * 3, "---")
    for name, spec in sorted(specs.items()):
        active, total = count_active_params(spec), count_params(spec)
        yield _line(
            name, f"{spec.num_layers}", f"{spec.hidden_size:,}", _heads(spec), _feed_forward(spec),
            f"{spec.vocab_size:,}", f"{total:,}", "all" if active == total else f"{active:,}", ASSUMED.get(name, ""),
        )  # fmt: skip


def _heads(spec: ModelSpec) -> str:
    attention = spec.attention
    if isinstance(attention, MLA):
        query = attention.qk_nope_head_dim + attention.qk_rope_head_dim
        latents = f"latents {attention.q_lora_rank or 'none'} and {attention.kv_lora_rank}"
        return f"{attention.num_heads} of {query} and {attention.v_head_dim}, {latents}"
    shared = "" if attention.num_kv_heads == attention.num_heads else f", {attention.num_kv_heads} of keys and values"
    return f"{attention.num_heads} of {attention.head_dim}{shared}"


def _feed_forward(spec: ModelSpec) -> str:
    gated = "gated " if spec.mlp.gated else ""
    dense = f"{spec.mlp.intermediate_size:,} {gated}{spec.mlp.activation}"
    moe = spec.moe
    if moe is None:
        return dense
    experts = f"{moe.num_experts} experts of {moe.moe_intermediate_size:,}, {moe.num_experts_per_tok} of a token"
    return f"{experts}, {moe.num_shared_experts} shared; first {moe.first_k_dense}: {dense}"


def _comparison(rows: Sequence[Row], kept: dict[str, Kept]) -> Iterator[str]:
    if not rows:
        return
    config, options = rows[0].config.stem, " ".join(rows[0].overrides[:-1])
    yield "## Weights by hand or by XLA"
    yield (
        f"`{config}` with `{options}`: `mesh.collectives=staged` gathers weights along one dimension of the torus after"
        " another and scatters their gradients back so; `xla` leaves both to XLA's partitioner. Counts are of a step on"
        " one device; link bytes are those over its busiest link, in GiB; `hidden`: the share of a kind's link bytes"
        " that goes on beside matrix products or kernels.\n"
    )
    yield _line(
        "slice", "collectives", "memory, GiB", "step, s", "MFU", "waits", "GiB over a link by axis", "kinds of a step"
    )
    yield _line(*["---"] * 2, *["---:"] * 3, *["---"] * 3)
    for row in rows:
        yield _line(row.topology, row.overrides[-1].partition("=")[2], *_compared(kept.get(row.name)))


def _compared(plan: Kept | None) -> list[str]:
    if plan is None or "failed" in plan:
        return ["not compiled yet" if plan is None else "**not compiled**", *[""] * 5]
    memory = plan["memory"]
    total = f"{memory['total'] / _GIB:.1f} ({memory['total'] / memory['limit']:.0%})"
    if not plan["fits"]:
        return [f"{total} **does not fit**", *[""] * 5]
    estimate = plan["estimate"]
    links = [f"{axes}: {size / _GIB:.1f}" for axes, size in estimate["link_bytes"].items() if size >= 0.05 * _GIB]
    return [
        total,
        f"{estimate['step_s']:.2f}",
        f"{estimate['mfu']:.1%}",
        waiting_text(plan),
        "; ".join(links),
        "; ".join(_kinds(plan)),
    ]


@dataclasses.dataclass
class _Kind:
    count: int = 0
    link_bytes: float = 0.0
    hidden: float = 0.0


def _kinds(plan: Kept) -> Iterator[str]:
    """Yield a text for each kind of collective, the one that moves most first."""
    kinds = defaultdict(_Kind)
    for each in plan["collectives"]:
        kind, size = kinds[each["kind"]], each["ici_bytes"] * each["count"]
        kind.count += each["count"]
        kind.link_bytes += size
        kind.hidden += size * each["overlapped"]
    for name, kind in sorted(kinds.items(), key=lambda entry: -entry[1].link_bytes):
        hidden = f", {kind.hidden / kind.link_bytes:.0%} hidden" if kind.link_bytes else ""
        yield f"{kind.count:,} {name} ({kind.link_bytes / _GIB:.1f} GiB{hidden})"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
