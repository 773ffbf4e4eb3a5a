"""What would help where a plan does not fit."""

from __future__ import annotations

from collections.abc import Iterator

from jaxllm.plan.plan import Plan
from jaxllm.plan.types import CompiledStep
from jaxllm.sharding.rules import batch_ways


def refusal(plan: Plan) -> str:
    """Say by how many bytes a plan does not fit, and what would help."""
    memory, step = plan.memory, plan.step
    if memory.fits:
        return _sampling_refusal(plan)
    rounded = "" if step.hlo else " (the compiler rounds to 0.01 GiB)"
    lines = [
        f"{step.config.model.label} does not fit {step.topology}: a device needs {memory.total:,} bytes of "
        f"{memory.limit:,}, {memory.exceeded:,} too many{rounded}",
        *(f"  {line}" for line in _advice(plan)),
    ]
    return "\n".join(lines)


def _sampling_refusal(plan: Plan) -> str:
    """Say the same of the sampling of answers, where the step alone fits."""
    rollouts, step = plan.rollouts, plan.step
    lines = [
        f"{step.config.model.label} fits {step.topology} to be trained, but not to sample answers: a device needs "
        f"{rollouts.total:,} bytes of {rollouts.limit:,}, {rollouts.exceeded:,} too many"
    ]
    rows = rollouts.answers // batch_ways(step.mesh)
    if rows > 1:
        lines.append(f"rollout.batch_size below {rollouts.answers}: a device samples {rows} answers at once")
    if rollouts.copied:
        lines.append(
            f"rollout.gather=token saves the gathered weights, {rollouts.copied:,} bytes, at the price of time"
        )
    lines.append(f"mesh.tensor above {step.mesh.shape['tensor']} divides gathered weights and cache")
    return "\n  ".join(lines)


def _advice(plan: Plan) -> Iterator[str]:
    step, memory = plan.step, plan.memory
    config, sizes = step.config, step.mesh.shape
    held = memory.params + memory.optimizer + memory.frozen
    yield from _smaller_state(plan) if held > memory.limit // 2 else ()
    if config.model.remat != "full":
        yield f"model.remat=full (now {config.model.remat}) keeps one array for each layer"
    rows = _rows(step)
    if rows > 1:
        most = rows * config.train.grad_accum
        yield f"train.grad_accum up to {most} (now {config.train.grad_accum}): a device has {rows} rows at once"
    elif sizes["tensor"] < step.spec.attention.num_heads:
        yield f"mesh.tensor above {sizes['tensor']}: a device has one row at once, and tensor divides what a row needs"
    if config.model.attention_impl == "reference":
        yield "model.attention_impl=pallas: kernels write no scores down"
    if config.train.loss_chunk is not None:
        yield f"train.loss_chunk below {config.train.loss_chunk}, or left out"
    yield f"data.seq_len below {config.data.seq_len}, or a larger topology than {step.topology}"
    yield "jaxllm plan --search looks for a mesh that fits"


def _smaller_state(plan: Plan) -> Iterator[str]:
    """Advise on parameters and moments, which alone take half of the memory or more."""
    sizes = plan.step.mesh.shape
    if sizes["replica"] > 1:
        yield f"mesh.replica below {sizes['replica']}: replicas each hold the whole state; fsdp divides it"
    else:
        yield "more chips: parameters and optimizer are divided among all of them already"


def _rows(step: CompiledStep) -> int:
    """Return the rows that a device has at once."""
    rows = step.tokens_per_step // step.config.data.seq_len
    split = [size for axis, size in step.mesh.shape.items() if axis.split("_")[0] in ("replica", "fsdp", "expert")]
    for size in (*split, step.config.train.grad_accum):
        rows //= size
    return rows
