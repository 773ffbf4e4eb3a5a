"""DeepSeek-V2 and DeepSeek-V2-Lite (arXiv:2405.04434)."""

from __future__ import annotations

from jaxllm.errors import InputError
from jaxllm.families.base import BOOKKEEPING, Config, ConfigReader, Family, head_key, require_parts
from jaxllm.families.keymap import Key, Linear, PerGroup, joined, linear
from jaxllm.spec import MLA, MLP, BalanceLosses, Head, LayerGroup, ModelSpec, MoE, Norm, Rope, Yarn


def spec_from_hf(config: Config) -> ModelSpec:
    """Read a DeepSeek-V2 config.json."""
    read = ConfigReader(config, "deepseek_v2")
    read.ignore(*BOOKKEEPING, "pretraining_tp", "output_router_logits")
    read.expect("hidden_act", "silu")
    read.expect("attention_dropout", 0.0)
    read.expect("scoring_func", "softmax")
    num_heads = read.size("num_attention_heads")
    read.expect("num_key_value_heads", None, num_heads)
    nope_dim, rope_dim = read.size("qk_nope_head_dim"), read.size("qk_rope_head_dim")
    # transformers 5 writes these three along.
    read.expect("head_dim", None, rope_dim)
    read.expect("qk_head_dim", None, nope_dim + rope_dim)
    read.expect("mlp_bias", False)
    spec = ModelSpec(
        vocab_size=read.size("vocab_size"),
        hidden_size=read.size("hidden_size"),
        num_layers=read.size("num_hidden_layers"),
        max_position_embeddings=read.size("max_position_embeddings"),
        attention=MLA(
            num_heads=num_heads,
            q_lora_rank=read.size("q_lora_rank", default=None),
            kv_lora_rank=read.size("kv_lora_rank"),
            qk_nope_head_dim=nope_dim,
            qk_rope_head_dim=rope_dim,
            v_head_dim=read.size("v_head_dim"),
            bias=read.flag("attention_bias", default=False),
        ),
        position=_rope_from_hf(read),
        mlp=MLP(intermediate_size=read.size("intermediate_size")),
        moe=_moe_from_hf(read),
        norm=Norm(eps=read.number("rms_norm_eps")),
        head=Head(tie_word_embeddings=read.flag("tie_word_embeddings", default=False)),
    )
    read.finish()
    return spec


def _rope_from_hf(read: ConfigReader) -> Rope:
    inner = read.table("rope_scaling", "rope_parameters")
    theta = read.number("rope_theta", default=inner.number("rope_theta", default=10_000.0))
    if inner.number("rope_theta", default=theta) != theta:
        raise InputError("config.json (deepseek_v2): rope_theta and rope_parameters.rope_theta contradict each other")
    kind = inner.get("type", "rope_type", default="default")
    if kind not in ("default", "yarn"):
        raise InputError(f"config.json (deepseek_v2): rope type {kind!r} is not supported, expected 'yarn'")
    scaling = None
    if kind == "yarn":
        scaling = Yarn(
            factor=inner.number("factor"),
            original_max_position=inner.size("original_max_position_embeddings"),
            beta_fast=inner.number("beta_fast", default=32.0),
            beta_slow=inner.number("beta_slow", default=1.0),
            mscale=inner.weight("mscale", default=1.0),
            mscale_all_dim=inner.weight("mscale_all_dim", default=0.0),
        )
    inner.finish()
    return Rope(theta=theta, layout="interleaved", scaling=scaling)


def _moe_from_hf(read: ConfigReader) -> MoE | None:
    num_experts = read.size("n_routed_experts", default=None)
    read.expect("topk_method", "greedy", "group_limited_greedy", "gready")  # the configuration class's own spelling
    grouped = read.get("topk_method", default="greedy") == "group_limited_greedy"
    num_groups, topk_groups = read.size("n_group", default=1), read.size("topk_group", default=1)
    fields = dict(
        num_experts_per_tok=read.size("num_experts_per_tok", default=None),
        moe_intermediate_size=read.size("moe_intermediate_size", default=None),
        num_shared_experts=read.count("n_shared_experts", default=0),
        first_k_dense=read.count("first_k_dense_replace", default=0),
        layer_freq=read.size("moe_layer_freq", default=1),
        num_groups=num_groups if grouped else 1,
        topk_groups=topk_groups if grouped else 1,
        scaling_factor=read.number("routed_scaling_factor", default=1.0),
        norm_topk_prob=read.flag("norm_topk_prob", default=False),
        balance=BalanceLosses(
            expert=read.weight("aux_loss_alpha", default=0.0), per_sequence=read.flag("seq_aux", default=True)
        ),
    )
    return None if num_experts is None else MoE(num_experts=num_experts, **fields)


