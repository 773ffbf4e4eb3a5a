"""How the answers of a round become passes of one shape."""

from __future__ import annotations

import dataclasses
import math

from jaxllm.generate.engine import bucket


@dataclasses.dataclass(frozen=True)
class Round:
    """The passes of a round; all numbers are of one process.

    Attributes:
      num_passes: how many batches of answers there are.
      prompts: prompts that a pass reads. repeats: how often each prompt of the round is read.
      samples: answers after each reading.
      slots: slots of the prompts.
    """

    num_passes: int
    prompts: int
    repeats: int
    samples: int
    slots: int


def plan_round(num_prompts: int, samples: int, longest: int, *, ways: int, most: int | None, room: int) -> Round:
    """Choose the shapes of a round.

    Prompts are read once for several answers wherever the rows of a device hold whole groups of them.

    Args:
      num_prompts: of a process, samples: answers to each. longest: tokens of a prompt.
      ways: that a process's rows are split over its devices. most: answers that each of them samples at once.
      room: slots that a prompt may have.
    """
    per_device = -(-num_prompts * samples // ways)
    if most is not None:
        per_device = min(per_device, most)
    together = math.gcd(samples, per_device)
    in_pass = ways * per_device // together
    return Round(
        num_passes=-(-num_prompts * samples // (in_pass * together)),
        prompts=in_pass,
        repeats=samples // together,
        samples=together,
        slots=min(bucket(longest), room),
    )
