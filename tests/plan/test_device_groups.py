"""Groups of devices as HLO writes them, and the mesh axes they are."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.plan.groups import axes_of, replica_groups, source_target_pairs
from jaxllm.plan.hlo import Instruction

SIZES = {"replica": 2, "fsdp_x": 4, "expert": 1, "tensor": 3}
TOTAL = 24


def collective(attributes):
    return Instruction("c", "all-reduce", (), (), "", f", channel_id=1, {attributes}, to_apply=%add")


def along(axes):
    """Return the groups along mesh axes, by definition."""
    ids = np.arange(TOTAL).reshape(tuple(SIZES.values()))
    moved = [list(SIZES).index(axis) for axis in axes]
    kept = [dim for dim in range(len(SIZES)) if dim not in moved]
    return ids.transpose(kept + moved).reshape(-1, int(np.prod([SIZES[axis] for axis in axes])))


some_axes = st.lists(st.sampled_from(list(SIZES)), unique=True, min_size=1).map(
    lambda axes: [axis for axis in SIZES if axis in axes]
)


def written(axes):
    """Return the three ways in which the groups along some axes are written."""
    groups = along(axes)
    lists = ",".join("{" + ",".join(map(str, members)) + "}" for members in groups.tolist())
    dims = list(range(len(SIZES)))
    order = [dim for dim in dims if list(SIZES)[dim] not in axes] + [list(SIZES).index(axis) for axis in axes]
    shape, source, turned = (",".join(map(str, each)) for each in (groups.shape, SIZES.values(), order))
    mesh = ",".join(f"'{axis}'={size}" for axis, size in SIZES.items())
    named = ",".join(f"'{axis}'" for axis in axes)
    return [f"{{{lists}}}", f"[{shape}]<=[{source}]T({turned})", f"mesh[{mesh}] {{{named}}}"]


@given(axes=some_axes)
def test_all_forms_mean_the_same_groups_and_axes(axes):
    for text in written(axes):
        groups = replica_groups(collective(f"replica_groups={text}"), TOTAL)
        np.testing.assert_array_equal(groups, along(axes))
        assert axes_of(groups, SIZES) == tuple(axis for axis in axes if SIZES[axis] > 1)


def test_plain_iota_and_all_devices():
    np.testing.assert_array_equal(
        replica_groups(collective("replica_groups=[2,4]<=[8]"), 8), [[0, 1, 2, 3], [4, 5, 6, 7]]
    )
    np.testing.assert_array_equal(replica_groups(collective("replica_groups={}"), 4), [[0, 1, 2, 3]])


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}", [[0, 2], [1, 3]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,2,1,0) {'b'}", [[3, 2], [1, 0]]),
        ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ],
    ids=["turned", "listed", "part-of-an-axis"],
)
def test_meshes_with_an_order_of_their_own(text, groups):
    assert replica_groups(collective(f"replica_groups={text}"), 8).tolist() == groups


def test_pairs_of_a_permute():
    pairs = source_target_pairs(collective("source_target_pairs={{0,3},{3,6},{1,4}}"))
    assert pairs.tolist() == [[0, 3], [3, 6], [1, 4]]
    assert axes_of(pairs, SIZES) == ("fsdp_x",)
    assert axes_of(source_target_pairs(collective("source_target_pairs={}")), SIZES) == ()


def test_other_forms_are_refused():
    with pytest.raises(ValueError, match="replica_groups: V9"):
        replica_groups(collective("replica_groups=V9[2]"), 8)


def test_this_jax_writes_a_form_that_is_known():
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    split, kept = (jax.NamedSharding(mesh, jax.P(spec)) for spec in ("b", None))
    text = jax.jit(lambda x: x * 2, out_shardings=kept).lower(jax.ShapeDtypeStruct((8,), "float32", sharding=split))
    line = next(line for line in text.compile().as_text().splitlines() if " all-gather" in line)
    assert axes_of(replica_groups(collective(line), 8), dict(mesh.shape)) == ("b",)
