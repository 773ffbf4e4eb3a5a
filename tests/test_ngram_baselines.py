"""The n-gram baselines against a brute-force Kneser-Ney over Python dicts, and as a command on real shards."""

import importlib.util
import itertools
import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxllm.data.shards import tokenize_files
from jaxllm.tokenizers.train import train_bpe

SCRIPT = Path(__file__).parents[1] / "scripts" / "ngram_baselines.py"
spec = importlib.util.spec_from_file_location("ngram_baselines", SCRIPT)
ngram_baselines = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ngram_baselines)

VOCAB_SIZE = 5
EOS = 4
DOCUMENTS = st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=6)


def padded(document: list[int], order: int) -> list[int]:
    return [EOS] * (order - 1) + document + [EOS]


def count_grams(documents: list[list[int]], order: int) -> list[Counter]:
    """Return the counts of each length: occurrences of the longest n-grams, distinct left neighbours of the others."""
    levels = [Counter(gram for d in documents for gram in windows(padded(d, order), order))]
    while len(levels) < order:
        levels.insert(0, Counter(gram[1:] for gram in levels[0]))
    return levels


def windows(tokens: list[int], length: int) -> list[tuple[int, ...]]:
    return [tuple(tokens[k : k + length]) for k in range(len(tokens) - length + 1)]


def slow_probability(levels: list[Counter], gram: tuple[int, ...]) -> float:
    if not gram:
        return 1 / VOCAB_SIZE
    counts = levels[len(gram) - 1]
    shorter = slow_probability(levels, gram[1:])
    following = [count for other, count in counts.items() if other[:-1] == gram[:-1]]
    if not following:
        return shorter
    once, twice = list(counts.values()).count(1), list(counts.values()).count(2)
    discount = once / (once + 2 * twice) if once else 0.5
    return (max(counts[gram] - discount, 0) + discount * len(following) * shorter) / sum(following)


@given(DOCUMENTS, st.sampled_from([1, 2, 3]))
def test_every_probability_is_that_of_the_definition_and_each_context_sums_to_one(documents, order):
    events = ngram_baselines.make_events(map(np.array, documents), order=order, eos_id=EOS)
    model = ngram_baselines.KneserNey(events, VOCAB_SIZE)
    everything = np.array(list(itertools.product(range(VOCAB_SIZE), repeat=order)))
    probabilities = model.probabilities(everything)
    levels = count_grams(documents, order)
    np.testing.assert_allclose(probabilities, [slow_probability(levels, tuple(gram)) for gram in everything])
    np.testing.assert_allclose(probabilities.reshape(-1, VOCAB_SIZE).sum(axis=1), 1.0)
    assert probabilities.min() > 0


def test_events_start_anew_at_each_document_and_end_with_it():
    events = ngram_baselines.make_events([np.array([1, 2]), np.array([3])], order=3, eos_id=EOS)
    assert events.tolist() == [[4, 4, 1], [4, 1, 2], [1, 2, 4], [4, 4, 3], [4, 3, 4]]


@pytest.fixture
def shards(tmp_path):
    sentences = ["the cat sat on the mat. ", "the dog sat on the log. ", "a cat and a dog ran. "]
    texts = ["".join(order) * 4 for order in itertools.permutations(sentences)]
    tokenizer = train_bpe(texts, vocab_size=280)
    for name, part in (("train", texts[:5]), ("heldout", texts[5:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in part))
        tokenize_files([tmp_path / f"{name}.jsonl"], tokenizer, tmp_path / name)
    other = train_bpe(texts, vocab_size=270)
    tokenize_files([tmp_path / "heldout.jsonl"], other, tmp_path / "other")
    return tmp_path, texts, tokenizer


def test_the_command_prints_and_writes_losses_over_exactly_the_predicted_tokens(shards, capsys):
    folder, texts, tokenizer = shards
    arguments = ["--train", str(folder / "train"), "--heldout", str(folder / "heldout")]
    assert ngram_baselines.main([*arguments, "--json", str(folder / "out.json")]) == 0
    results = json.loads((folder / "out.json").read_text())
    assert results["unigram"]["loss"] > results["bigram"]["loss"] > results["trigram"]["loss"]
    assert f"{results['trigram']['loss']:.4f}" in capsys.readouterr().out

    documents = [tokenizer.encode(text) for text in texts]
    events = ngram_baselines.make_events(map(np.array, documents[:5]), order=2, eos_id=tokenizer.eos_id)
    model = ngram_baselines.KneserNey(events, tokenizer.vocab_size)
    nats = -np.log(model.probabilities(ngram_baselines.make_events([documents[5]], order=2, eos_id=tokenizer.eos_id)))
    assert len(nats) == len(documents[5]) + 1
    assert results["bigram"]["loss"] == pytest.approx(nats.mean())
    bits_per_byte = nats.sum() / math.log(2) / len(texts[5].encode())
    assert results["bigram"]["bits_per_byte"] == pytest.approx(bits_per_byte)


@pytest.mark.parametrize(("name", "message"), [("other", "another tokenizer"), ("missing", "missing")])
def test_shards_that_do_not_fit_end_with_one_message_and_exit_code_2(shards, capsys, name, message):
    folder, _, _ = shards
    assert ngram_baselines.main(["--train", str(folder / "train"), "--heldout", str(folder / name)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and str(folder / name) in error


@pytest.fixture
def run(shards):
    folder, _, tokenizer = shards
    run = folder / "run"
    tokenizer.save(run / "tokenizer")
    (run / "config.yaml").write_text(
        f"run_dir: {run}\ntokenizer: elsewhere\nmodel: {{name: qwen-mini}}\n"
        f"data: {{train: [{{path: {folder}/train.jsonl}}], heldout: [{{path: {folder}/heldout.jsonl}}]}}\n"
        "schedule: {warmup: 1}\ntrain: {steps: 9, batch_size: 1}\n"
    )
    evaluations = [{"kind": "eval", "step": step, "loss": 9.0 - step, "bits_per_byte": 1.0} for step in (3, 7)]
    train = {"kind": "train", "step": 8, "loss": 5.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [*evaluations, train]))
    return run


def test_a_run_is_measured_on_its_own_data_beside_its_newest_evaluation(shards, run, capsys):
    folder, _, _ = shards
    arguments = [["--train", str(folder / "train"), "--heldout", str(folder / "heldout")], ["--run", str(run)]]
    for name, form in zip(("shards.json", "run.json"), arguments, strict=True):
        assert ngram_baselines.main([*form, "--json", str(folder / name)]) == 0
    results = json.loads((folder / "run.json").read_text())
    assert results.pop("the model, step 7") == {"loss": 2.0, "bits_per_byte": 1.0}
    assert results == json.loads((folder / "shards.json").read_text())
    assert "the model, step 7      2.0000" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("metrics.jsonl", '"eval"', '"other"', "no evaluation yet"),
        ("config.yaml", "}], heldout: ", "}], heldout: [], cache_dir: a, prefetch: 1} #", "no held-out data"),
        ("config.yaml", "{path: ", "{text_key: x, path: ", "text_key"),
    ],
)
def test_a_run_that_cannot_be_measured_is_refused(run, capsys, file, old, new, message):
    (run / file).write_text((run / file).read_text().replace(old, new))
    assert ngram_baselines.main(["--run", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


@pytest.mark.parametrize("arguments", [[], ["--run", "a", "--train", "b"], ["--train", "b"], ["--heldout", "b"]])
def test_either_a_run_or_shards_must_be_named(arguments):
    with pytest.raises(SystemExit) as end:
        ngram_baselines.main(arguments)
    assert end.value.code == 2
