"""Bytes over the busiest link: rings, lines, planes, slices and switches."""

import importlib.util

import numpy as np
import pytest
from jax.sharding import Mesh

from jaxllm.plan.chips import CHIPS
from jaxllm.plan.network import LinkBytes, Network, network_of, torus_wraps
from jaxllm.plan.topology import find_devices, parse_topology

FULL = 1600.0


def torus(*dims, wraps=None, slices=1, cores=1):
    shape = (slices, *dims, *(1,) * (3 - len(dims)), cores)
    places = np.stack(np.unravel_index(np.arange(np.prod(shape)), shape), axis=-1)
    return Network({"all": len(places)}, places, wraps or (False, False, False), switched=False)


def ring(size, stride=1):
    return np.arange(size * stride).reshape(size, stride).T


@pytest.mark.parametrize(
    ("wraps", "links"), [((True, False, False), 2), ((False, False, False), 1)], ids=["ring", "line"]
)
def test_a_gather_leaves_out_what_the_device_has(wraps, links):
    network = torus(16, wraps=wraps)
    for kind, times in {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2}.items():
        assert network.group_bytes(kind, FULL, ring(16)) == LinkBytes(times * FULL * 15 / 16 / links)


def test_a_part_of_a_ring_is_a_line():
    assert torus(16, wraps=(True, False, False)).group_bytes("all-gather", FULL, ring(4)).ici == FULL * 3 / 4


def test_interleaved_groups_share_the_links():
    network = torus(16, wraps=(True, False, False))
    assert network.group_bytes("all-gather", FULL, ring(4, stride=4)).ici == FULL * 3 / 4 / 2 * 4


def test_a_plane_has_the_links_of_both_dimensions():
    network = torus(4, 4, wraps=(True, True, False))
    assert network.group_bytes("all-gather", FULL, np.arange(16)[None]).ici == FULL * 15 / 16 / 4


def test_all_to_all_passes_the_middle():
    assert torus(8).group_bytes("all-to-all", FULL, ring(8)).ici == FULL * 8 / 4
    assert torus(8, wraps=(True, False, False)).group_bytes("all-to-all", FULL, ring(8)).ici == FULL * 8 / 8


def test_two_devices_of_a_chip_share_its_links():
    network = torus(4, cores=2)
    apart, together = np.arange(8).reshape(4, 2).T, np.arange(8)[None]
    assert network.group_bytes("all-gather", FULL, apart).ici == FULL * 3 / 4 * 2
    assert network.group_bytes("all-gather", FULL, together).ici == FULL * 7 / 8
    assert network.group_bytes("all-gather", FULL, np.array([[0, 1]])).ici == 0


def test_a_shift_round_the_ring_is_one_hop():
    pairs = np.array([[i, (i + 1) % 4] for i in range(4)])
    assert torus(4, wraps=(True, False, False)).permute_bytes(FULL, pairs).ici == FULL
    assert torus(4).permute_bytes(FULL, pairs).ici == 3 * FULL


def test_slices_exchange_each_device_its_part():
    network = torus(2, 2, slices=2)
    whole = network.group_bytes("all-reduce", FULL, np.arange(8)[None])
    assert whole == LinkBytes(ici=2 * FULL * 3 / 4 / 2, dcn=2 * FULL / 4 / 2)
    groups = network.across_slices()
    np.testing.assert_array_equal(groups, [[0, 4], [1, 5], [2, 6], [3, 7]])
    assert network.group_bytes("all-gather", FULL, groups) == LinkBytes(dcn=FULL / 2)
    assert network.permute_bytes(FULL, np.array([[0, 4], [4, 0]])).dcn == FULL


def test_a_switch_has_no_neighbours():
    network = Network({"a": 8}, np.array([(0, i, 0, 0, 0) for i in range(8)]), (False,) * 3, switched=True)
    assert network.group_bytes("all-gather", FULL, ring(4, stride=2)).ici == FULL * 3 / 4
    assert network.permute_bytes(FULL, np.array([[0, 7], [7, 0]])).ici == FULL


@pytest.mark.skipif(importlib.util.find_spec("jax_cuda13_plugin") is None, reason="needs jaxllm[plan-gpu]")
def test_between_hosts_of_gpus_lies_the_network():
    mesh = Mesh(np.array(find_devices(parse_topology("h100:16"))).reshape(2, 8), ("replica", "fsdp_x"))
    network = network_of(mesh, CHIPS["h100"])
    assert network.switched and network.num_partitions == 16
    assert network.group_bytes("all-reduce", FULL, np.arange(16).reshape(2, 8).T) == LinkBytes(dcn=FULL)
    assert network.group_bytes("all-gather", FULL, np.arange(16).reshape(2, 8)) == LinkBytes(ici=FULL * 7 / 8)


def test_which_slices_are_whole_tori():
    assert torus_wraps("v5p", (4, 4, 8)) == (True,) * 3
    assert torus_wraps("v5p", (2, 2, 4)) == (False,) * 3
    assert torus_wraps("v5e", (8, 16, 1)) == (False, True, False)
    assert torus_wraps("h100", (8, 1, 1)) == (False,) * 3
