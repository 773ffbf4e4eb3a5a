"""Models out of runs of every stage, reward models in published folders, and their scores as users get them."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxllm
from jaxllm.checkpoint.export import export_model
from jaxllm.checkpoint.reward_folder import load_reward_folder, save_reward_folder
from jaxllm.config.alignment import AdapterConfig, ChatConfig
from jaxllm.families import FAMILIES
from jaxllm.families.internlm2 import INTERNLM2
from jaxllm.nn import score
from jaxllm.nn.model import apply
from jaxllm.nn.param import Initializer, initial_values
from jaxllm.pretrained import open_model
from jaxllm.spec import Head, tiny
from jaxllm.tokenizers.train import Base, train_bpe
from jaxllm.train.run_models import find_model
from jaxllm.train.tuning import make_tuning
from jaxllm.train.tuning.headless import Headless, without_head
from jaxllm.train.weights import RunWeights
from tests.saved_runs import save_run
from tests.tiny_models import make_batch, random_params

SPEC = dataclasses.replace(tiny(jaxllm.spec("internlm2-1.8b"), vocab_size=320), num_layers=1)
TEXTS = ["the small cat sees the red house"] * 20
DIALOGUE = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "the red house"}]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(TEXTS, vocab_size=280)


@pytest.fixture(scope="module")
def reward_params():
    params = random_params(SPEC, scale=0.1)
    return {"model": without_head(params), "score": {"kernel": np.linspace(-1, 1, SPEC.hidden_size, dtype=np.float32)}}


@pytest.fixture(scope="module")
def reward_run(tmp_path_factory, tokenizer, reward_params):
    return save_run(tmp_path_factory.mktemp("runs") / "rm", SPEC, reward_params, stage="reward", tokenizer=tokenizer)


def by_hand(spec, params, ids):
    """Return the score of one row of ids."""
    row = np.pad(ids, (0, -len(ids) % 32))
    batch = make_batch([row], segment_ids=[np.arange(len(row)) < len(ids)])
    hidden = jax.jit(lambda batch: apply(spec, params["model"], batch, return_logits=False).hidden)(batch)
    return float(hidden[0, len(ids) - 1] @ params["score"]["kernel"])


def test_a_reward_model_scores_conversations_and_texts_at_their_ends(reward_run, reward_params, tokenizer):
    model = jaxllm.load_reward_model(reward_run)
    longer = [*DIALOGUE, {"role": "user", "content": "sees"}, {"role": "assistant", "content": "the cat " * 30}]
    found = model.score([DIALOGUE, "the small cat", longer], batch_size=2)
    assert found.dtype == np.float32 and found.shape == (3,)
    names = tokenizer.special_tokens
    chat = "<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nthe red house<|im_end|>"
    text = [tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id, *tokenizer.encode("the small cat")]
    expected = [tokenizer.encode(chat, allow_special=True), [*text, tokenizer.eos_id]]
    assert "<|im_end|>" in names and expected[0][-1] == names["<|im_end|>"]
    for value, ids in zip(found, expected, strict=False):
        assert value == pytest.approx(by_hand(SPEC, reward_params, ids), abs=1e-5)
    np.testing.assert_allclose(model.score([longer]), found[2:], atol=1e-5)


def test_internlm2_reads_its_scores_at_a_token_of_their_own(tmp_path, reward_params):
    internlm2_folder(tmp_path / "rm", reward_params)
    opened = open_model(tmp_path / "rm")
    export_model(opened, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["reward_token_id"] == 300
    model = jaxllm.load_reward_model(tmp_path / "rm")
    told = [{"role": "system", "content": "Be short."}, *DIALOGUE]
    found = model.score([DIALOGUE, told])
    # As get_score of their code: no system message that the conversation has not, all of it, then the token.
    for value, system in zip(found, ("", "<|im_start|>system\nBe short.<|im_end|>\n"), strict=True):
        chat = f"<s>{system}<|im_start|>user\nthe cat<|im_end|>\n<|im_start|>assistant\nthe red house<|im_end|>\n"
        ids = [*opened.tokenizer.encode(chat, allow_special=True), 300]
        assert value == pytest.approx(by_hand(SPEC, reward_params, ids), abs=1e-5)


def internlm2_folder(folder, params):
    """Write a reward model as InternLM2's are published, with a tokenizer of its own."""
    base = Base(special_tokens=("<s>", "</s>", "<|im_start|>", "<|im_end|>"), bos_token="<s>", eos_token="</s>")
    tokenizer = train_bpe(TEXTS, vocab_size=276, base=dataclasses.replace(base, pad_token="</s>"))
    options = dict(dtype=None, side_files={}, tokenizer=tokenizer)
    config = INTERNLM2.to_hf(SPEC) | {"architectures": ["InternLM2ForRewardModel"], "reward_token_id": 300}
    save_reward_folder(folder, SPEC, params, config=config, **options)


