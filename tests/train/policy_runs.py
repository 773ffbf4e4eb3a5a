"""Runs of the policy stages in the small world: prompts, rewards by functions, and configs."""

import json
import random

from tests.train.runs import WORDS

SHARED = {
    "model__weights": None,
    "data__seq_len": 40,
    "train__batch_size": 8,
    "train__steps": 20,
    "optimizer__learning_rate": 1e-3,
    "schedule__kind": "constant",
    "schedule__warmup": 0,
    "checkpoint__every": 6,
    "eval__every": 10,
}
ROLLOUT = {"prompts": 4, "samples": 4, "max_new_tokens": 8}
VOWELS = {"kind": "function", "path": "tests.train.policy_runs:vowels", "name": "vowels"}


def vowels(completions):
    """Reward each vowel of an answer."""
    return [sum(letter in "aeiou" for letter in each.response) / 10 for each in completions]


def vowel_steps(completions):
    """Reward each half of an answer for its vowels."""
    steps = []
    for each in completions:
        middle = max(len(each.response) // 2, 1)
        halves = (each.response[:middle], each.response[middle:])
        ends = (middle, len(each.response))
        steps.append([(end, vowels_of(half)) for end, half in zip(ends, halves, strict=True) if half])
    return steps


def vowels_of(text):
    return sum(letter in "aeiou" for letter in text) / 10


def nothing(completions):
    """Reward nothing."""
    return [0.0] * len(completions)


def write_prompts(path, count, seed):
    """Write prompts of a few random words."""
    rng = random.Random(seed)
    rows = [
        {"prompt": " ".join(rng.choices(WORDS, k=rng.randint(1, 2))), "answer": "a", "is_safety": number % 2 == 0}
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def policy_config(world, run, stage, weights, **overrides):
    """Write the config of a run that starts from the weights at a path."""
    for name, count, seed in (("prompts", 24, 2), ("heldout_prompts", 5, 3)):
        if not (world.folder / f"{name}.jsonl").exists():
            write_prompts(world.folder / f"{name}.jsonl", count, seed)
    options = SHARED | {
        "stage": stage,
        "model__weights": str(weights),
        "data__train": [{"path": str(world.folder / "prompts.jsonl")}],
        "data__heldout": [{"path": str(world.folder / "heldout_prompts.jsonl")}],
        "rollout": ROLLOUT,
        "rewards": [VOWELS],
    }
    return world.write_config(run, **options | overrides)
