"""Print the table of scripts/align_demo.sh: answers to held-out prompts before and after each stage."""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import NamedTuple

import numpy as np

import jaxllm
from jaxllm.tokenizers.chat import CHAT_FORMATS

NEW_TOKENS = 16
SAMPLES = 4


class Score(NamedTuple):
    """Shares of right answers: to each prompt the most likely one, and samples with temperature 1."""

    greedy: float
    sampled: float


def main(arguments: list[str] | None = None) -> int:
    """Measure all runs and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--prompts", type=Path, required=True, metavar="FILE")
    parser.add_argument("--sft", type=Path, required=True, metavar="RUN")
    parser.add_argument("--dpo", type=Path, required=True, metavar="RUN")
    parser.add_argument("--reward", type=Path, required=True, metavar="RUN")
    parser.add_argument("--reward-start", type=Path, required=True, metavar="RUN", help="the same after no update")
    parser.add_argument("--grpo", type=Path, required=True, nargs="+", metavar="RUN", help="one for each seed")
    chosen = parser.parse_args(arguments)
    rows = [json.loads(line) for line in chosen.prompts.read_text(encoding="utf-8").splitlines()]
    sft, dpo = (measure(run, rows) for run in (chosen.sft, chosen.dpo))
    grpo = [measure(run, rows) for run in chosen.grpo]
    print(f"\n| stage | measure, {len(rows)} held-out prompts | before | after |\n|---|---|---|---|")
    print(f"| SFT | right answers | 0 | {sft.greedy:.3f} |")
    before, after = (last_accuracy(run) for run in (chosen.reward_start, chosen.reward))
    print(f"| reward model | pairs told apart | {before:.3f} | {after:.3f} |")
    print(f"| DPO | right answers | {sft.greedy:.3f} | {dpo.greedy:.3f} |")
    seeds = f"{len(grpo)} seeds"
    print(f"| GRPO, {seeds} | right answers | {sft.greedy:.3f} | {spread([score.greedy for score in grpo])} |")
    print(f"| GRPO, {seeds} | mean reward of samples | {sft.sampled:.3f} | {spread([s.sampled for s in grpo])} |")
    return 0


def measure(run: Path, rows: list[dict]) -> Score:
    """Let a run answer all prompts."""
    model, form = jaxllm.load(run), CHAT_FORMATS["chatml"]
    prompts = [
        form.encode(model.tokenizer, [{"role": "user", "content": row["prompt"]}], add_generation_prompt=True).ids
        for row in rows
    ]
    length = max(map(len, prompts))
    ids, mask = np.zeros((2, len(rows), length), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, length - len(prompt) :], mask[row, length - len(prompt) :] = prompt, 1
    stop = form.stop_ids(model.tokenizer)

    def right(temperature: float, seed: int) -> float:
        options = dict(max_new_tokens=NEW_TOKENS, temperature=temperature, seed=seed, eos_ids=stop)
        answers = model.generate(ids, mask, **options)
        texts = [model.tokenizer.decode(until(answer.tolist(), stop, model.tokenizer.vocab_size)) for answer in answers]
        return statistics.fmean(text.strip() == row["reference"] for text, row in zip(texts, rows, strict=True))

    return Score(right(0.0, 0), statistics.fmean(right(1.0, seed) for seed in range(SAMPLES)))


def until(ids: list[int], stop: tuple[int, ...], num_ids: int) -> list[int]:
    """Return what comes before the first stop id, or id that means no token (the model has more rows than these)."""
    return ids[: next((place for place, token in enumerate(ids) if token in stop or token >= num_ids), len(ids))]


def last_accuracy(run: Path) -> float:
    """Return the accuracy of a run's last evaluation."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record["accuracy"] for record in records if record["kind"] == "eval"][-1]


def spread(values: list[float]) -> str:
    """Return mean and standard deviation."""
    return f"{statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