def test_what_cannot_be_scored_is_refused(reward_run):
    model = jaxllm.load_reward_model(reward_run)
    for items, message in (
        (DIALOGUE, "pass"),
        ("a text", "pass"),
        ([DIALOGUE[:1]], r"items\[0\]: the last message is of 'user'"),
        ([[]], r"items\[0\]: the last message is of 'no message'"),
    ):
        with pytest.raises(jaxllm.InputError, match=message):
            model.score(items)


@pytest.mark.parametrize(
    ("size", "architecture", "tensor"),
    [
        ("llama2-70b", "LlamaForSequenceClassification", "score.weight"),
        ("internlm2-1.8b", "InternLM2ForRewardModel", "v_head.weight"),
        ("qwen-7b", "QWenForSequenceClassification", "score.weight"),
    ],
)
def test_published_reward_models_come_back(tmp_path, tokenizer, size, architecture, tensor):
    spec = dataclasses.replace(tiny(jaxllm.spec(size), vocab_size=320), num_layers=2)
    family = next(family for family in FAMILIES if size in family.sizes)
    params = {"model": without_head(random_params(spec)), "score": {"kernel": jnp.arange(float(spec.hidden_size))}}
    options = dict(dtype=None, side_files={}, tokenizer=tokenizer, pad_id=3)
    save_reward_folder(tmp_path / "rm", spec, params, config=family.to_hf(spec), **options)
    config = json.loads((tmp_path / "rm" / "config.json").read_text())
    assert config["architectures"] == [architecture] and len(config["id2label"]) == 1 and config["pad_token_id"] == 3
    tensors = load_file(tmp_path / "rm" / "model.safetensors")
    assert tensors[tensor].shape == (1, spec.hidden_size) and not {"lm_head.weight", "output.weight"} & tensors.keys()
    again_spec, again, _, _ = load_reward_folder(tmp_path / "rm", dtype=jnp.float32)
    assert again_spec == spec
    jax.tree.map(np.testing.assert_array_equal, again, params)
    opened = open_model(tmp_path / "rm")
    export_model(opened, tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == config


def test_a_head_with_several_labels_is_no_reward_model(tmp_path, reward_run):
    export_model(open_model(reward_run), tmp_path / "rm")
    path = tmp_path / "rm" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"id2label": {"0": "A", "1": "B"}}))
    with pytest.raises(jaxllm.InputError, match="has 2 labels"):
        jaxllm.load_reward_model(tmp_path / "rm")


def test_exporting_a_reward_model_and_loading_it_keeps_its_scores(tmp_path, reward_run):
    export_model(open_model(reward_run), tmp_path / "rm")
    expected = jaxllm.load_reward_model(reward_run).score([DIALOGUE, "the cat"])
    np.testing.assert_array_equal(jaxllm.load_reward_model(tmp_path / "rm").score([DIALOGUE, "the cat"]), expected)
    with pytest.raises(jaxllm.InputError, match="in the layout of its own family alone"):
        export_model(open_model(reward_run), tmp_path / "qwen2", target="qwen2")


