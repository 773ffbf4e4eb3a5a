"""Names of slices, and the devices that compilers have for them."""

import importlib.metadata

import pytest

from jaxllm.errors import InputError
from jaxllm.plan.chips import CHIPS
from jaxllm.plan.topology import find_devices, parse_topology
from jaxllm.train.flops import peak_flops
from tests.plan.plan_configs import needs_libtpu


@pytest.mark.parametrize(
    ("name", "chips", "devices"),
    [("v5p:8x8x8", 512, 512), ("v5e:16x16", 256, 256), ("tpu7x:2x2x1", 4, 8), ("v4:2x2x1", 4, 4), ("h100:8", 8, 8)],
)
def test_names_give_chips_and_devices(name, chips, devices):
    topology = parse_topology(name)
    assert (topology.num_chips, topology.num_devices, topology.name, str(topology)) == (chips, devices, name, name)


def test_slices_multiply():
    topology = parse_topology("v5e:4x4", 3)
    assert (topology.num_chips, str(topology)) == (48, "3 slices v5e:4x4")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v9:2x2", "unknown chip 'v9'; known: v4, v5e, v5p, v6e, tpu7x, h100"),
        ("v5e", "expected CHIP:DIMENSIONS, as v5p:8x8x8, v5e:16x16 or h100:8, found 'v5e'"),
        ("v5e:3x3", "v5e:3x3: no such slice; v5e has 1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"),
        ("v5e:32x32", "no such slice"),
        ("v5p:8x8", "v5p has 1x1x1, 2x2x1, 2x2x2, 2x2x4, 2x4x4, and whole cubes"),
        ("v5p:0x4x4", "no such slice"),
        ("v5p:32x32x32", "up to 6144 chips"),
        ("h100:12", "h100 has 1, 2, 4 or a multiple of 8 GPUs"),
        ("h100:2x4", "no such slice"),
    ],
)
def test_other_names_are_refused_with_those_that_there_are(name, message):
    with pytest.raises(InputError, match=f"^topology: .*{message}"):
        parse_topology(name)


def test_hosts_of_gpus_are_not_slices():
    with pytest.raises(InputError, match="name all GPUs"):
        parse_topology("h100:8", 2)


def test_peaks_agree_with_those_of_training():
    kinds = {"v4": "TPU v4", "v5e": "TPU v5e", "v5p": "TPU v5p", "v6e": "TPU v6e", "h100": "NVIDIA H100 80GB HBM3"}
    assert {name: CHIPS[name].flops for name in kinds} == {name: peak_flops(kind) for name, kind in kinds.items()}


@needs_libtpu
@pytest.mark.parametrize("chip", [name for name, chip in CHIPS.items() if chip.platform == "tpu"])
def test_the_compiler_has_the_devices_of_every_chip(chip):
    sizes = ["2x2", "1x1", "16x16"] if CHIPS[chip].slices else ["2x2x1", "1x1x1", "4x8x8"]
    for size in sizes:
        topology = parse_topology(f"{chip}:{size}")
        assert len(find_devices(topology)) == topology.num_devices


@needs_libtpu
def test_slices_have_their_own_devices():
    devices = find_devices(parse_topology("v5e:2x2", 2))
    assert [device.slice_index for device in devices] == [0] * 4 + [1] * 4


@pytest.mark.parametrize(
    ("name", "package", "extra"), [("v5e:2x2", "libtpu", "plan"), ("h100:8", "jax-cuda13-plugin", "plan-gpu")]
)
def test_a_missing_compiler_names_its_extra(monkeypatch, name, package, extra):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(
        InputError, match=rf"needs the package '{package}'; install it with: pip install 'jaxllm\[{extra}\]'"
    ):
        find_devices(parse_topology(name))


@needs_libtpu
def test_a_compiler_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda package: ['libtpu==9.8.7.*; extra == "tpu"'])
    with pytest.raises(InputError, match=r"libtpu \S+ is installed, but jax \S+ needs 9.8.7; install it with"):
        find_devices(parse_topology("v5e:2x2"))
