"""How large the GPU kernels' tiles are, and how many warps compute one.

The sizes are chosen for H100 (sm_90: 227 KiB of shared memory for a program, 255 registers for a thread, wgmma for
groups of 4 warps) by reasoning and by what its assembler reports, not yet by timing:
- 128 rows of the outer tile: every inner tile fetched from L2 is used by 128 rows, which the L2's bandwidth needs at
  half of the peak. 8 warps, 64 rows to each group of 4, so that the sums stay in registers.
- In the products that read both operands from shared memory an inner tile of less than 64 leaves the tensor cores
  waiting for it; more than 128 costs registers that are not there.
- As many rows as fit into shared memory with two stages and, up to head dims of 192 + 128, spill no register under a
  causal mask, a window and segments (with a scale of each query dk's kernel spills 4 to 7).
float32 is multiplied in three TF32 products, whose parts take registers and shared memory: small tiles.
"""

from __future__ import annotations

import dataclasses

import jax
from jax.experimental.pallas import triton

from kernels_pallas.options import Options

LEAST = 16
"""The least size of a tile along any axis, and what head dims are padded to a multiple of."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """(queries, keys) of a tile, the warps of a program, and the stages of its pipeline of loads."""

    blocks: tuple[int, int]
    warps: int
    stages: int

    def compiler_params(self) -> triton.CompilerParams:
        """Return what the compiler is to know of it."""
        return triton.CompilerParams(num_warps=self.warps, num_stages=self.stages)


_LAUNCHES = {
    # Bytes of an element: greatest head dims, of queries and keys and of values: the launch of each kernel.
    2: {
        (64, 64): {"forward": Launch((128, 64), 4, 3), "dq": Launch((128, 64), 8, 2), "dkv": Launch((64, 128), 8, 2)},
        (128, 128): {
            "forward": Launch((128, 128), 8, 2),
            "dq": Launch((128, 64), 8, 2),
            "dkv": Launch((64, 128), 8, 2),
        },
        (192, 128): {
            "forward": Launch((128, 128), 8, 2),
            "dq": Launch((128, 64), 8, 2),
            "dkv": Launch((32, 128), 8, 2),
        },
        (256, 256): {"forward": Launch((128, 64), 8, 2), "dq": Launch((128, 32), 8, 2), "dkv": Launch((32, 64), 8, 2)},
        (576, 512): {"forward": Launch((64, 32), 8, 2), "dq": Launch((32, 32), 8, 1), "dkv": Launch((32, 32), 8, 1)},
    },
    4: {
        (128, 128): {"forward": Launch((64, 32), 4, 2), "dq": Launch((32, 32), 4, 1), "dkv": Launch((32, 32), 4, 1)},
        (256, 256): {"forward": Launch((32, 32), 4, 1), "dq": Launch((32, 32), 4, 1), "dkv": Launch((32, 32), 4, 1)},
        (576, 512): {"forward": Launch((16, 16), 4, 1), "dq": Launch((16, 16), 4, 1), "dkv": Launch((16, 16), 4, 1)},
    },
}


def choose_launch(kernel: str, q: jax.Array, v: jax.Array, options: Options) -> Launch:
    """Return the launch of a kernel, "forward", "dq" or "dkv", with the caller's block sizes if there are any.

    Raises:
      ValueError: head dims too wide, or block sizes that are no powers of two.
    """
    dims, launches = (q.shape[-1], v.shape[-1]), _LAUNCHES[q.dtype.itemsize]
    enough = [bound for bound in launches if dims[0] <= bound[0] and dims[1] <= bound[1]]
    if not enough:
        raise ValueError(f"q, v: found head dims {dims}, expected at most {max(launches)} on GPU")
    launch = launches[enough[0]][kernel]
    if options.block_sizes is None:
        return launch
    blocks = getattr(options.block_sizes, kernel)
    for block in blocks:
        if block < LEAST or block & (block - 1):
            raise ValueError(f"block_sizes: found {blocks}, expected powers of two of at least {LEAST} on GPU")
    return dataclasses.replace(launch, blocks=tuple(blocks))
