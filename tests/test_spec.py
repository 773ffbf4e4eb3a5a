"""Specs: validation and their JSON form."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jaxllm
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES, family_of_spec
from jaxllm.spec import (
    GQA,
    MLP,
    ChunkedNTK,
    DynamicNTK,
    Head,
    LearnedBlock,
    LinearScaling,
    LogN,
    ModelSpec,
    Norm,
    Rope,
    spec_from_json,
    spec_to_json,
    tiny,
)
from tests.tiny_models import LLAMA

SIZES = [name for family in FAMILIES for name in family.sizes]

positive = st.integers(1, 10**6)
numbers = st.floats(1e-9, 1e9)
scalings = st.one_of(
    st.none(),
    st.builds(LinearScaling, factor=numbers),
    st.builds(DynamicNTK, factor=numbers, original_max_position=positive),
    st.builds(ChunkedNTK, train_length=positive),
)


@st.composite
def specs(draw):
    layers, kv_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    windows = st.tuples(*[st.none() | positive] * layers)
    return ModelSpec(
        vocab_size=draw(positive),
        hidden_size=draw(positive),
        num_layers=layers,
        max_position_embeddings=draw(positive),
        attention=GQA(
            num_heads=kv_heads * draw(st.integers(1, 4)),
            num_kv_heads=kv_heads,
            head_dim=2 * draw(positive),
            qkv_bias=draw(st.booleans()),
            out_bias=draw(st.booleans()),
        ),
        position=Rope(theta=draw(numbers), scaling=draw(scalings)),
        mlp=MLP(intermediate_size=draw(positive), bias=draw(st.booleans())),
        norm=Norm(eps=draw(numbers)),
        head=Head(tie_word_embeddings=draw(st.booleans())),
        window=draw(st.none() | windows),
        logn=draw(st.none() | st.builds(LogN, train_length=st.integers(2, 10**6))),
    )


@given(spec=specs())
def test_json_gives_back_every_spec(spec):
    again = spec_from_json(spec_to_json(spec))
    assert again == spec
    assert hash(again) == hash(spec)


def changed(**fields):
    value = json.loads(spec_to_json(LLAMA))
    for path, item in fields.items():
        *parents, last = path.split("__")
        node = value
        for parent in parents:
            node = node[parent]
        node[last] = item
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Expecting property name"),
        ("[]", "found tuple"),
        ('{"num_layers": 2}', "found an object of type None, expected one of ModelSpec, GQA"),
        (changed(type="ModelSpecs"), "found an object of type 'ModelSpecs'"),
        (changed(type=["ModelSpec"]), r"found an object of type \['ModelSpec'\]"),
        (changed(heads=3), "unexpected keyword argument 'heads'"),
        (changed(norm={"type": "Norm"}), "missing 1 required keyword-only argument: 'eps'"),
        (changed(num_layers="3"), "ModelSpec.num_layers must be a positive integer, found '3'"),
        (changed(attention={"type": "Norm", "eps": 1e-6}), "ModelSpec.attention must be GQA or MLA, found Norm"),
        (changed(position__scaling={"type": "Head"}), "Rope.scaling must be .*, found Head"),
        (changed(window=[1, 2]), "window has 2 entries for 3 layers"),
        (changed(window=[1, 2, 0]), "window sizes must be positive integers or None"),
        (changed(window=7), "ModelSpec.window must be tuple or NoneType, found 7"),
        (changed(attention__head_dim=7), "rotated dimensions of a head come in pairs, found 7"),
        (changed(norm__eps=-1.0), "Norm.eps must be a positive number, found -1.0"),
        (changed(mlp__activation="relu"), "MLP.activation must be 'silu' or 'gelu' or 'gelu_tanh', found 'relu'"),
        (changed(position__layout="pairs"), "Rope.layout must be 'half' or 'interleaved', found 'pairs'"),
        (changed(mask="full"), "ModelSpec.mask must be 'causal' or 'prefix', found 'full'"),
        (changed(logn={"type": "LogN", "train_length": 1}), "LogN train_length must be at least 2"),
        (json.dumps({"type": "Norm", "eps": 1.0}), "found Norm"),
    ],
)
def test_faulty_json_gives_one_message_naming_the_file(text, message):
    with pytest.raises(InputError, match=r"runs/a/spec.json: .*" + message):
        spec_from_json(text, "runs/a/spec.json")


@pytest.mark.parametrize("name", SIZES)
def test_tiny_specs_keep_the_structure(name):
    spec = jaxllm.spec(name)
    small = tiny(spec)
    assert small.num_layers == 2
    assert jaxllm.count_params(small) < 200_000
    assert type(small.attention) is type(spec.attention)
    if isinstance(spec.attention, GQA):
        grouped = spec.attention.num_kv_heads < spec.attention.num_heads
        assert (small.attention.num_kv_heads < small.attention.num_heads) == grouped
    assert type(small.position) is type(spec.position)
    if not isinstance(spec.position, LearnedBlock):
        assert small.position == spec.position
    assert (small.norm, small.head, small.logn, small.mask) == (spec.norm, spec.head, spec.logn, spec.mask)
    assert [group.moe for group in small.layer_groups] == [group.moe for group in spec.layer_groups]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logn": LogN(train_length=8)}, "MLA has no LogN"),
        (
            {"position": Rope(scaling=DynamicNTK(factor=1.0, original_max_position=8, cached_keys="unrotated"))},
            "MLA caches rotated keys",
        ),
        ({"position": Rope(rotary_fraction=0.5)}, "rotary_fraction must be 1"),
        ({"mlp": MLP(intermediate_size=8, gated=False)}, "experts of a mixture are gated"),
        ({"mlp": MLP(intermediate_size=8, bias=True)}, "experts of a mixture are gated"),
    ],
)
def test_what_the_layers_would_not_follow_is_refused(change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(jaxllm.spec("deepseek-v2-lite"), **change)


def test_no_more_than_a_whole_head_is_rotated():
    with pytest.raises(InputError, match="rotary_fraction must be at most 1"):
        Rope(rotary_fraction=1.5)


@pytest.mark.parametrize("name", sorted(set(SIZES) - {"internlm-104b"}))
def test_tiny_specs_have_a_published_layout(name):
    small = tiny(jaxllm.spec(name))
    family = family_of_spec(small)
    assert family.spec_from_hf(family.to_hf(small)) == small