def spec_to_hf(spec: ModelSpec) -> Config:
    """Write a DeepSeek-V2 config.json for a spec.

    Raises:
      InputError: the spec has parts that the layout cannot say.
    """
    require_parts(spec, "DeepSeek-V2", attention=MLA, position=Rope)
    attention, moe, scaling = spec.attention, spec.moe, spec.position.scaling
    config = {
        "architectures": ["DeepseekV2ForCausalLM"],
        "model_type": "deepseek_v2",
        "attention_bias": attention.bias,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "hidden_size": spec.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": spec.mlp.intermediate_size,
        "kv_lora_rank": attention.kv_lora_rank,
        "max_position_embeddings": spec.max_position_embeddings,
        "num_attention_heads": attention.num_heads,
        "num_hidden_layers": spec.num_layers,
        "num_key_value_heads": attention.num_heads,
        "q_lora_rank": attention.q_lora_rank,
        "qk_nope_head_dim": attention.qk_nope_head_dim,
        "qk_rope_head_dim": attention.qk_rope_head_dim,
        "rms_norm_eps": spec.norm.eps,
        "rope_scaling": None,
        "rope_theta": spec.position.theta,
        "tie_word_embeddings": spec.head.tie_word_embeddings,
        "use_cache": True,
        "v_head_dim": attention.v_head_dim,
        "vocab_size": spec.vocab_size,
    }
    if isinstance(scaling, Yarn):
        config["rope_scaling"] = {
            "type": "yarn",
            "factor": scaling.factor,
            "original_max_position_embeddings": scaling.original_max_position,
            "beta_fast": scaling.beta_fast,
            "beta_slow": scaling.beta_slow,
            "mscale": scaling.mscale,
            "mscale_all_dim": scaling.mscale_all_dim,
        }
    if moe is not None:
        config |= {
            "aux_loss_alpha": moe.balance.expert,
            "first_k_dense_replace": moe.first_k_dense,
            "moe_intermediate_size": moe.moe_intermediate_size,
            "moe_layer_freq": moe.layer_freq,
            "n_group": moe.num_groups,
            "n_routed_experts": moe.num_experts,
            "n_shared_experts": moe.num_shared_experts or None,
            "norm_topk_prob": moe.norm_topk_prob,
            "num_experts_per_tok": moe.num_experts_per_tok,
            "routed_scaling_factor": moe.scaling_factor,
            "scoring_func": "softmax",
            "seq_aux": moe.balance.per_sequence,
            "topk_group": moe.topk_groups,
            "topk_method": "greedy" if moe.num_groups == 1 else "group_limited_greedy",
        }
    return config


def keys(spec: ModelSpec) -> list[Key]:
    """Return the table of a DeepSeek-V2 checkpoint."""
    rows = [
        Key("model.embed_tokens.weight", ("embedding",)),
        Key("model.norm.weight", ("final_norm/scale",)),
        head_key(spec, "lm_head.weight"),
    ]
    for group in spec.layer_groups:
        rows += _attention_keys(spec, group)
        rows += _expert_keys(spec, group) if group.moe else _dense_keys(spec, group)
    return rows


