"""A family that nobody published: all that it takes to add one is this file of data.

Its layout has what other families have apart: LayerNorms and biases everywhere, keys, values and queries in one matrix
by key/value group, the gate behind the up projection, half of each head rotated by neighbouring pairs, a tied head.
"""

from jaxllm.families.base import BOOKKEEPING, ConfigReader, Family, head_key, require_parts
from jaxllm.families.glm import layer_norm_keys
from jaxllm.families.keymap import Key, joined, linear
from jaxllm.spec import GQA, MLP, Head, ModelSpec, Norm, Rope


def spec_from_hf(config):
    """Read a plover config.json."""
    read = ConfigReader(config, "plover")
    read.ignore(*BOOKKEEPING)
    width, heads = read.size("width"), read.size("heads")
    spec = ModelSpec(
        vocab_size=read.size("words"),
        hidden_size=width,
        num_layers=read.size("depth"),
        max_position_embeddings=read.size("span"),
        attention=GQA(
            num_heads=heads, num_kv_heads=read.size("groups"), head_dim=width // heads, qkv_bias=True, out_bias=True
        ),
        position=Rope(theta=read.number("base"), rotary_fraction=0.5, layout="interleaved"),
        mlp=MLP(intermediate_size=read.size("inner"), activation="gelu_tanh", bias=True),
        norm=Norm(kind="layer", eps=read.number("eps")),
        head=Head(tie_word_embeddings=True),
    )
    read.finish()
    return spec


def spec_to_hf(spec):
    """Write a plover config.json."""
    require_parts(spec, "plover", attention=GQA, position=Rope)
    return {
        "architectures": ["PloverForCausalLM"],
        "words": spec.vocab_size,
        "width": spec.hidden_size,
        "depth": spec.num_layers,
        "span": spec.max_position_embeddings,
        "heads": spec.attention.num_heads,
        "groups": spec.attention.num_kv_heads,
        "base": spec.position.theta,
        "inner": spec.mlp.intermediate_size,
        "eps": spec.norm.eps,
    }


def keys(spec):
    """Return the table of a plover checkpoint."""
    attention, width, inner = spec.attention, (spec.hidden_size,), (spec.mlp.intermediate_size,)
    queries = (attention.num_heads, attention.head_dim)
    keys_values = (attention.num_kv_heads, attention.head_dim)
    ours, outputs = "layers/attention", [keys_values, keys_values, queries]
    return [
        Key("nest.words", ("embedding",)),
        *layer_norm_keys("nest.{}.before", "layers/attention_norm"),
        *joined(
            "nest.{}.look",
            [f"{ours}/{name}" for name in "kvq"],
            outputs,
            width,
            bias=True,
            num_groups=attention.num_kv_heads,
        ),
        *linear("nest.{}.seen", f"{ours}/o", queries, width, bias=True),
        *layer_norm_keys("nest.{}.between", "layers/mlp_norm"),
        *joined("nest.{}.think", ["layers/mlp/up", "layers/mlp/gate"], [inner, inner], width, bias=True),
        *linear("nest.{}.thought", "layers/mlp/down", inner, width, bias=True),
        *layer_norm_keys("nest.after", "final_norm"),
        head_key(spec, "nest.say"),
    ]


PLOVER_MINI = ModelSpec(
    vocab_size=62,
    hidden_size=32,
    num_layers=2,
    max_position_embeddings=64,
    attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True, out_bias=True),
    position=Rope(theta=500.0, rotary_fraction=0.5, layout="interleaved"),
    mlp=MLP(intermediate_size=40, activation="gelu_tanh", bias=True),
    norm=Norm(kind="layer", eps=1e-4),
    head=Head(tie_word_embeddings=True),
)

PLOVER = Family(
    name="plover",
    architectures=("PloverForCausalLM",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=(r"nest\.\d+\.feathers",),
    sizes={"plover-mini": PLOVER_MINI},
)
