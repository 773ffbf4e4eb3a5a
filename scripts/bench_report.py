"""What the benchmarks share: one shape, the same random rows, and one JSON line of figures."""

from __future__ import annotations

import json
import os
import resource
import time
from collections.abc import Callable, Sequence

import numpy as np

SHAPE = {
    "layers": 4,
    "hidden": 256,
    "heads": 8,
    "head_dim": 32,
    "mlp": 688,
    "vocab": 8192,
    "length": 256,
    "batch": 8,
}


def random_rows(count: int = 16) -> np.ndarray:
    """Return token ids, int32 [count, batch, length + 1]."""
    shape = (count, SHAPE["batch"], SHAPE["length"] + 1)
    return np.random.default_rng(0).integers(0, SHAPE["vocab"], shape, dtype=np.int32)


def _since_start() -> float:
    """Seconds since this process was created."""
    with open("/proc/self/stat") as file:
        started = int(file.read().rpartition(")")[2].split()[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started


class Bench:
    """Times a training step function and prints a JSON line; made when all imports are done."""

    def __init__(self, name: str):
        self._figures: dict = {"name": name, "import_s": round(_since_start(), 2)}

    def run(self, step: Callable[[np.ndarray], float], rows: Sequence[np.ndarray], count: int | None = None) -> None:
        """Time `step(rows) -> loss`, which must wait for its result, and print the figures."""
        import jax

        count = count or int(os.environ.get("STEPS", "30"))
        losses = [step(rows[0])]
        self._figures["process_start_to_first_step_s"] = round(_since_start(), 2)
        losses += [step(rows[i % len(rows)]) for i in range(1, 4)]
        seconds, cpu_before = [], time.process_time()
        for i in range(count):
            begin = time.perf_counter()
            losses.append(step(rows[(4 + i) % len(rows)]))
            seconds.append(time.perf_counter() - begin)
        tokens = SHAPE["batch"] * SHAPE["length"]
        self._figures |= {
            "tokens_per_s_best": round(tokens / min(seconds)),
            "tokens_per_s_median": round(tokens / sorted(seconds)[len(seconds) // 2]),
            "cpu_s_per_step": round((time.process_time() - cpu_before) / count, 4),
            "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "first_loss": round(losses[0], 4),
            "last_loss": round(losses[-1], 4),
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }
        print(json.dumps(self._figures), flush=True)
