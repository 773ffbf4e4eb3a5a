"""Adapters in peft's format: what a file says of published weights, reading it back, and files of other models."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxllm.checkpoint.hf import published_names, save_checkpoint
from jaxllm.checkpoint.peft import load_adapter, save_adapter
from jaxllm.config.alignment import AdapterConfig, AdapterTargetConfig
from jaxllm.errors import InputError
from jaxllm.families import FAMILIES
from jaxllm.families import spec as published
from jaxllm.nn.adapter import Prefix
from jaxllm.nn.model import apply
from jaxllm.nn.param import is_declared
from jaxllm.spec import Rope, tiny
from jaxllm.train.tuning import make_tuning
from tests.tiny_models import LLAMA, make_batch, random_params

QWEN = tiny(published("qwen-7b"), vocab_size=64)
DEEPSEEK = tiny(published("deepseek-v2"), vocab_size=64)
INTERNLM2 = tiny(published("internlm2-7b"), vocab_size=64)
CHATGLM2 = tiny(published("chatglm2-6b"), vocab_size=64)
FAMILY = {family.name: family for family in FAMILIES}


def tuned(spec, seed=0, **options):
    """Return (tuning, what is trained: none of it zero)."""
    tuning, rng = make_tuning(spec, AdapterConfig(**options)), np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.value.shape) * 0.2, jnp.float32)  # noqa: E731
    return tuning, jax.tree.map(draw, tuning.trained(), is_leaf=is_declared)


def saved(folder, spec, family=None, **options):
    """Save an adapter; return (tuning, what is trained, the file's tensors, its config)."""
    tuning, trained = tuned(spec, **options)
    family = None if family is None else FAMILY[family]
    save_adapter(folder, spec, tuning.join(trained, None)[1], tuning.config, family=family, base_model="org/base")
    fields = json.loads((folder / "adapter_config.json").read_text())
    return tuning, trained, load_file(folder / "adapter_model.safetensors"), fields


CASES = {
    "qwen, fused": (QWEN, "qwen", dict(targets=["c_attn", "mlp.c_proj"], rank=2, alpha=6.0)),
    "qwen, parts of fused": (QWEN, "qwen", dict(targets=["q", "v", "o"], rank=2, alpha=6.0, rank_stabilized=True)),
    "internlm2, interleaved": (INTERNLM2, "internlm2", dict(targets=["wqkv", "w2"], rank=3, alpha=5.0, layers=1)),
    "deepseek-v2": (
        DEEPSEEK,
        "deepseek_v2",
        dict(targets=["kv_b_proj", "q_a", "down"], per_target=[AdapterTargetConfig(name="q_a", rank=3, alpha=1.0)]),
    ),
    "llama, both ends": (LLAMA, "llama", dict(targets=["embedding", "head"], rank=2)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_file_says_what_the_merged_weights_say(tmp_path, name):
    spec, family, options = CASES[name]
    tuning, trained, tensors, fields = saved(tmp_path / "adapter", spec, family, **options)
    base = jax.tree.map(np.asarray, random_params(spec))
    config = FAMILY[family].to_hf(spec)
    before = published_names(spec, base, config)
    after = published_names(spec, jax.jit(tuning.merge)(trained, base), config)
    changed = {key for key in before if not np.array_equal(before[key], after[key])}
    modules = {key.split(".lora_")[0].removeprefix("base_model.model.") + ".weight" for key in tensors}
    assert modules == changed
    for key in sorted(changed):
        module = key.removesuffix(".weight")
        stem = f"base_model.model.{module}.lora_" + ("embedding_{}" if module == "model.embed_tokens" else "{}.weight")
        a, b = tensors[stem.format("A")], tensors[stem.format("B")]
        scale = of_pattern(fields, "alpha_pattern", module, "lora_alpha") / a.shape[0] ** (
            0.5 if fields["use_rslora"] else 1
        )
        assert a.shape[0] == of_pattern(fields, "rank_pattern", module, "r")
        assert any(module.endswith(f".{target}") or module == target for target in fields["target_modules"])
        product = (b @ a).T if module == "model.embed_tokens" else b @ a
        np.testing.assert_allclose(after[key] - before[key], product * scale, atol=1e-5)

    options, arrays = load_adapter(tmp_path / "adapter", spec, family=FAMILY[family])
    again = make_tuning(spec, options)
    same = jax.jit(again.merge)(again.start(arrays), base)
    for key, tensor in published_names(spec, same, config).items():
        np.testing.assert_allclose(tensor, after[key], atol=1e-5, err_msg=key)


def of_pattern(fields, patterns, module, default):
    return next((value for end, value in fields[patterns].items() if module.endswith(end.replace("\\", ""))),
                fields[default])  # fmt: skip


def test_the_same_options_start_from_a_saved_adapter(tmp_path):
    options = dict(targets=["q_proj", "mlp"], rank=2, layers=2)
    tuning, trained, _, _ = saved(tmp_path / "adapter", LLAMA, **options)
    started = tuning.start(load_adapter(tmp_path / "adapter", LLAMA)[1])
    jax.tree.map(lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-6), started, trained)
    for changed, message in (
        (dict(rank=4), r"layers/attention/q/kernel have shapes .*, expected .* by model, adapter.rank"),
        (dict(layers=1), "layers/attention/q/kernel is adapted in more than the last adapter.layers = 1"),
        (dict(targets=["q_proj"]), "found a product beside layers/mlp/down/kernel, expected nothing"),
    ):
        with pytest.raises(InputError, match=message):
            make_tuning(LLAMA, AdapterConfig(**options | changed)).start(load_adapter(tmp_path / "adapter", LLAMA)[1])


def test_adapters_for_other_models_and_of_other_kinds_are_refused(tmp_path):
    folder = tmp_path / "adapter"
    saved(folder, LLAMA, targets=["q", "down"], rank=2)
    path, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    tensors, fields = load_file(path), json.loads(config.read_text())
    wider = dataclasses.replace(LLAMA, hidden_size=32)
    message = r"another model: model.layers.0.mlp.down_proj has A \(2, 40\) and B \(24, 2\), expected \(2, 40\) and "
    with pytest.raises(InputError, match=message + r"\(32, 2\) \(adapter_config.json says that it is for 'org/base'\)"):
        load_adapter(folder, wider)
    with pytest.raises(InputError, match=r"it adapts model\.layers\.0\.mlp\.down_proj, which this one does not have"):
        load_adapter(folder, QWEN)
    for change, message in (
        ({"use_dora": True}, "use_dora = True is not read here"),
        ({"bias": "all"}, "bias = 'all' is not read here"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3', expected LORA or PREFIX_TUNING"),
        ({"r": 8}, "has rank 2, adapter_config.json says 8"),
        ({"lora_alpha": "big"}, "lora_alpha = 'big', expected a positive number"),
        ({"rank_pattern": [1]}, r"rank_pattern = \[1\], expected an object"),
    ):
        config.write_text(json.dumps(fields | change))
        with pytest.raises(InputError, match=message):
            load_adapter(folder, LLAMA)
    config.write_text(json.dumps(fields))
    first = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    for changed, message in (
        (first, r"it adapts layers \[0\]; expected all, or the last ones"),
        (first | {"base_model.model.norm.lora_X": np.ones((2, 2), np.float32)}, "unknown tensor base_model.model.norm"),
        (dict(list(first.items())[:1]), r"found \['A'\], expected A"),
    ):
        save_file(changed, path)
        with pytest.raises(InputError, match=message):
            load_adapter(folder, LLAMA)
    with pytest.raises(InputError, match=r"expected model.safetensors"):
        load_adapter(tmp_path, LLAMA)


def test_a_prefix_lies_as_peft_and_thudm_store_it(tmp_path):
    tuning, trained, tensors, fields = saved(tmp_path / "peft", CHATGLM2, "chatglm2", kind="prefix", prefix_length=3)
    rows = tensors["prompt_embeddings"]
    kept = CHATGLM2.attention.num_kv_heads, CHATGLM2.attention.head_dim
    assert rows.shape == (3, CHATGLM2.num_layers * 2 * np.prod(kept))
    # As PrefixEncoder's users view it: [places, layers * 2, heads, width], keys before values.
    viewed = rows.reshape(3, CHATGLM2.num_layers * 2, *kept)
    np.testing.assert_array_equal(viewed[:, 2], trained["k"][1])
    np.testing.assert_array_equal(viewed[:, 3], trained["v"][1])
    assert (fields["num_virtual_tokens"], fields["token_dim"]) == (3, np.prod(kept))
    thudm = tmp_path / "thudm"
    thudm.mkdir()
    save_file({"transformer.prefix_encoder.embedding.weight": rows}, thudm / "model.safetensors")
    (encoder,) = load_file(tmp_path / "peft" / "model.safetensors").items()
    assert encoder[0] == "transformer.prefix_encoder.embedding.weight"
    np.testing.assert_array_equal(encoder[1], rows)
    for folder, family in ((tmp_path / "peft", FAMILY["chatglm2"]), (thudm, None)):
        options, arrays = load_adapter(folder, CHATGLM2, family=family)
        assert (options.kind, options.prefix_length) == ("prefix", 3)
        found = make_tuning(CHATGLM2, options).start(arrays)
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, trained))
    network = make_tuning(CHATGLM2, dataclasses.replace(tuning.config, prefix_hidden=4))
    with pytest.raises(InputError, match="a saved prefix has no network"):
        network.start(arrays)
    with pytest.raises(InputError, match=r"embedding.weight has shape \(3, 128\), expected \[places, 96\]"):
        load_adapter(thudm, LLAMA)


def test_the_network_of_a_thudm_prefix_is_run_once(tmp_path):
    rng, width = np.random.default_rng(0), CHATGLM2.num_layers * 2 * 2 * 16
    shapes = {"embedding.weight": (3, 8), "trans.0.weight": (5, 8), "trans.0.bias": (5,)}
    shapes |= {"trans.2.weight": (width, 5), "trans.2.bias": (width,)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file({f"transformer.prefix_encoder.{k}": v for k, v in tensors.items()}, tmp_path / "model.safetensors")
    prefix: Prefix = load_adapter(tmp_path, CHATGLM2)[1]["layers"]["attention"]["prefix"]
    hidden = np.tanh(tensors["embedding.weight"] @ tensors["trans.0.weight"].T + tensors["trans.0.bias"])
    rows = hidden @ tensors["trans.2.weight"].T + tensors["trans.2.bias"]
    np.testing.assert_allclose(prefix.v[1, 2], rows[2].reshape(-1, 2, 16)[3], rtol=1e-5)


def test_what_peft_has_no_format_for_is_refused(tmp_path):
    partial = AdapterConfig(kind="partial", targets=["mlp"])
    with pytest.raises(InputError, match="format is for lora and prefix"):
        save_adapter(tmp_path / "a", LLAMA, {}, partial)
    with pytest.raises(InputError, match=r"cannot say 2 layers and lm_head\.weight too"):
        saved(tmp_path / "b", LLAMA, targets=["head", "q"], layers=2)
    assert not any(tmp_path.iterdir())


PEFT_CASES = {
    "lora": dict(targets=["q_proj", "v", "mlp", "head"], rank=3, alpha=5.0, rank_stabilized=True),
    "last layers": dict(targets=[], rank=2, layers=1),
    "prefix": dict(kind="prefix", prefix_length=4),
}


@pytest.mark.parametrize("name", PEFT_CASES)
def test_peft_computes_the_same(tmp_path, name):
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    spec = dataclasses.replace(LLAMA, position=Rope(theta=1e4), max_position_embeddings=64)
    params = random_params(spec, scale=0.2)
    tuning, trained, _, _ = saved(tmp_path / "adapter", spec, **PEFT_CASES[name])
    save_checkpoint(tmp_path / "base", spec, params)
    tokens = np.random.default_rng(0).integers(0, spec.vocab_size, (2, 8))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    with torch.no_grad():
        wanted = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()(torch.tensor(tokens)).logits
    params, adapter = tuning.join(trained, params)
    logits = apply(spec, params, make_batch(tokens), adapter=adapter).logits
    np.testing.assert_allclose(logits, wanted.numpy(), atol=1e-5 * np.abs(wanted.numpy()).max())
