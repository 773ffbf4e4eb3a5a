"""Options of the stages after pretraining."""

# ruff: noqa: RUF009 - option() and section() build dataclass fields

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxllm.config.declare import option, required


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatConfig:
    """How conversations are written and what of them is trained."""

    format: str | None = option(
        None, "a chat format (docs/chat.md); default: that of the weights or the family, or ChatML if in the vocabulary"
    )
    labels: Literal["assistant", "published"] = option(
        "assistant", "'assistant': its turns with the token that ends them; 'published': as the family's own script"
    )
    turns: Literal["all", "last"] = option("all", "which of the assistant's turns are trained")


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterTargetConfig:
    """What differs for some of the matrices."""

    name: str = required("as in adapter.targets")
    rank: int | None = option(None, "rank; default: adapter.rank", ge=1)
    alpha: float | None = option(None, "alpha; default: adapter.alpha", gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Parameter-efficient tuning.

    lora: low-rank products beside matrices (arXiv:2106.09685); prefix: trained keys and values before each layer's own
    (P-tuning v2, arXiv:2110.07602); partial: some of the weights themselves.
    """

    kind: Literal["lora", "prefix", "partial"] = option("lora", "what is trained")
    targets: list[str] = option(
        list,
        "lora, partial: matrices by logical name (q, k, v, o, gate, up, down, head, embedding ...) or by that of the "
        "published tensor (c_attn, query_key_value, W_pack ...); lora: [] is every linear layer but the head",
    )
    rank: int = option(8, "lora: rank", ge=1)
    alpha: float = option(16.0, "lora: the product is scaled by alpha / rank", gt=0)
    rank_stabilized: bool = option(False, "lora: scale by alpha / rank^1/2 (arXiv:2312.03732)")
    dropout: float = option(0.0, "lora: share of inputs that its product does not see in training", ge=0, lt=1)
    per_target: list[AdapterTargetConfig] = option(list, "lora: other ranks and alphas for some targets")
    layers: int | None = option(None, "lora, partial: only so many of the last layers; null: all", ge=1)
    prefix_length: int = option(128, "prefix: trained places before each layer's keys", ge=1)
    prefix_hidden: int | None = option(
        None, "prefix: the keys and values come from a two-layer network of this width; null: trained themselves", ge=1
    )
    base: Literal["float32", "bfloat16", "int8", "nf4"] = option("float32", "how the frozen weights are held")
    weights: str | None = option(None, "adapter to go on from: a run, or a folder in peft's format; null: a fresh one")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RankingConfig:
    """The loss of a reward model; its score is read at the last token of an answer."""

    loss: Literal["ranking", "focal"] = option(
        "ranking", "'ranking': -log sigmoid(difference - margin); 'focal': InternLM2's (arXiv:2403.17297 eq. 1)"
    )
    gamma: float = option(2.0, "focal: how fast pairs that are told apart fade", ge=0)
    margins: Literal["none", "small", "large", "data"] = option(
        "none",
        "margin by a pair's label (Llama 2, arXiv:2307.09288 table 27), or the number in the row itself ('data')",
    )
    barrier: float = option(
        0.0, "weight of the log barrier that keeps scores within barrier_bound (InternLM2: 0.02)", ge=0
    )
    barrier_bound: float = option(5.0, "largest score that the barrier allows", gt=0)
    center: float = option(0.0, "weight of (chosen + rejected)^2, which keeps scores around 0", ge=0)
    language_modeling: float = option(
        0.0,
        "weight of the cross-entropy of chosen answers, against forgetting (a preference model's pretraining)",
        ge=0,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOConfig:
    """Direct preference optimisation (arXiv:2305.18290) and its variants."""

    beta: float = option(0.1, "weight of staying near the reference", gt=0)
    variant: Literal["sigmoid", "sigmoid_norm", "robust", "hinge", "ipo"] = option(
        "sigmoid", "the loss; sigmoid_norm and ipo take means over tokens in place of sums"
    )
    label_smoothing: float = option(0.0, "share of preferences taken to be wrong (sigmoid: cDPO, robust)", ge=0, lt=0.5)
    sft_weight: float = option(0.0, "weight of the cross-entropy of chosen answers, a mean over their tokens", ge=0)
    reference: Literal["live", "precomputed", "none"] = option(
        "live", "the reference runs beside the policy, or once before training; 'none': reference-free"
    )
    reference_weights: str | None = option(None, "the reference; default: model.weights")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How answers are sampled, prompts x samples of them for each round of updates; a row is data.seq_len long."""

    prompts: int = required("prompts in a round", ge=1)
    samples: int = option(1, "answers to each prompt", ge=1)
    max_new_tokens: int = required("longest answer; prompts may have the rest of data.seq_len", ge=1)
    temperature: float = option(1.0, "sampling temperature, of the policy in the loss too", gt=0)
    top_p: float | None = option(None, "sample from the fewest tokens that reach this probability", gt=0, le=1)
    top_k: int | None = option(None, "sample from so many tokens", ge=1)
    batch_size: int | None = option(None, "answers sampled at once; default: all of a round", ge=1)
    gather: Literal["round", "token"] = option(
        "round", "weights that FSDP splits are put together once a round, or for every token, which needs no copy"
    )
    epochs: int = option(1, "times that each answer is trained on", ge=1)
    reference_weights: str | None = option(None, "the reference of the KL divergence; default: model.weights")
    eval_samples: int = option(1, "answers to each held-out prompt, the first with temperature 0", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """One part of a reward."""

    kind: Literal["model", "exact", "math", "regex", "length", "repetition", "function", "code", "reasoning_gym"] = (
        required("what is rewarded; see docs/post_training.md")
    )
    name: str | None = option(None, "its name in the records; default: the kind")
    weight: float = option(1.0, "factor in the sum")
    path: str | None = option(None, "model: run with a reward model; function: package.module:function")
    pattern: str | None = option(
        None, "regex: what an answer must match; exact, math: where the answer stands, group 1"
    )
    system: str | None = option(None, "model: system message that it reads (InternLM2's conditions)")
    target: int | None = option(None, "length: tokens beyond which the reward falls", ge=1)
    ngram: int = option(4, "repetition: words in a repeated piece", ge=1)
    timeout: float = option(5.0, "code: seconds for one answer", gt=0)
    memory_mb: int = option(512, "code: memory of one answer", ge=64)
    allow_code: bool = option(False, "code: yes, run what the model wrote on this machine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PPOConfig:
    """Proximal policy optimisation (arXiv:1707.06347) with a value model."""

    critic: str | None = option(
        None, "run with the reward model that the value model starts from; default: model.weights"
    )
    critic_learning_rate: float | None = option(None, "of the value model; default: optimizer.learning_rate", gt=0)
    critic_warmup: int = option(0, "first updates, in which only the value model learns (Qwen: 50)", ge=0)
    kl_coef: float = option(0.04, "weight of the divergence from the reference in the reward", ge=0)
    kl_coef_end: float | None = option(None, "its value at the end of the run, reached linearly; null: constant", ge=0)
    gamma: float = option(1.0, "discount of rewards", ge=0, le=1)
    lam: float = option(0.95, "lambda of generalised advantage estimation (arXiv:1506.02438)", ge=0, le=1)
    clip: float = option(0.2, "how far the ratio may leave 1", gt=0)
    value_clip: float | None = option(0.2, "how far a value may leave the one before the round; null: no limit", gt=0)
    value_weight: float = option(1.0, "weight of the value loss", gt=0)
    whiten_advantages: bool = option(True, "advantages of a round get mean 0 and deviation 1")
    normalize_rewards: Literal["none", "mean", "mean_std", "whiten"] = option(
        "none", "rewards less their running mean, also over their running deviation, or whitened within a round"
    )
    reward_clip: float | None = option(None, "largest reward, after that", gt=0)
    combine: Literal["sum", "llama2"] = option(
        "sum", "'llama2': the parts 'safety' and 'helpfulness' as in arXiv:2307.09288 section 3.2.3"
    )
    pretrain_weight: float = option(0.0, "weight of the loss on data.pretrain in each update (InternLM2: 0.5)", ge=0)
    pretrain_rows: int = option(1, "rows of data.pretrain in each update", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GRPOConfig:
    """Group relative policy optimisation (DeepSeekMath, arXiv:2402.03300) and its variants."""

    kl_coef: float = option(0.04, "weight of the k3 estimate of the divergence from the reference, in the loss", ge=0)
    clip_low: float = option(0.2, "how far the ratio may fall below 1", gt=0)
    clip_high: float | None = option(None, "how far it may rise above (DAPO: 0.28); default: clip_low", gt=0)
    ratio: Literal["token", "sequence", "whole"] = option(
        "token",
        "ratio of each token, an answer's geometric mean of them (GSPO), or its whole ratio (DeepSeek-V2 eq. 32)",
    )
    reduction: Literal["sequence_mean", "token_mean", "fixed"] = option(
        "sequence_mean", "mean over an answer's tokens then answers, over all tokens (DAPO), or over max_new_tokens"
    )
    std: Literal["population", "sample", "none"] = option(
        "population", "deviation within a group that advantages are divided by ('none': Dr. GRPO)"
    )
    eps: float = option(1e-6, "added to that deviation", ge=0)
    supervision: Literal["outcome", "process"] = option(
        "outcome", "'process': rewards of steps (arXiv:2402.03300 section 4.1.3); needs a reward that gives them"
    )
    reference_every: int | None = option(
        None, "rounds after which the policy becomes the reference (iterative GRPO); null: never", ge=1
    )
    drop_equal_groups: bool = option(False, "answers of groups with equal rewards are not trained on (DAPO)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class HealthConfig:
    """Thresholds of the warnings about a run that learns nothing; see docs/post_training.md."""

    strict: bool = option(False, "stop at the first warning, after saving")
    kl: float = option(10.0, "nats per answer from the reference that are too far", gt=0)
    clipped: float = option(0.5, "share of clipped ratios that is too high", gt=0, le=1)
    unfinished: float = option(0.9, "share of answers without a stop token that is too high", gt=0, le=1)
    length_growth: float = option(3.0, "mean length of answers, relative to the first rounds, that is too long", gt=1)
