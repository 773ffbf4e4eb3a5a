"""Time the product's own training step on the shape of bench_limit.py. Prints one JSON line.

`python scripts/bench_train.py --compare [ROUNDS]` runs it and bench_limit.py in turn, so that a noisy machine treats
both alike, and prints the ratio of their best speeds.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bench_report


def measure() -> None:
    """Run the benchmark in this process."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxllm.config import OptimizerConfig
    from jaxllm.nn.model import decay_mask
    from jaxllm.nn.param import Initializer
    from jaxllm.sharding.mesh import make_mesh
    from jaxllm.spec import GQA, MLP, ModelSpec, Norm, Rope
    from jaxllm.train.feed import Feed
    from jaxllm.train.forward import Forward, default_chunk
    from jaxllm.train.objectives.language_modeling import LanguageModeling
    from jaxllm.train.optimizer import make_optimizer
    from jaxllm.train.step import init_state, make_train_step
    from jaxllm.train.tuning import FullTuning

    bench = bench_report.Bench("jaxllm")
    shape = bench_report.SHAPE
    spec = ModelSpec(
        vocab_size=shape["vocab"],
        hidden_size=shape["hidden"],
        num_layers=shape["layers"],
        max_position_embeddings=shape["length"],
        attention=GQA(num_heads=shape["heads"], num_kv_heads=shape["heads"], head_dim=shape["head_dim"]),
        position=Rope(),
        mlp=MLP(intermediate_size=shape["mlp"]),
        norm=Norm(eps=1e-5),
    )
    mesh = make_mesh()
    forward = Forward(
        spec=spec,
        tuning=FullTuning(spec),
        compute_dtype=jnp.dtype(jnp.float32),
        remat="full",
        chunk=default_chunk(shape["batch"], shape["length"], shape["vocab"]),
    )
    objective = LanguageModeling(forward=forward)
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), decay_mask(spec))
    with jax.set_mesh(mesh):
        state = init_state(objective.declarations(), optimizer, mesh, seed=0, initializer=Initializer())
        train_step = make_train_step(objective, optimizer, state, mesh)
        feed = Feed.create(mesh, 1, [shape["batch"]])
        ones = np.ones((shape["batch"], shape["length"]), np.int32)
        fixed = {
            "loss_weights": ones.astype(np.float32),
            "positions": np.cumsum(ones, axis=1, dtype=np.int32) - 1,
            "segment_ids": ones,
        }

        def one_step(rows: np.ndarray) -> float:
            nonlocal state
            batch = feed.to_devices({"tokens": rows[:, :-1], "targets": rows[:, 1:], **fixed}, shape["batch"])
            state, metrics = train_step(state, batch, np.float32(1e-3), None)
            return float(metrics["loss"])

        bench.run(one_step, bench_report.random_rows())


def compare(rounds: int) -> None:
    """Run both programs `rounds` times in turn and print the ratio."""
    best: dict[str, int] = {}
    for _ in range(rounds):
        for script in ("bench_limit.py", "bench_train.py"):
            command = [sys.executable, str(Path(__file__).with_name(script))]
            line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
            print(line, flush=True)
            figures = json.loads(line)
            best[figures["name"]] = max(best.get(figures["name"], 0), figures["tokens_per_s_best"])
    print(json.dumps({"best": best, "jaxllm_over_limit": round(best["jaxllm"] / best["limit"], 3)}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compare"]:
        compare(int(sys.argv[2]) if len(sys.argv) > 2 else 3)
    else:
        measure()
