#!/usr/bin/env python3
"""Measure every family against its reference implementations and print the table of the README.

Usage: python scripts/family_errors.py
For each golden it takes the largest difference of any logit, on plain and on padded input, in float32 at the
highest matmul precision, and whether the greedy continuation is the reference's.
"""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import jaxllm
from jaxllm.families import family_of_config

GOLDENS = Path(__file__).parents[1] / "tests" / "goldens"


class Measured(NamedTuple):
    """One golden's result; `greedy` is None where it has a prompt that the model cannot place by itself."""

    error: float
    greedy: bool | None


def measure(folder: Path) -> tuple[str, Measured]:
    """Return the family of a golden checkpoint and how far we are from its reference."""
    meta, arrays = json.loads((folder / "meta.json").read_text()), dict(np.load(folder / "golden.npz"))
    ids = {name.lower(): token for name, token in meta.get("special_ids", {}).items()}
    names = {name: ids[name] for name in ("mask", "gmask", "smask", "sop", "eop") if name in ids}
    lm = jaxllm.load_pretrained(folder, special_ids=names or None)
    found = measure_glm(lm, arrays) if "valid" in arrays else measure_causal(lm, arrays)
    return family_of_config(lm.config).name, found


def measure_causal(lm: jaxllm.LanguageModel, arrays: dict[str, np.ndarray]) -> Measured:
    """Measure a golden of the LLaMA-like families."""
    plain = np.abs(lm.logits(arrays["input_ids"]) - arrays["logits"]).max()
    padded = np.abs(lm.logits(arrays["padded_input_ids"], arrays["attention_mask"]) - arrays["padded_logits"])
    new = lm.generate(arrays["prompt_ids"], max_new_tokens=len(arrays["greedy_ids"]), eos_ids=())
    error = max(plain, padded[arrays["attention_mask"] == 1].max())
    return Measured(float(error), bool((new[0] == arrays["greedy_ids"]).all()))


def measure_glm(lm: jaxllm.LanguageModel, arrays: dict[str, np.ndarray]) -> Measured:
    """Measure a golden of the GLM line, whose rows are padded."""
    given = dict(positions=arrays["position_ids"], block_positions=arrays.get("block_position_ids"))
    logits = lm.logits(arrays["input_ids"], arrays["valid"], **given, mask=arrays.get("allowed"))
    error = np.abs(np.asarray(logits) - arrays["logits"])[arrays["valid"]].max()
    greedy = None
    try:
        new = lm.generate(arrays["gen_prompt"][None], max_new_tokens=len(arrays["gen_new"]), eos_ids=())
        greedy = bool((new[0] == arrays["gen_new"]).all())
    except jaxllm.InputError:  # several masks: positions cannot be derived
        pass
    return Measured(float(error), greedy)


def main() -> None:
    """Print one row for each family."""
    results = collections.defaultdict(list)
    with jax.default_matmul_precision("highest"):
        for folder in sorted([*(GOLDENS / "models").iterdir(), *(GOLDENS / "models_glm").iterdir()]):
            family, found = measure(folder)
            results[family].append(found)
    print("| family | goldens | largest logit error | greedy continuations |")
    print("|---|---|---|---|")
    for family, found in results.items():
        placed = [each.greedy for each in found if each.greedy is not None]
        error = max(each.error for each in found)
        print(f"| {family} | {len(found)} | {error:.1e} | {sum(placed)} of {len(placed)} |")


if __name__ == "__main__":
    main()
