"""For each folder named on standard input: fork a process that saves checkpoints there until it is killed.

Forking pays for the imports once. Prints the process id, and "dead" once the process is gone.
"""

import itertools
import os
import sys

import orbax.checkpoint  # noqa: F401
from checkpoint_states import state_of

from jaxllm.checkpoint.manager import CheckpointManager


def save_forever(folder):
    manager = CheckpointManager(folder, keep_last=2, keep_every=None)
    for step in itertools.count((manager.latest_step() or 0) + 1):
        manager.save(state_of(step), data_state={"step": step}, meta={"half": step / 2})


if __name__ == "__main__":
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            save_forever(line.strip())
        print(pid, flush=True)
        os.waitpid(pid, 0)
        print("dead", flush=True)
