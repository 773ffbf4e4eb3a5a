"""One of two processes that sample together: python two_samplers.py PORT INDEX MESH FILE.

With MESH "fsdp" they hold different rows, and process 1 has one prompt less; with "tensor" both hold all of them.
"""

import sys

import jax
import numpy as np

import jaxllm
from jaxllm.generate.rollout import Sampler
from jaxllm.nn.model import abstract_params
from jaxllm.sharding.mesh import make_mesh
from jaxllm.spec import tiny
from tests.tiny_models import random_params

SPEC = tiny(jaxllm.spec("llama2-70b"))
OPTIONS = dict(eos_ids=range(30), seq_len=24, max_new_tokens=9)
SAMPLES = 4
PROMPTS = [[5, 6, 7], [1, 2, 3, 4, 5, 6, 7, 8, 9], [9], [20, 21], [30, 31, 32, 33]]


def part_of(mesh, process):
    """Return which prompts a process samples."""
    if mesh == "tensor":
        return range(5)
    return range(3) if process == 0 else range(3, 5)


def row_keys():
    """Return the keys of all answers."""
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0), len(PROMPTS) * SAMPLES)))


def main(port, index, mesh_name, file):
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = make_mesh(fsdp=4) if mesh_name == "fsdp" else make_mesh(fsdp=2, tensor=2, devices=_across(jax.devices()))
    params = jax.tree.map(
        lambda x, leaf: jax.make_array_from_callback(x.shape, leaf.sharding, lambda i: np.asarray(x)[i]),
        random_params(SPEC, scale=0.15),
        abstract_params(SPEC, mesh),
    )
    sampler = Sampler(SPEC, mesh=mesh, **OPTIONS, batch_size=8)
    mine = part_of(mesh_name, index)
    prompts, keys = [PROMPTS[i] for i in mine], row_keys()[mine.start * SAMPLES : mine.stop * SAMPLES]
    samples = sampler.sample(params, None, prompts, keys)
    assert sampler.sample(params, None, prompts, keys, stop=lambda: True) is None
    np.savez(file, tokens=samples.tokens, lengths=samples.lengths, logps=samples.logps)


def _across(devices):
    """Order two processes' two devices so that those along "tensor" belong to different ones."""
    return [devices[0], devices[2], devices[1], devices[3]]


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4])
