"""Who talks to whom in a collective: the device groups written in HLO, and the mesh axes they are.

HLO numbers devices by their place in `mesh.devices.flat` (the device assignment of a jitted function).
"""

from __future__ import annotations

import functools
import math
import re

import numpy as np

from jaxllm.plan.hlo import Instruction

_SIZES = re.compile(r"\d+")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{(.*?)\}(?=,|$)")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_AXIS_REF = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def replica_groups(instruction: Instruction, num_devices: int) -> np.ndarray:
    """Return the groups of a collective, int [groups, members].

    The forms: `{{0,1},{2,3}}`, `{}` for all devices, `[2,4]<=[4,2]T(1,0)` (an iota, reshaped, transposed, reshaped) and
    `mesh['a'=2,'b'=4] {'b'}` (groups along axes of a mesh, which may have its own device order).

    Raises:
      ValueError: another form.
    """
    return _parse_groups(instruction.attribute(r"\breplica_groups=(.*?)(?:, [a-z_]+=(?!\()|$)") or "{}", num_devices)


@functools.lru_cache(maxsize=256)
def _parse_groups(text: str, num_devices: int) -> np.ndarray:
    if text.startswith("{{"):
        lists = text[2 : text.index("}}")].split("},{")
        return np.array([[int(each) for each in members.split(",")] for members in lists])
    if text.startswith("{}"):
        return np.arange(num_devices)[None]
    if found := _IOTA.match(text):
        shape, source, order = (_numbers(each or "") for each in found.groups())
        return _iota(source, order).reshape(shape)
    if found := _MESH.match(text):
        return _mesh_groups(*found.groups())
    raise ValueError(f"unknown form of replica_groups: {text[:80]}")


def source_target_pairs(instruction: Instruction) -> np.ndarray:
    """Return the (source, target) pairs of a collective-permute, int [pairs, 2]."""
    text = instruction.attribute(r"\bsource_target_pairs=\{(.*?)\}\}") or ""
    return np.array(_numbers(text), dtype=int).reshape(-1, 2)


def axes_of(groups: np.ndarray, sizes: dict[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which the members of a group differ, in the order of the mesh.

    Args:
      groups: int [groups, members]. sizes: of the mesh axes.
    """
    if groups.size == 0:
        return ()
    places = np.stack(np.unravel_index(groups, tuple(sizes.values())), axis=-1)
    differ = np.any(places != places[:, :1], axis=(0, 1))
    return tuple(axis for axis, differs in zip(sizes, differ, strict=True) if differs)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(each) for each in _SIZES.findall(text))


def _iota(shape: tuple[int, ...], order: tuple[int, ...]) -> np.ndarray:
    ids = np.arange(math.prod(shape)).reshape(shape)
    return ids.transpose(order) if order else ids


def _mesh_groups(axes: str, order: str | None, grouped: str) -> np.ndarray:
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    if order is None:
        ids = np.arange(math.prod(sizes.values()))
    elif found := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order):
        ids = _iota(*(_numbers(each or "") for each in found.groups()))
    else:
        ids = np.array(_numbers(order))
    # An axis may be used in part, as 'a':(2)4, the 4 after the first 2: it is split into (before, used, after).
    parts, moved = [], []
    used = {name: (int(before or 1), int(size or sizes[name])) for name, before, size in _AXIS_REF.findall(grouped)}
    for name, size in sizes.items():
        before, taken = used.get(name, (1, 1))
        if name in used:
            moved.append(len(parts) + 1)
        parts += [before, taken, size // (before * taken)]
    ids = ids.reshape(parts)
    kept = [dim for dim in range(len(parts)) if dim not in moved]
    return ids.transpose(kept + moved).reshape(-1, math.prod(parts[dim] for dim in moved))
