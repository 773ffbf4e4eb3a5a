"""Time a round of sampled answers beside generate() on the same prompts. Prints one JSON line.

    python scripts/bench_rollout.py [--prompts 8] [--samples 8] [--new-tokens 24] [--rounds 20]

Both run in turn in one process, so that a noisy machine treats them alike. The model is the quickstart's.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

PROMPT_LENGTH = 24


def measure(num_prompts: int, samples: int, new_tokens: int, rounds: int) -> dict[str, float]:
    """Return milliseconds of the best round of each, tokens per second, and the ratio of sampling to generate()."""
    import jax
    import numpy as np

    import jaxllm
    from jaxllm.generate.rollout import Sampler
    from jaxllm.language_model import LanguageModel
    from jaxllm.nn.model import init
    from jaxllm.sharding.mesh import make_mesh

    spec = jaxllm.spec("qwen-mini")
    params = jax.jit(init, static_argnums=0)(spec, jax.random.key(0))
    model = LanguageModel(spec, params)
    sampler = Sampler(
        spec,
        mesh=make_mesh(devices=jax.devices()[:1]),
        eos_ids=(),
        seq_len=PROMPT_LENGTH + new_tokens,
        max_new_tokens=new_tokens,
    )
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, spec.vocab_size, (num_prompts, PROMPT_LENGTH))
    num_answers = num_prompts * samples

    def sample(number: int) -> None:
        keys = jax.random.key_data(jax.random.split(jax.random.key(number), num_answers))
        sampler.sample(params, None, prompts.tolist(), np.asarray(keys))

    def generate(number: int) -> None:
        rows = np.repeat(prompts, samples, axis=0)
        model.generate(rows, max_new_tokens=new_tokens, temperature=1.0, seed=number, eos_ids=())

    best: dict[str, float] = {}
    for number in range(rounds):
        for task in (sample, generate):
            seconds = _timed(task, number)
            if number:  # the first compiles
                best[task.__name__] = min(seconds, best.get(task.__name__, seconds))
    tokens = num_answers * new_tokens
    figures = {f"{name}_ms": round(1e3 * seconds, 1) for name, seconds in best.items()}
    figures |= {f"{name}_tokens_per_s": round(tokens / seconds) for name, seconds in best.items()}
    return figures | {"ratio": round(best["generate"] / best["sample"], 2)}


def _timed(task: Callable[[int], None], number: int) -> float:
    start = time.perf_counter()
    task(number)
    return time.perf_counter() - start


def main() -> None:
    """Read the arguments, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=20)
    given = parser.parse_args()
    shape = {"prompts": given.prompts, "samples": given.samples, "new_tokens": given.new_tokens}
    print(json.dumps(shape | measure(given.prompts, given.samples, given.new_tokens, max(2, given.rounds))))


if __name__ == "__main__":
    main()