def test_a_reward_model_is_no_language_model_and_the_other_way_round(tmp_path, reward_run, tokenizer):
    policy = save_run(tmp_path / "sft", SPEC, random_params(SPEC), tokenizer=tokenizer)
    export_model(open_model(reward_run), tmp_path / "published")
    for path in (reward_run, tmp_path / "published"):
        with pytest.raises(jaxllm.InputError, match="found a reward model"):
            jaxllm.load(path)
        with pytest.raises(jaxllm.InputError, match="found a reward model"):
            find_model(path).model()
    with pytest.raises(jaxllm.InputError, match="expected a reward model"):
        jaxllm.load_reward_model(policy)


def test_the_policy_of_a_ppo_run_is_its_model(tmp_path, reward_params):
    params = random_params(SPEC, seed=3)
    run = save_run(tmp_path / "ppo", SPEC, {"policy": params, "critic": reward_params}, stage="ppo")
    jax.tree.map(np.testing.assert_array_equal, find_model(run).model(), params)
    assert find_model(run).spec == SPEC


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_the_adapter_of_a_run_is_merged_into_what_it_stands_beside(tmp_path, stage):
    base = random_params(SPEC, seed=4)
    path = save_run(tmp_path / "base", SPEC, base)
    adapter = AdapterConfig(rank=2, alpha=4.0)
    tuning = make_tuning(SPEC, adapter)
    tuning = Headless(tuning) if stage == "reward" else tuning
    trained = jax.tree.map(
        lambda leaf: jnp.full(leaf.value.shape, 0.1), tuning.trained(), is_leaf=lambda leaf: hasattr(leaf, "axes")
    )
    expected = tuning.merge(trained, tuning.split(base)[1])
    kernel = {"kernel": jnp.ones(SPEC.hidden_size)}
    saved = {"model": trained, "score": kernel} if stage == "reward" else trained
    run = save_run(tmp_path / "tuned", SPEC, saved, stage=stage, adapter=adapter, init_from=path)
    found = find_model(run)
    merged = found.reward_model()["model"] if stage == "reward" else found.model()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), merged, expected)
    kernel_path = merged["layers"]["attention"]["q"]["kernel"]
    assert float(np.abs(kernel_path - base["layers"]["attention"]["q"]["kernel"]).max()) > 1e-3
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(jaxllm.InputError, match="its adapter stands beside the weights of"):
        find_model(run).reward_model() if stage == "reward" else find_model(run).model()


def test_an_adapter_beside_another_model_is_refused(tmp_path):
    other = dataclasses.replace(SPEC, hidden_size=SPEC.hidden_size * 2)
    path = save_run(tmp_path / "base", other, random_params(other))
    adapter = AdapterConfig(rank=2)
    trained = initial_values(make_tuning(SPEC, adapter).trained(), jax.random.key(0), Initializer())
    run = save_run(tmp_path / "tuned", SPEC, trained, adapter=adapter, init_from=path)
    with pytest.raises(jaxllm.InputError, match="which are another model's"):
        find_model(run).model()


def test_other_models_of_a_run_share_its_tokenizer(tmp_path, reward_run, tokenizer):
    other = train_bpe(["bird dog fish"] * 9, vocab_size=270)
    with pytest.raises(jaxllm.InputError, match="rm: this model has another tokenizer"):
        RunWeights(None, None, other).reward_model(reward_run)
    policy = save_run(tmp_path / "sft", SPEC, random_params(SPEC), tokenizer=tokenizer)
    with pytest.raises(jaxllm.InputError, match="expected a reward model"):
        RunWeights(None, None).reward_spec(policy)


def test_a_model_chats_as_its_run_was_told(tmp_path, tokenizer):
    for name in ("chatml", "llama2"):
        chat = ChatConfig(format=name)
        run = save_run(tmp_path / name, SPEC, random_params(SPEC), tokenizer=tokenizer, chat=chat)
        assert jaxllm.load(run).chat_format().name == name
    assert jaxllm.load(run).chat_format("chatml").name == "chatml"


def test_tied_models_have_no_head_to_leave_out():
    tied = dataclasses.replace(SPEC, head=Head(tie_word_embeddings=True))
    params = random_params(tied)
    headless = Headless(make_tuning(tied, None))
    assert headless.trained().keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, headless.split(params)[0], params)
    assert score.declarations(tied)["kernel"].value.shape == (tied.hidden_size,)
