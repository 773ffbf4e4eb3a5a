"""Write the task of scripts/align_demo.sh: sorting small numbers, as conversations, pairs of answers and prompts.

Every list of numbers is in one file only, so that what is held out was seen in no stage. The demonstrations are of
mixed quality: more than half of them sort the wrong way round.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

LARGEST = 9
LENGTHS = (4, 5, 6)
WORDINGS = ("Sort {}.", "Sort these numbers: {}", "Put {} in order.", "{} from small to large?")
WRONG_WAY_ROUND = 0.55
ROWS = {"sft": 3000, "preferences": 2000, "prompts": 4000, "heldout": 256}

Numbers = tuple[int, ...]


def main(arguments: list[str] | None = None) -> int:
    """Write all files into a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, metavar="DIR")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    chosen = parser.parse_args(arguments)
    chosen.output.mkdir(parents=True, exist_ok=True)
    for name, rows in task_rows(random.Random(chosen.seed)):
        path = chosen.output / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{path}: {len(rows):,} rows")
    return 0


def task_rows(rng: random.Random) -> Iterator[tuple[str, list[dict]]]:
    """Yield (name of a file, its rows)."""
    lists = distinct_lists(sum(ROWS.values()), rng)
    parts = {name: [lists.pop() for _ in range(count)] for name, count in ROWS.items()}
    wrong = [rng.random() < WRONG_WAY_ROUND for _ in parts["sft"]]
    yield "sft", [conversation(numbers, rng, wrong=wrong) for numbers, wrong in zip(parts["sft"], wrong, strict=True)]
    yield "preferences", [preference(numbers, rng) for numbers in parts["preferences"]]
    yield "prompts", [prompt(numbers, rng) for numbers in parts["prompts"]]
    yield "heldout_sft", [conversation(numbers, rng) for numbers in parts["heldout"]]
    yield "heldout_preferences", [preference(numbers, rng) for numbers in parts["heldout"]]
    yield "heldout_prompts", [prompt(numbers, rng) for numbers in parts["heldout"]]


def distinct_lists(count: int, rng: random.Random) -> list[Numbers]:
    """Draw lists of numbers, no two of them equal, in no order."""
    lists: dict[Numbers, None] = {}
    while len(lists) < count:
        lists[tuple(rng.randint(0, LARGEST) for _ in range(rng.choice(LENGTHS)))] = None
    return list(lists)


def question(numbers: Numbers, rng: random.Random) -> str:
    """Return the task in one of several wordings."""
    return rng.choice(WORDINGS).format(written(numbers))


def written(numbers: Numbers) -> str:
    """Return numbers as text."""
    return " ".join(map(str, numbers))


def conversation(numbers: Numbers, rng: random.Random, *, wrong: bool = False) -> dict:
    """Return a row to fine-tune on, perhaps with the numbers from large to small."""
    answer = written(tuple(sorted(numbers, reverse=wrong)))
    return {"messages": [{"role": "user", "content": question(numbers, rng)}, {"role": "assistant", "content": answer}]}


def preference(numbers: Numbers, rng: random.Random) -> dict:
    """Return a pair: the right answer, and the wrong way round or with neighbours swapped, a number changed or lost."""
    right = tuple(sorted(numbers))
    wrong = right
    while wrong == right:
        place, changed = rng.randrange(len(right) - 1), list(right)
        match rng.choice(("turn", "turn", "turn", "swap", "change", "lose")):
            case "turn":
                changed.reverse()
            case "swap":
                changed[place], changed[place + 1] = changed[place + 1], changed[place]
            case "change":
                changed[place] = rng.randint(0, LARGEST)
            case "lose":
                del changed[place]
        wrong = tuple(changed)
    return {"prompt": question(numbers, rng), "chosen": written(right), "rejected": written(wrong)}


def prompt(numbers: Numbers, rng: random.Random) -> dict:
    """Return a prompt with the answer that a reward compares with."""
    return {"prompt": question(numbers, rng), "reference": written(tuple(sorted(numbers)))}


if __name__ == "__main__":
    raise SystemExit(main())
