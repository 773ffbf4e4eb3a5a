"""Import and export: what comes in goes out bitwise, and other families' layouts mean the same model."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxllm
from jaxllm.checkpoint.convert import import_folder, import_run
from jaxllm.checkpoint.export import export_model
from jaxllm.checkpoint.express import express_as
from jaxllm.checkpoint.hf import load_checkpoint, save_checkpoint
from jaxllm.checkpoint.opened import Opened
from jaxllm.errors import InputError
from jaxllm.families.qwen import QWEN as QWEN_FAMILY
from jaxllm.families.qwen2 import QWEN2
from jaxllm.pretrained import open_model
from jaxllm.spec import GQA, Head, Rope
from jaxllm.tokenizers.chat import CHAT_FORMATS
from jaxllm.tokenizers.train import train_bpe
from tests.checkpoint.torch_writer import write_torch
from tests.conftest import GOLDENS
from tests.tiny_models import LLAMA, QWEN, WINDOWED_QWEN, random_params

MODELS = GOLDENS / "models"
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A llama in two shards and two dtypes, with a buffer and files beside it."""
    source = MODELS / "llama2-gqa"
    folder = tmp_path_factory.mktemp("published")
    tensors = load_file(source / "model.safetensors")
    tensors = {
        name: array if "norm" in name else array.astype(ml_dtypes.bfloat16) for name, array in tensors.items()
    } | {INV_FREQ: np.linspace(1, 0.1, 4, dtype=np.float32)}
    files = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: array for name, array in tensors.items() if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    shutil.copy(source / "config.json", folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>"}')
    return folder


@pytest.fixture(scope="module")
def run(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "run"
    import_run(published, folder)
    return folder


def contents(folder):
    """Return tensors, with the file each is in, and the other files of a published folder."""
    tensors = {
        (path.name, name): (array.dtype, array.shape, array.tobytes())
        for path in folder.glob("*.safetensors")
        for name, array in load_file(path).items()
    }
    others = {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}
    jsons = {name: json.loads(others.pop(name)) for name in ("config.json", "model.safetensors.index.json")}
    return tensors, others, jsons["config.json"], jsons["model.safetensors.index.json"]["weight_map"]


def test_a_run_exports_what_was_imported_bitwise(published, run, tmp_path):
    export_model(open_model(run), tmp_path / "back")
    assert contents(tmp_path / "back") == contents(published)


def test_a_run_holds_the_numbers_in_the_narrowest_dtype_that_can(run):
    opened = open_model(run)
    assert {leaf.dtype for leaf in jax.tree.leaves(opened.params)} == {jnp.dtype("float32")}
    assert opened.generation_config == {"eos_token_id": [2, 7]}
    assert sorted(path.name for path in run.iterdir()) == ["checkpoints", "published", "spec.json"]


def test_an_imported_run_is_the_published_model(published, run):
    ids = [[1, 5, 9, 2]]
    expected = jaxllm.load_pretrained(published).logits(ids)
    model = jaxllm.load(run)
    np.testing.assert_array_equal(model.logits(ids), expected)
    assert model.generation_config == {"eos_token_id": [2, 7]}


def test_torch_files_become_safetensors_of_the_same_names(published, tmp_path):
    tensors = load_file(MODELS / "llama2-gqa/model.safetensors")
    torch_folder = tmp_path / "torch"
    torch_folder.mkdir()
    write_torch(torch_folder / "pytorch_model.bin", tensors)
    shutil.copy(MODELS / "llama2-gqa/config.json", torch_folder)
    assert import_folder(torch_folder, tmp_path / "hf") == len(tensors)
    jaxllm.load_pretrained(torch_folder).save_pretrained(tmp_path / "saved")
    for folder in (tmp_path / "hf", tmp_path / "saved"):
        written = load_file(folder / "model.safetensors")
        assert {name: array.tobytes() for name, array in written.items()} == {
            name: array.tobytes() for name, array in tensors.items()
        }
        assert json.loads((folder / "config.json").read_text()) == json.loads(
            (torch_folder / "config.json").read_text()
        )


def test_what_is_no_known_model_is_refused_in_any_format(tmp_path):
    source = tmp_path / "model"
    shutil.copytree(MODELS / "llama2-gqa", source)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    save_file({name: array for name, array in tensors.items() if "norm" not in name}, source / "model.safetensors")
    with pytest.raises(InputError, match=r"7 tensors are missing, first \['model\.layers\.0\.input_layernorm\.weight"):
        import_folder(source, tmp_path / "out")
    (source / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(InputError, match=r"GPT2LMHeadModel.* is not supported; expected one of .*LlamaForCausalLM"):
        import_folder(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_faulty_source_leaves_nothing_behind(published, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(published, broken)
    (broken / "model-00002-of-00002.safetensors").write_bytes(b"\0")
    for convert in (import_run, import_folder):
        with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors"):
            convert(broken, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("content", ['{"a": 1}', '{"a": {"dtype": "float32", "file": "../a.safetensors"}}', "[]", "{"])
def test_a_faulty_record_of_the_source_is_refused(run, tmp_path, content):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    (copy / "published/tensors.json").write_text(content)
    with pytest.raises(InputError, match=r"published/tensors\.json: "):
        open_model(copy)


def export_as(target, source, folder):
    notes = export_model(open_model(source), folder, target=target)
    return notes, json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("internlm-7b", "llama"),
        ("internlm2-gqa", "llama"),
        ("baichuan2-7b", "llama"),
        ("qwen1-short", "qwen2"),
    ],
)
def test_another_familys_layout_means_the_same_model(tmp_path, name, target):
    notes, config = export_as(target, MODELS / name, tmp_path / "out")
    assert config["model_type"] == target
    assert "auto_map" not in config
    golden = np.load(MODELS / name / "golden.npz")
    with jax.default_matmul_precision("highest"):
        logits = jaxllm.load_pretrained(tmp_path / "out").logits(golden["input_ids"])
    np.testing.assert_allclose(logits, golden["logits"], atol=1e-4)
    assert [note.partition(":")[0] for note in notes] == (["left out"] * 2 if name.startswith("qwen") else [])


@pytest.mark.parametrize("name", ["internlm-7b", "internlm2-linear-bias", "baichuan2-7b", "baichuan-7b", "qwen1-short"])
def test_transformers_reads_the_exported_folder(tmp_path, name):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    export_as("qwen2" if name.startswith("qwen") else "llama", MODELS / name, tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    golden = np.load(MODELS / name / "golden.npz")
    with torch.no_grad():
        logits = model(torch.tensor(golden["input_ids"])).logits.numpy()
    np.testing.assert_allclose(logits, golden["logits"], atol=2e-4)


def test_a_normalised_head_is_folded():
    spec = dataclasses.replace(LLAMA, head=Head(normalized=True, max_z_loss=2e-4))
    params = random_params(spec)
    for tied in (False, True):
        head = dataclasses.replace(spec.head, tie_word_embeddings=tied)
        own = {name: leaf for name, leaf in params.items() if not (tied and name == "head")}
        found = express_as("llama", dataclasses.replace(spec, head=head), own)
        assert found.spec.head == Head()
        raw = np.asarray(own["embedding"].T if tied else own["head"])
        np.testing.assert_allclose(found.params["head"], raw / np.linalg.norm(raw, axis=0), rtol=1e-6)
        assert found.notes == ()


@pytest.mark.parametrize(
    ("target", "spec", "expected"),
    [
        ("llama", QWEN, "LogN, or biases on only some"),
        ("qwen2", LLAMA, "a qwen2 config cannot express this model's attention"),
        ("llama", WINDOWED_QWEN, "cannot express windows"),
        ("qwen2", WINDOWED_QWEN, "a qwen2 config cannot express this model's window"),
        ("llama", jaxllm.spec("baichuan-13b"), "a llama config cannot express position Alibi"),
        ("qwen2", jaxllm.spec("deepseek-v2-lite"), "a Qwen2 config cannot express attention MLA"),
        ("llama", jaxllm.spec("glm-130b"), "a llama config cannot express this model's .*residual"),
        ("gpt2", LLAMA, "cannot write a model as 'gpt2', expected one of llama, qwen2"),
    ],
)
def test_what_a_target_cannot_express_is_named(target, spec, expected):
    with pytest.raises(InputError, match=expected):
        express_as(target, spec, {})


def test_notes_say_what_is_left_out():
    spec = dataclasses.replace(QWEN, position=Rope(theta=1e4, scaling=QWEN.position.scaling))
    found = express_as("qwen2", spec, {})
    assert found.notes == (
        "left out: LogN scaling of queries beyond 6 tokens",
        "left out: dynamic NTK scaling beyond 6 tokens",
    )
    assert found.spec == dataclasses.replace(QWEN, position=Rope(theta=1e4), logn=None)


def test_remote_code_and_what_asks_for_it_stay_behind(tmp_path):
    side_files = {
        "modeling_x.py": b"raise SystemExit",
        "tokenizer.model": b"\0",
        "tokenizer_config.json": b'{"auto_map": {"AutoTokenizer": ["x", null]}, "add_bos_token": false}',
        "generation_config.json": b'{"chat_format": "raw", "eos_token_id": 3, "top_p": 0.8, "stop_words_ids": [[3]]}',
    }
    source = tmp_path / "source"
    save_checkpoint(source, LLAMA, random_params(LLAMA))
    for name, content in side_files.items():
        (source / name).write_bytes(content)
    # Not open_model: that vocabulary is none.
    opened = Opened(*load_checkpoint(source, dtype=jnp.dtype("float32")))
    export_model(opened, tmp_path / "out", target="llama", dtype=jnp.dtype("bfloat16"))
    out = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert set(out) == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.model", "tokenizer_config.json"),
    }
    assert json.loads(out["tokenizer_config.json"]) == {"add_bos_token": False, "tokenizer_class": "LlamaTokenizer"}
    assert json.loads(out["generation_config.json"]) == {"eos_token_id": 3, "top_p": 0.8}
    assert json.loads(out["config.json"])["torch_dtype"] == "bfloat16"
    assert {array.dtype for array in load_file(tmp_path / "out/model.safetensors").values()} == {np.dtype("bfloat16")}
    export_model(opened, tmp_path / "same")
    assert {name: (tmp_path / "same" / name).read_bytes() for name in side_files} == side_files


def test_a_model_made_here_is_exported_with_a_tokenizer_that_others_read(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat " * 50], vocab_size=270)
    spec = dataclasses.replace(LLAMA, vocab_size=270)
    export_model(Opened(spec, random_params(spec), tokenizer=tokenizer), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        *("config.json", "model.safetensors", "generation_config.json"),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == tokenizer.eos_id
    loaded = jaxllm.load_pretrained(tmp_path / "out")
    assert loaded.tokenizer.encode("the cat sat") == tokenizer.encode("the cat sat")


def test_the_chat_format_of_a_family_goes_along_as_a_template(tmp_path):
    tokenizer = train_bpe(["the cat sat on the mat " * 50], vocab_size=270)
    spec = dataclasses.replace(QWEN, vocab_size=270, position=Rope(theta=1e4, scaling=QWEN.position.scaling))
    opened = Opened(spec, random_params(spec), config=QWEN_FAMILY.to_hf(spec), tokenizer=tokenizer)
    export_model(opened, tmp_path / "out", target="qwen2")
    template = (tmp_path / "out/chat_template.jinja").read_text()
    assert template == CHAT_FORMATS[QWEN_FAMILY.chat(opened.config, tokenizer.special_tokens)].jinja_template()
    again = open_model(tmp_path / "out")
    export_model(dataclasses.replace(again, tokenizer=None), tmp_path / "again", target="qwen2")
    assert (tmp_path / "again/chat_template.jinja").read_text() == template


def test_export_never_mixes_with_what_is_there(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    opened = open_model(run)
    with pytest.raises(InputError, match="exists and is not empty"):
        export_model(opened, tmp_path / "out")
    with pytest.raises(InputError, match="exists and is not empty"):
        import_run(MODELS / "llama2-gqa", tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]


WINDOWED = dataclasses.replace(
    LLAMA, attention=GQA(num_heads=4, num_kv_heads=2, head_dim=8, qkv_bias=True), window=(None, 4, 4)
)


@pytest.mark.parametrize("spec", [dataclasses.replace(WINDOWED, window=None), WINDOWED], ids=["full", "windows above"])
def test_qwen2_configs_come_back(spec, tmp_path):
    assert QWEN2.spec_from_hf(QWEN2.to_hf(spec)) == spec
    save_checkpoint(tmp_path / "x", spec, random_params(spec), config=QWEN2.to_hf(spec))
    assert open_model(tmp_path / "x").spec == spec


def test_a_published_qwen2_config_is_understood():
    """Qwen2-7B's: windows of which the switch is off."""
    config = {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151643,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "initializer_range": 0.02,
        "intermediate_size": 18944,
        "max_position_embeddings": 131072,
        "max_window_layers": 28,
        "model_type": "qwen2",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0,
        "sliding_window": 131072,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.37.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    }
    spec = QWEN2.spec_from_hf(config)
    assert jaxllm.count_params(spec) == 7_615_616_512
    assert spec.window is None
    on = QWEN2.spec_from_hf(config | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096})
    assert on.window == (None,) * 20 + (4096,) * 8
    kinds = ["full_attention"] * 27 + ["sliding_attention"]
    with pytest.raises(InputError, match="layer_types and max_window_layers 28 contradict"):
        QWEN2.spec_from_hf(config | {"layer_types": kinds})
