"""Loss and gradient of GRPO are those of TRL's own trainer, for the same answers, advantages and reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxllm
from jaxllm.config.alignment import GRPOConfig
from jaxllm.train.forward import Forward
from jaxllm.train.objectives.policy import GroupPolicy
from jaxllm.train.tuning import FullTuning
from jaxllm.types import Batch, RolloutBatch
from tests.tiny_models import LLAMA, random_params

ROWS, PROMPT, ANSWER = 6, 7, 9
LENGTH = PROMPT + ANSWER
KL, CLIP = 0.05, 0.2


@pytest.fixture(scope="module")
def answers():
    """Prompts on the left and answers on the right, as TRL has them, with advantages."""
    rng = np.random.default_rng(0)
    prompts, texts = (rng.integers(2, LLAMA.vocab_size, (ROWS, width)) for width in (PROMPT, ANSWER))
    prompt_mask = np.arange(PROMPT) >= rng.integers(0, PROMPT - 1, ROWS)[:, None]
    answer_mask = np.arange(ANSWER) < rng.integers(2, ANSWER + 1, ROWS)[:, None]
    around = -np.log(LLAMA.vocab_size)
    return {
        "prompt_ids": np.where(prompt_mask, prompts, 0),
        "prompt_mask": prompt_mask.astype(int),
        "completion_ids": np.where(answer_mask, texts, 0),
        "completion_mask": answer_mask.astype(int),
        "advantages": rng.normal(size=ROWS).astype(np.float32),
        "old_per_token_logps": rng.normal(around, 0.3, (ROWS, ANSWER)).astype(np.float32),
        "ref_per_token_logps": rng.normal(around, 0.3, (ROWS, ANSWER)).astype(np.float32),
    }


def as_rows(answers):
    """Return the same as rows of ours."""
    ids, targets, positions, segments = np.zeros((4, ROWS, LENGTH), np.int32)
    weights, advantages, old, ref = np.zeros((4, ROWS, LENGTH), np.float32)
    for row in range(ROWS):
        prompt = answers["prompt_ids"][row][answers["prompt_mask"][row] == 1]
        answer = answers["completion_ids"][row][answers["completion_mask"][row] == 1]
        both = np.concatenate([prompt, answer])
        used, trained = slice(len(both)), slice(len(prompt) - 1, len(both) - 1)
        ids[row, used], positions[row, used], segments[row, used] = both, range(len(both)), 1
        targets[row, : len(both) - 1] = both[1:]
        weights[row, trained], advantages[row, trained] = 1, answers["advantages"][row]
        old[row, trained] = answers["old_per_token_logps"][row, : len(answer)]
        ref[row, trained] = answers["ref_per_token_logps"][row, : len(answer)]
    rows = Batch(tokens=ids, targets=targets, loss_weights=weights, positions=positions, segment_ids=segments)
    return jax.tree.map(jnp.asarray, RolloutBatch(rows=rows, old_logps=old, advantages=advantages, ref_logps=ref))


def test_loss_and_gradient_are_those_of_trl(answers, tmp_path):
    trl = pytest.importorskip("trl", reason="the extra 'compat' is not installed")
    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    params = random_params(LLAMA)
    jaxllm.LanguageModel(LLAMA, params).save_pretrained(tmp_path / "model")
    words = Tokenizer(WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="float32")
    options = dict(loss_type="grpo", beta=KL, epsilon=CLIP, use_bias_correction_kl=False, num_generations=2)
    machine = dict(use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=ROWS)
    trainer = trl.GRPOTrainer(
        model=model,
        args=trl.GRPOConfig(output_dir=str(tmp_path / "trl"), **options, **machine),
        reward_funcs=lambda completions, **_: [0.0] * len(completions),
        train_dataset=Dataset.from_list([{"prompt": "<end>"}] * ROWS),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>"),
    )
    trainer.current_gradient_accumulation_steps = 1
    theirs = trainer._compute_loss(model, {name: torch.tensor(value) for name, value in answers.items()})
    theirs.backward()

    forward = Forward(
        spec=LLAMA, tuning=FullTuning(LLAMA), compute_dtype=jnp.dtype("float32"), remat="none", chunk=LENGTH
    )
    objective = GroupPolicy(
        forward=forward,
        config=GRPOConfig(kl_coef=KL, clip_low=CLIP),
        reference=None,
        temperature=1.0,
        samples=2,
        max_length=ANSWER,
    )
    batch = as_rows(answers)
    totals = objective.totals(batch)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        return objective.loss_sums(params, None, batch, totals, train=True)[0] / totals["weight"]

    ours, gradient = loss(params)
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    expected = {name: parameter.grad.numpy() for name, parameter in model.named_parameters()}
    for found, name in (
        (gradient["embedding"], "model.embed_tokens.weight"),
        (gradient["head"].T, "lm_head.weight"),
        (gradient["layers"]["mlp"]["down"]["kernel"][0].T, "model.layers.0.mlp.down_proj.weight"),
        (gradient["layers"]["attention_norm"]["scale"][0], "model.layers.0.input_layernorm.weight"),
    ):
        np.testing.assert_allclose(found, expected[name], atol=2e-5 * np.abs(expected[name]).max(), err_msg=name)