def _attention_keys(spec: ModelSpec, group: LayerGroup) -> list[Key]:
    attention, width, stack = spec.attention, (spec.hidden_size,), (group.layers,)
    layer, ours = "model.layers.{}.", f"{group.name}/attention"
    heads, latent = attention.num_heads, (attention.kv_lora_rank,)
    queries = (heads, attention.qk_nope_head_dim + attention.qk_rope_head_dim)
    values = (heads, attention.v_head_dim)
    rows = [
        Key(layer + "input_layernorm.weight", (f"{group.name}/attention_norm/scale",), stack=stack),
        Key(layer + "post_attention_layernorm.weight", (f"{group.name}/mlp_norm/scale",), stack=stack),
        *joined(
            layer + "self_attn.kv_a_proj_with_mqa",
            [f"{ours}/kv_a", f"{ours}/k_rope"],
            [latent, (attention.qk_rope_head_dim,)],
            width,
            bias=attention.bias,
            stack=stack,
        ),
        Key(layer + "self_attn.kv_a_layernorm.weight", (f"{ours}/kv_norm/scale",), stack=stack),
        Key(
            layer + "self_attn.kv_b_proj.weight",
            (f"{ours}/k_b", f"{ours}/v_b"),
            PerGroup(heads, (Linear(latent, (heads, attention.qk_nope_head_dim)), Linear(latent, values))),
            stack,
        ),
        *linear(layer + "self_attn.o_proj", f"{ours}/o", values, width, bias=attention.bias, stack=stack),
    ]
    if attention.q_lora_rank is None:
        return rows + linear(layer + "self_attn.q_proj", f"{ours}/q", width, queries, stack=stack)
    rank = (attention.q_lora_rank,)
    return [
        *rows,
        *linear(layer + "self_attn.q_a_proj", f"{ours}/q_a", width, rank, bias=attention.bias, stack=stack),
        Key(layer + "self_attn.q_a_layernorm.weight", (f"{ours}/q_norm/scale",), stack=stack),
        *linear(layer + "self_attn.q_b_proj", f"{ours}/q", rank, queries, stack=stack),
    ]


def _gated_keys(name: str, path: str, spec: ModelSpec, inner: int, stack: tuple[range, ...]) -> list[Key]:
    width = (spec.hidden_size,)
    return [
        *linear(f"{name}.gate_proj", f"{path}/gate", width, (inner,), stack=stack),
        *linear(f"{name}.up_proj", f"{path}/up", width, (inner,), stack=stack),
        *linear(f"{name}.down_proj", f"{path}/down", (inner,), width, stack=stack),
    ]


def _dense_keys(spec: ModelSpec, group: LayerGroup) -> list[Key]:
    return _gated_keys("model.layers.{}.mlp", f"{group.name}/mlp", spec, spec.mlp.intermediate_size, (group.layers,))


def _expert_keys(spec: ModelSpec, group: LayerGroup) -> list[Key]:
    moe, name, path, stack = spec.moe, "model.layers.{}.mlp", f"{group.name}/mlp", (group.layers,)
    rows = linear(f"{name}.gate", f"{path}/router", (spec.hidden_size,), (moe.num_experts,), stack=stack)
    experts = (*stack, range(moe.num_experts))
    rows += _gated_keys(f"{name}.experts.{{}}", f"{path}/experts", spec, moe.moe_intermediate_size, experts)
    if moe.num_shared_experts:
        inner = moe.moe_intermediate_size * moe.num_shared_experts
        rows += _gated_keys(f"{name}.shared_experts", f"{path}/shared", spec, inner, stack)
    return rows


_YARN = Yarn(factor=40.0, original_max_position=4096, mscale=0.707, mscale_all_dim=0.707)

_V2 = ModelSpec(
    vocab_size=102_400,
    hidden_size=5120,
    num_layers=60,
    max_position_embeddings=163_840,
    attention=MLA(
        num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    position=Rope(layout="interleaved", scaling=_YARN),
    mlp=MLP(intermediate_size=12_288),
    moe=MoE(
        num_experts=160,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        num_shared_experts=2,
        first_k_dense=1,
        num_groups=8,
        topk_groups=3,
        scaling_factor=16.0,
        balance=BalanceLosses(expert=0.001),
    ),
    norm=Norm(eps=1e-6),
)

_V2_LITE = ModelSpec(
    vocab_size=102_400,
    hidden_size=2048,
    num_layers=27,
    max_position_embeddings=163_840,
    attention=MLA(
        num_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
    ),
    position=Rope(layout="interleaved", scaling=_YARN),
    mlp=MLP(intermediate_size=10_944),
    moe=MoE(
        num_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        num_shared_experts=2,
        first_k_dense=1,
        balance=BalanceLosses(expert=0.001),
    ),
    norm=Norm(eps=1e-6),
)

DEEPSEEK_V2 = Family(
    name="deepseek_v2",
    architectures=("DeepseekV2ForCausalLM",),
    model_types=("deepseek_v2",),
    spec_from_hf=spec_from_hf,
    spec_to_hf=spec_to_hf,
    keys=keys,
    ignorable=(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",),
    tokenizer=lambda config: "deepseek_v2_tokenizer.json",
    chat=lambda config, tokens: "deepseek-v2",
    sizes={"deepseek-v2": _V2, "deepseek-v2-lite": _V2_LITE},
)
