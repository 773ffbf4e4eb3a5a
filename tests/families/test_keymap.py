"""The ops of key tables: each is undone by its other direction, and puts every row where its description says."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.errors import InputError
from jaxllm.families.keymap import (
    Bias,
    Concat,
    Key,
    Linear,
    PerGroup,
    Same,
    expand,
    get_path,
    joined,
    linear,
    published_tensor,
    set_path,
)

sizes = st.integers(1, 4)
shapes = st.lists(sizes, min_size=1, max_size=2).map(tuple)


def numbered(shape):
    """Return an array all of whose elements differ."""
    return np.arange(math.prod(shape), dtype=np.int64).reshape(shape)


def assert_undone(op, shape):
    """Check an op on a published tensor of `shape` in both directions; return our parts."""
    array = numbered(shape)
    parts = op.to_jax(array)
    np.testing.assert_array_equal(op.to_hf(parts), array, strict=True)
    again = op.to_jax(op.to_hf(parts))
    for part, same in zip(parts, again, strict=True):
        np.testing.assert_array_equal(part, same, strict=True)
    assert sorted(np.concatenate([part.ravel() for part in parts])) == list(range(array.size))
    return parts


@given(inputs=shapes, outputs=shapes)
def test_a_linear_weight_is_transposed_with_its_sides_split(inputs, outputs):
    op = Linear(inputs, outputs)
    (kernel,) = assert_undone(op, op.shape)
    assert kernel.shape == inputs + outputs
    x = numbered(inputs)
    published = numbered(op.shape) @ x.ravel()
    np.testing.assert_array_equal(np.tensordot(x, kernel, axes=len(inputs)).ravel(), published)
    (bias,) = assert_undone(Bias(outputs), Bias(outputs).shape)
    assert bias.shape == outputs


@given(shape=shapes)
def test_what_is_kept_as_it_is(shape):
    (kept,) = assert_undone(Same(), shape)
    assert kept.shape == shape


@given(inputs=shapes, outputs=st.lists(shapes, min_size=1, max_size=3), bias=st.booleans())
def test_concatenated_parts_lie_one_after_the_other(inputs, outputs, bias):
    ops = tuple(Bias(shape) if bias else Linear(inputs, shape) for shape in outputs)
    rows = sum(op.shape[0] for op in ops)
    parts = assert_undone(Concat(ops), (rows, *ops[0].shape[1:]))
    first = 0
    for op, part in zip(ops, parts, strict=True):
        published = numbered((rows, *op.shape[1:]))[first : first + op.shape[0]]
        np.testing.assert_array_equal(op.to_hf((part,)), published)
        first += op.shape[0]


@given(
    groups=sizes,
    head_dim=sizes,
    shares=st.lists(sizes, min_size=1, max_size=3),
    inputs=shapes,
    bias=st.booleans(),
)
def test_grouped_parts_are_interleaved_by_group(groups, head_dim, shares, inputs, bias):
    outputs = [(groups * share, head_dim) for share in shares]
    ops = tuple(Bias(shape) if bias else Linear(inputs, shape) for shape in outputs)
    rows = groups * sum(shares) * head_dim
    shape = (rows, *ops[0].shape[1:])
    parts = assert_undone(PerGroup(groups, ops), shape)
    heads = numbered(shape).reshape(groups, sum(shares), head_dim, -1)
    first = 0
    for op, part, share in zip(ops, parts, shares, strict=True):
        published = op.to_hf((part,)).reshape(groups, share, head_dim, -1)
        np.testing.assert_array_equal(published, heads[:, first : first + share])
        first += share


@given(groups=sizes, inputs=shapes, outputs=st.lists(shapes, min_size=1, max_size=3))
def test_one_group_is_a_concatenation(groups, inputs, outputs):
    ops = tuple(Linear(inputs, shape) for shape in outputs)
    array = numbered((sum(op.shape[0] for op in ops), ops[0].shape[1]))
    for one, other in zip(Concat(ops).to_jax(array), PerGroup(1, ops).to_jax(array), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("op", "shape", "expected"),
    [
        (Linear((3,), (2, 2)), (3, 4), r"expected shape \(4, 3\), found \(3, 4\)"),
        (Bias((2, 2)), (2, 2), r"expected shape \(4,\), found \(2, 2\)"),
        (Concat((Linear((3,), (2,)), Linear((3,), (4,)))), (3, 6), r"expected shape \(6, 3\), found \(3, 6\)"),
        (PerGroup(2, (Linear((3,), (2,)), Linear((3,), (4,)))), (6,), r"expected shape \(6, 3\), found \(6,\)"),
    ],
)
def test_other_shapes_are_refused_even_with_as_many_elements(op, shape, expected):
    with pytest.raises(InputError, match=expected):
        op.to_jax(numbered(shape))


@given(bias=st.booleans(), num_groups=st.sampled_from([None, 2]))
def test_rows_of_a_linear_name_weight_and_bias(bias, num_groups):
    leaves = {"weight": "kernel", "bias": "bias"} if bias else {"weight": "kernel"}
    single = linear("a.{}.b", "layers/b", (3,), (4,), bias=bias)
    fused = joined("a.{}.b", ["layers/b", "layers/c"], [(4,), (2,)], (3,), bias=bias, num_groups=num_groups)
    assert {row.name: row.paths for row in single} == {
        f"a.{{}}.b.{us}": (f"layers/b/{ours}",) for us, ours in leaves.items()
    }
    assert {row.name: row.paths for row in fused} == {
        f"a.{{}}.b.{us}": (f"layers/b/{ours}", f"layers/c/{ours}") for us, ours in leaves.items()
    }


@given(first=st.integers(0, 3), layers=sizes, experts=sizes, inputs=sizes, outputs=sizes)
def test_stacked_layers_and_experts_come_back_one_by_one(first, layers, experts, inputs, outputs):
    """The law that loading and saving rest on, for tensors that are stacked on two axes."""
    stack = (range(first, first + layers), range(experts))
    rows = expand(linear("h.{}.expert.{}.up", "layers/up", (inputs,), (outputs,), stack=stack), num_layers=99)
    assert len(rows) == layers * experts
    rng = np.random.default_rng(0)
    tensors = {name: rng.normal(size=(outputs, inputs)) for name in rows}
    params = {}
    set_path(params, "layers/up/kernel", np.zeros((layers, experts, inputs, outputs)))
    for name, (key, place) in rows.items():
        (part,) = key.op.to_jax(tensors[name])
        get_path(params, key.paths[0])[place] = part
    for layer in stack[0]:
        for expert in stack[1]:
            stacked = params["layers"]["up"]["kernel"][layer - first, expert]
            np.testing.assert_array_equal(stacked.T, tensors[f"h.{layer}.expert.{expert}.up.weight"])
    for name, row in rows.items():
        again = published_tensor(row, lambda path: get_path(params, path))
        np.testing.assert_array_equal(again, tensors[name], strict=True)


def test_names_without_a_number_are_not_stacked():
    rows = expand([Key("top", ("embedding",)), Key("h.{}.n", ("layers/n",))], num_layers=2)
    assert {name: place for name, (_, place) in rows.items()} == {"top": (), "h.0.n": (0,), "h.1.n": (1,)}
