"""One of two processes that save and restore together: python two_processes.py PORT INDEX FOLDER."""

import sys
from pathlib import Path

import jax
import numpy as np
from checkpoint_states import abstract, state_of
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxllm.checkpoint.manager import CheckpointManager
from jaxllm.errors import InputError


def main(port, index, folder):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
    host = jax.tree.map(np.asarray, state_of(3))

    def rows(x):
        return NamedSharding(mesh, PartitionSpec("data") if x.ndim else PartitionSpec())

    def columns(x):
        return NamedSharding(mesh, PartitionSpec(*[None] * (x.ndim - 1), "data") if x.ndim > 1 else PartitionSpec())

    state = jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, rows(x), lambda i: x[i]), host)
    manager = CheckpointManager(folder, keep_last=1, keep_every=None)
    manager.save(state, data_state={"lanes": [1, 2]}, meta={})
    manager.wait()
    assert manager.steps() == [3]
    found, data_state, _ = manager.restore(abstract(state, columns))
    assert data_state == {"lanes": [1, 2]}
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(host), strict=True):
        for shard in a.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), b[shard.index])

    if index == 0:
        largest = max(Path(folder, "3", "params").rglob("d/*"), key=lambda path: path.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:-1] + b"?")
    multihost_utils.sync_global_devices("damaged")
    try:
        manager.restore_params(abstract(state.params, rows))
    except InputError as error:
        assert "damaged" in str(error)
        print("both as expected")
    manager.close()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
