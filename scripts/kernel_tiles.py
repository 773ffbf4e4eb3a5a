"""Tiles that attention visits by mask, the fewest there can be, and the bytes that follow from them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import jax.numpy as jnp
import numpy as np
from kernel_schedule import CORES

from jaxllm.plan.chips import CHIPS
from kernels_pallas.tiles import tile_counts
from kernels_pallas.visible import Masks

LENGTHS = (4096, 32768)
WINDOW = 1024
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of the bytes by formula."""


def mask_cases(length: int) -> dict[str, tuple]:
    """Return by name what masks one row of `length` slots: (segment ids, prefix mask, window), None where absent."""
    ends = np.cumsum(np.random.default_rng(0).integers(64, length // 2, 1000))
    documents = (np.searchsorted(ends, np.arange(length), side="right") + 1)[None]
    return {
        "causal": (None, None, None),
        f"window {WINDOW}": (None, None, WINDOW),
        "packed documents": (documents, None, None),
        "prefix of half": (None, (np.arange(length) < length // 2)[None], None),
    }


def fewest_tiles(length: int, mask: tuple, tiles: Sequence[tuple[int, int]]) -> list[dict[str, int]]:
    """Count a causal mask's tiles, for each size, by looking at every pair, with no code of the kernels."""
    segments, prefix, window = mask
    unit = math.gcd(length, *itertools.chain(*tiles))
    keys, some, every = np.arange(length, dtype=np.int32), [], []
    for start in range(0, length, unit):
        queries = np.arange(start, start + unit, dtype=np.int32)[:, None]
        sees = keys <= queries
        if window is not None:
            sees &= queries - keys < window
        if prefix is not None:
            sees |= prefix
        if segments is not None:
            sees &= segments[0, queries] == segments
        # Along the queries first: that is fast.
        some.append(sees.any(axis=0).reshape(-1, unit).any(axis=1))
        every.append(sees.all(axis=0).reshape(-1, unit).all(axis=1))
    counts = []
    for tile in tiles:
        shape = (length // tile[0], tile[0] // unit, length // tile[1], tile[1] // unit)
        visited = int(np.stack(some).reshape(shape).any(axis=(1, 3)).sum())
        full = int(np.stack(every).reshape(shape).all(axis=(1, 3)).sum())
        counts.append({"visited": visited, "full": full, "partial": visited - full})
    return counts


def tile_rows(tiles: Sequence[tuple[int, int]]) -> Iterator[dict]:
    """Yield how many tiles the TPU kernels visit for each mask, the fewest there can be, and how causal compares.

    A cut tile, of which a quarter is left out, costs three quarters.
    """
    for length in LENGTHS:
        causal = {}
        for name, mask in mask_cases(length).items():
            segments, prefix, window = (None if part is None else jnp.asarray(part, jnp.int32) for part in mask)
            for tile, fewest in zip(tiles, fewest_tiles(length, mask, tiles), strict=True):
                found = tile_counts(Masks(segments, segments, prefix, window), (length, length), tile, causal=True)
                cost = found["visited"] - found["cut"] / 4
                yield {
                    "length": length,
                    "tile": list(tile),
                    "mask": name,
                    **{key: found[key] for key in ("visited", "full", "partial", "cut")},
                    "fewest": fewest,
                    "causal_over_this": causal.setdefault(tile, cost) / cost,
                }


def byte_rows(counts: Sequence[dict]) -> Iterator[dict]:
    """Yield the bytes that one row moves to and from HBM by formula, bfloat16, 32 heads, 8 of keys, head dim 128.

    Forward: q, o and lse once; k and v of a tile at each visit, by every head. Backward: q, do, dq, lse and delta once,
    k, v, dk, dv once, and k and v of a tile at each visit, by every head of keys.
    """
    for row in counts:
        length, visited_keys = row["length"], row["visited"] * row["tile"][1]
        vector, number = 2 * HEAD_DIM, 4
        forward = HEADS * length * (2 * vector + number) + HEADS * visited_keys * 2 * vector
        backward = HEADS * length * (3 * vector + 2 * number) + KV_HEADS * (4 * length + 2 * visited_keys) * vector
        yield {key: row[key] for key in ("length", "tile", "mask")} | {
            "forward_mb": forward / 1e6,
            "backward_mb": backward / 1e6,
            "milliseconds": {
                chip: [x / CHIPS[chip].hbm_bandwidth * 1e3 for x in (forward, backward)] for chip in CORES
            },
        }
