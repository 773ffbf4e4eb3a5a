"""Save a checkpoint, one that the system refuses to write, and another one: python failed_write.py FOLDER."""

import resource
import sys

from checkpoint_states import state_of

from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.errors import InputError


def limit_file_size(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


if __name__ == "__main__":
    manager = CheckpointManager(sys.argv[1], keep_last=3, keep_every=None)
    manager.save(state_of(1), data_state={}, meta={})
    manager.wait()
    limit_file_size(200_000)
    manager.save(state_of(2, width=50_000), data_state={}, meta={})
    try:
        manager.save(state_of(3), data_state={}, meta={})
    except InputError as error:
        print(error)
    limit_file_size(resource.RLIM_INFINITY)
    manager.save(state_of(3), data_state={}, meta={})
    manager.close()
