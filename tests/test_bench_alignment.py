"""The comparison with TRL: what both sides are told to do, and what is made of their times."""

import importlib.util
import sys
from pathlib import Path

import pytest

from jaxllm.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("bench_alignment", ROOT / "scripts" / "bench_alignment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(ROOT / "scripts"))


def test_trl_is_given_the_numbers_of_the_configs(bench):
    grpo = load_config([ROOT / bench.CONFIGS["grpo"]], [*bench.AS_TRL["grpo"], "seed=3"])
    assert bench.examples(grpo) == grpo.rollout.prompts * grpo.rollout.samples
    given = bench.shared(grpo, Path("out"), 7) | bench.of_grpo(grpo)
    assert given["learning_rate"] == grpo.optimizer.learning_rate and given["seed"] == 3
    assert given["per_device_train_batch_size"] == 7
    assert (given["beta"], given["epsilon"]) == (grpo.grpo.kl_coef, grpo.grpo.clip_low)
    assert given["adam_beta2"] == grpo.optimizer.b2 and given["max_grad_norm"] == grpo.optimizer.clip_norm
    dpo = load_config([ROOT / bench.CONFIGS["dpo"]])
    given = bench.shared(dpo, Path("out"), 7) | bench.of_dpo(dpo)
    assert given["lr_scheduler_kwargs"] == {"min_lr_rate": dpo.schedule.floor}
    assert dict(zip(given["loss_type"], given["loss_weights"], strict=True)) == {
        "sigmoid": 1,
        "sft": dpo.dpo.sft_weight,
    }


def test_the_configs_ask_for_nothing_that_trl_is_not_told(bench):
    """What they do not set has the value that TRL's loss has built in."""
    grpo = load_config([ROOT / bench.CONFIGS["grpo"]], bench.AS_TRL["grpo"])
    assert (grpo.grpo.ratio, grpo.grpo.reduction, grpo.grpo.supervision) == ("token", "sequence_mean", "outcome")
    assert (grpo.grpo.std, grpo.grpo.eps) == ("sample", 1e-4) and grpo.grpo.clip_high is None
    assert (grpo.rollout.top_p, grpo.rollout.top_k, grpo.rollout.epochs) == (None, None, 1)
    assert [(reward.kind, reward.weight) for reward in grpo.rewards] == [("exact", 1.0)]
    dpo = load_config([ROOT / bench.CONFIGS["dpo"]])
    assert (dpo.dpo.variant, dpo.dpo.label_smoothing, dpo.dpo.reference) == ("sigmoid", 0.0, "live")
    assert all((config.adapter, config.train.grad_accum) == (None, 1) for config in (grpo, dpo))


def test_the_speed_leaves_out_the_first_updates(bench):
    times = [100.0, 150.0, 160.0, 170.0, 180.0, 182.0, 184.0]
    assert bench.speed(times, [99.0] * 5 + [10.0, 20.0], 4) == {"updates_per_s": 0.5, "tokens_per_s": 30.0}


def test_the_times_of_a_run_are_those_of_its_records(bench, tmp_path):
    lines = [
        '{"kind": "train", "step": 1, "tokens": 100, "answer_tokens": 7.0}',
        '{"kind": "eval", "step": 1, "reward": 0.5}',
        '{"kind": "train", "step": 2, "tokens": 200, "answer_tokens": 8.0, "tokens_per_second": 50.0}',
        '{"kind": "train", "step": 3, "tokens": 300, "answer_tokens": 9.0, "tokens_per_second": 25.0}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert bench.recorded(tmp_path) == ([0.0, 2.0, 6.0], [7.0, 8.0, 9.0])


def test_the_table_compares_within_rounds(bench):
    def figures(speed, tokens):
        rest = dict(seconds=60, cpu_seconds=90, memory_MB=900, greedy=0.75, sampled=0.5)
        return dict(updates_per_s=speed, tokens_per_s=tokens, **rest)

    start = bench.Score(greedy=0.5, sampled=0.25)
    found = bench.table("grpo", start, [figures(2.0, 30), figures(3.0, 30)], [figures(1.0, 15), figures(2.0, 15)])
    assert "| updates/s | 2.5 (2 to 3) | 1.5 (1 to 2) |" in found
    assert "| times as fast, in each round | 2.00, 1.50 | |" in found
    assert "| right, most likely answer (0.500 before) | 0.75 | 0.75 |" in found
    assert "tokens/s" not in bench.table("dpo", start, [figures(2.0, 0)], [figures(1.0, 0)])


def test_both_rewards_agree(bench):
    from jaxllm.config.alignment import RewardConfig
    from jaxllm.rewards import Completion, make_reward

    reward = make_reward(RewardConfig(kind="exact"))
    for answer in ("1 2 3", " 1 2 3\n", "1 2", "1  2 3", ""):
        completion = Completion(
            prompt="", response=answer, reference="1 2 3", row={"_origin": "x:1"}, num_tokens=3, finished=True
        )
        assert bench.exact([answer], ["1 2 3"]) == reward([completion]), answer
