"""The tree of dataclasses that a run configuration is: every option, its type, its default and what it does."""

# ruff: noqa: RUF009 - option() and section() build dataclass fields

from __future__ import annotations

import dataclasses
from typing import Literal

from jaxllm.config.alignment import (
    AdapterConfig,
    ChatConfig,
    DPOConfig,
    GRPOConfig,
    HealthConfig,
    PPOConfig,
    RankingConfig,
    RewardConfig,
    RolloutConfig,
)
from jaxllm.config.declare import option, required, section


@dataclasses.dataclass(frozen=True, kw_only=True)
class InitConfig:
    """How parameters start (only when training from scratch)."""

    scheme: Literal["normal", "fan_in"] = option(
        "normal", "'normal': every matrix with `std`; 'fan_in': matrices with 1/sqrt(inputs)"
    )
    std: float = option(0.02, "standard deviation of matrices under 'normal' (DeepSeek: 0.006)", gt=0)
    embedding_std: float = option(0.02, "standard deviation of the token embedding", gt=0)
    scale_outputs_by_depth: bool = option(False, "multiply what writes to the residual by (2 * layers)^-1/2")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScalingConfig:
    """How rotary positions reach beyond the length of the training before; see docs/long_context.md."""

    kind: Literal["none", "linear", "dynamic", "chunked", "yarn"] = required("the rule; chunked is Qwen's dynamic NTK")
    factor: float | None = option(None, "linear, dynamic, yarn: how many times longer the context becomes", gt=0)
    original_length: int | None = option(None, "dynamic, chunked, yarn: tokens in a row of the training before", ge=1)
    cached_keys: Literal["rotated", "unrotated"] | None = option(
        None, "dynamic: how keys are cached; default: 'rotated', as transformers and InternLM2 do (InternLM: unrotated)"
    )
    beta_fast: float | None = option(None, "yarn: dimensions with more turns than this are kept; default: 32", gt=0)
    beta_slow: float | None = option(None, "yarn: dimensions with fewer are interpolated; default: 1", gt=0)
    mscale: float | None = option(None, "yarn: temperature of cos and sin; default: 1", ge=0)
    mscale_all_dim: float | None = option(None, "yarn: temperature of latent attention's scores; default: 0", ge=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """What a run changes about its model's rotary positions."""

    theta: float | None = option(None, "base of the frequencies; default: the model's own", gt=0)
    scaling: RopeScalingConfig | None = option(None, "rule for long rows; default: the model's own; 'none' removes it")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and how it computes."""

    name: str | None = option(
        None, "a size from `jaxllm env --models`, or a path to a spec.json or config.json; default: that of the weights"
    )
    weights: str | None = option(
        None, "run, checkpoint, published folder or .gguf file whose weights the run starts from; null: drawn at random"
    )
    rope: RopeConfig | None = option(None, "changes to rotary positions; they have no weights")
    logn: int | Literal["none"] | None = option(
        None, "scale queries beyond this many tokens (LogN, evaluation only); default: the model's own", ge=2
    )
    window: list[int | None] | None = option(
        None, "attention window per layer in tokens, lowest layer first; null is full attention", ge=1
    )
    max_position_embeddings: int | None = option(
        None, "tokens that a prompt and its continuation may have; default: the model's own", ge=1
    )
    compute_dtype: Literal["bfloat16", "float32"] = option("bfloat16", "dtype of activations; parameters are float32")
    remat: Literal["none", "full", "dots", "dots_with_no_batch_dims"] = option(
        "full", "what the backward pass recomputes: nothing, everything, or all but matrix products"
    )
    attention_impl: Literal["reference", "pallas"] | None = option(
        None, "attention by plain operations or by our kernels; default: kernels on TPU and GPU"
    )
    dropout: float = option(
        0.0, "share of values dropped in training: of the embeddings, and of what each layer adds to them", ge=0, lt=1
    )
    init: InitConfig = section(InitConfig, "parameter initialisation")

    @property
    def label(self) -> str:
        """What messages call the model."""
        return self.name or self.weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One source of documents."""

    path: str = required("file, glob or folder; relative paths start at the working directory")
    format: Literal["auto", "txt", "jsonl", "parquet", "shards"] = option(
        "auto", "'auto' reads the suffix; txt: one document a file; shards: made by `jaxllm data tokenize`"
    )
    rows: Literal["auto", "text", "messages", "sharegpt", "alpaca", "prompt_response", "preference", "prompt"] = option(
        "auto", "what a row is (docs/post_training.md); 'auto': told from its fields, and 'text' in pretraining"
    )
    text_key: str = option("text", "name of the text field in jsonl and parquet rows")
    system: str | None = option(None, "system message of conversations that have none; in place of their own: never")
    weight: float | None = option(None, "share of the tokens seen in training; default: the source's own size", gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankTokensConfig:
    """Ids of GLM's special tokens, for tokenizers that do not name them."""

    mask: int | None = option(None, "stands for a short span; default: the id of [MASK]", ge=0)
    smask: int | None = option(None, "stands for sentences; default: [sMASK]", ge=0)
    gmask: int | None = option(None, "stands for a long part; default: [gMASK]", ge=0)
    sop: int | None = option(None, "opens what was missing; default: <sop> or <|startofpiece|>", ge=0)
    eop: int | None = option(None, "closes what was missing; default: <eop> or <|endofpiece|>", ge=0)
    cls: int | None = option(None, "opens a document; default: [CLS] or <ENC>", ge=0)
    dblock: int | None = option(None, "stands for hidden inputs; default: [dBLOCK] or <dBLOCK>", ge=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BlankInfillingConfig:
    """GLM's pretraining task; the defaults are those of GLM-10B (arXiv:2103.10360, THUDM/GLM ds_block_10B.sh).

    A row has short spans, sentences, or one long part missing; the last where the first two are not drawn.
    """

    span_prob: float = option(0.5, "share of rows with short spans missing", ge=0, le=1)
    sentence_prob: float = option(0.3, "share of rows with sentences missing", ge=0, le=1)
    single_span_prob: float = option(0.0, "share of rows with one short span missing, drawn first", ge=0, le=1)
    span_ratio: float = option(0.15, "share of a text that its short spans hide", gt=0, le=0.5)
    mean_span_length: float = option(3.0, "mean of the Poisson distribution of the lengths of short spans", gt=0)
    sentence_ratio: float = option(0.15, "least share of a text that its missing sentences hide", gt=0, le=0.5)
    rest_min_ratio: float = option(0.25, "least share of a text that a long part hides", ge=0, lt=1)
    rest_prob: float = option(
        0.5, "share of long parts that reach to the end of the text; always in a text of several documents", ge=0, le=1
    )
    hide_prob: float = option(0.1, "share of the inputs within short spans that [dBLOCK] hides", ge=0, lt=1)
    short_prob: float = option(0.02, "share of rows that are cut into texts of a random length", ge=0, le=1)
    samples_per_row: int = option(1, "texts in a row with spans or sentences missing, in equal parts of it", ge=1)
    task_masks: bool = option(True, "[sMASK] and [gMASK] for sentences and long parts; false: [MASK] for all")
    open_with_cls: bool = option(True, "[CLS] before every document")
    equal_rows: bool = option(
        True, "rows count the same in the training loss, as with GLM's one kind to a batch; false: tokens do"
    )
    tokens: BlankTokensConfig = section(BlankTokensConfig, "special tokens")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train and evaluate on."""

    train: list[SourceConfig] = option(list, "training sources, mixed by weight")
    heldout: list[SourceConfig] = option(list, "held-out sources, read once in order at each evaluation")
    seq_len: int = option(2048, "tokens in a row", ge=1)
    packing: Literal["packed", "concat", "blank_infilling", "padded"] = option(
        "packed",
        "'packed': documents in a row do not see each other; 'concat': plain concatenation; 'blank_infilling': GLM; "
        "'padded': one example to a row, for stages after pretraining",
    )
    too_long: Literal["refuse", "skip", "truncate"] = option(
        "refuse", "examples with more tokens than a row: an error, or left out, or cut (both are counted and told)"
    )
    pairs_per_row: int = option(8, "most pairs of preferences that are packed into a row", ge=1)
    pretrain: list[SourceConfig] = option(
        list, "PPO: texts whose loss is mixed into the updates, see ppo.pretrain_weight"
    )
    blank_infilling: BlankInfillingConfig | None = option(None, "GLM's task, for packing 'blank_infilling'")
    shuffle: bool = option(True, "visit documents in a new seeded order each epoch")
    num_lanes: int | None = option(
        None,
        "independent streams that rows are dealt from; default: 64, or the largest divisor of it that fits the batches",
        ge=1,
    )
    max_bad_rows: int = option(0, "rows that may be skipped (counted and reported) before the data is refused", ge=0)
    cache_dir: str | None = option(
        None, "where tokenised copies of text sources are kept; default: inside the run folder"
    )
    prefetch: int = option(2, "batches prepared ahead of the device", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with decoupled weight decay and global-norm clipping."""

    learning_rate: float = option(3e-4, "peak learning rate", gt=0)
    b1: float = option(0.9, "decay of the first moment", ge=0, lt=1)
    b2: float = option(0.95, "decay of the second moment", ge=0, lt=1)
    eps: float = option(1e-8, "added to the root of the second moment", gt=0)
    weight_decay: float = option(0.1, "decoupled weight decay, times the learning rate", ge=0)
    decay: Literal["matrices", "all"] = option("matrices", "'matrices' leaves norms and biases undecayed")
    clip_norm: float | None = option(1.0, "largest global gradient norm; null: no clipping", gt=0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Learning rate over the run, relative to `optimizer.learning_rate`."""

    kind: Literal["cosine", "constant", "multistep", "wsd"] = option("cosine", "shape after the warm-up")
    unit: Literal["steps", "tokens"] = option("steps", "what warmup, total, boundaries and decay count")
    warmup: int = option(2000, "linear rise from zero", ge=0)
    total: int | None = option(
        None, "end of the schedule; default: train.steps (in tokens: steps x batch tokens)", ge=1
    )
    floor: float = option(0.1, "final rate as a share of the peak (cosine and wsd)", ge=0, le=1)
    boundaries: list[float] = option(list, "multistep: shares of the total at which the rate changes", gt=0, lt=1)
    factors: list[float] = option(list, "multistep: share of the peak from each boundary on", ge=0)
    decay: int | None = option(None, "wsd: length of the final decay; default: a tenth of the total", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
    """How many ways the devices are split along each mesh axis."""

    replica: int = option(1, "data parallelism with replicated parameters (across slices, over the slow network)", ge=1)
    fsdp: int | Literal["auto"] = option(
        "auto", "data parallelism with sharded parameters; auto: all devices left over", ge=1
    )
    expert: int = option(1, "as fsdp, but experts are split by number; must divide them", ge=1)
    tensor: int = option(1, "tensor parallelism over heads and the MLP's width", ge=1)
    collectives: Literal["auto", "staged", "xla"] = option(
        "auto", "weights are gathered along one torus dimension at a time ('staged': on TPU) or as XLA likes ('xla')"
    )

    def sizes(self) -> dict[str, int | str]:
        """Return the sizes of the mesh axes."""
        return {axis: getattr(self, axis) for axis in ("replica", "fsdp", "expert", "tensor")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class BatchRampConfig:
    """Linear batch-size ramp: `start`, rising by `increment` sequences, full size after `samples` sequences."""

    start: int = required("sequences in the first batch", ge=1)
    increment: int = required("sequences added at each stage", ge=1)
    samples: int = required("sequences seen when the full batch size is reached", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingShrinkConfig:
    """Shrink the gradient of the token embedding (GLM-130B, arXiv:2210.02414 section 3.3)."""

    start: float = option(0.1, "factor at the start", gt=0, le=1)
    until_step: int = option(6000, "step from which the factor rises", ge=0)
    over: int = option(500, "steps in which it rises to 1", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How a mixture of experts is kept in balance (DeepSeek-V2, arXiv:2405.04434 section 2.2); null: as its spec says.

    A device there is a group of experts here.
    """

    expert_balance: float | None = option(None, "weight of the loss that balances experts (0.003)", ge=0)
    device_balance: float | None = option(None, "weight of the loss that balances groups of experts (0.05)", ge=0)
    communication_balance: float | None = option(
        None, "weight of the loss that balances what groups of experts receive (0.02)", ge=0
    )
    per_sequence: bool | None = option(None, "each row is balanced by itself; false: a microbatch as a whole")
    capacity_factor: float | None = option(
        None, "share of its mean load in a microbatch beyond which a group of experts drops selections (1.0)", gt=0
    )
    never_dropped: float = option(
        0.0, "share of rows, drawn anew in each step, that are not dropped from (0.1)", ge=0, le=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    steps: int = required("optimizer steps", ge=1)
    batch_size: int = required("sequences in a global batch", ge=1)
    grad_accum: int = option(
        1, "microbatches of a batch of batch_size rows (fewer while it ramps); the loss stays the whole's mean", ge=1
    )
    batch_ramp: BatchRampConfig | None = option(None, "batch-size ramp at the start of training")
    z_loss: float = option(0.0, "weight of mean(logsumexp(logits)^2) (PaLM: 1e-4)", ge=0)
    max_z_loss: float | None = option(
        None, "weight of mean(max(logits)^2) (Baichuan2: 2e-4); default: that of the model's own config", ge=0
    )
    moe: MixtureConfig | None = option(None, "balance of a mixture of experts")
    embedding_gradient_shrink: EmbeddingShrinkConfig | None = option(
        None, "shrink the token embedding's gradient early in training, against spikes of the loss"
    )
    neftune_alpha: float | None = option(
        None, "noise on the embeddings in training (NEFTune, arXiv:2310.05914: 5); null: none", gt=0
    )
    loss_chunk: int | None = option(
        None, "positions of each row whose logits exist at once; default: about 2^25 logits", ge=1
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the training state is saved and what is kept."""

    every: int = option(1000, "steps between checkpoints; one is always written at the end and after a signal", ge=1)
    keep_last: int = option(2, "newest checkpoints kept", ge=1)
    keep_every: int | None = option(None, "also keep each checkpoint whose step is a multiple of this", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out evaluation during training."""

    every: int | None = option(None, "steps between evaluations; null: only at the end", ge=1)
    batch_size: int | None = option(None, "sequences in an evaluation batch; default: train.batch_size", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """One jax.profiler trace."""

    start: int = required("first step traced", ge=0)
    steps: int = option(3, "steps traced", ge=1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is printed and recorded."""

    every: int = option(10, "steps between printed lines (metrics.jsonl has every step)", ge=1)
    tensorboard: bool = option(True, "write TensorBoard event files to RUN/tb")
    peak_tflops: float | None = option(None, "peak bf16 TFLOP/s of one device, for MFU on devices we do not know", gt=0)
    profile: ProfileConfig | None = option(None, "record a trace to RUN/profile")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run."""

    run_dir: str = required("the run folder: checkpoints, records and the resolved config")
    stage: Literal["pretrain", "sft", "reward", "dpo", "ppo", "grpo"] = option("pretrain", "what is trained")
    tokenizer: str | None = option(
        None, "a tokenizer's folder or file, or a model with one; default: that of model.weights"
    )
    seed: int = option(0, "seed of parameters and data order", ge=0, lt=2**32)
    model: ModelConfig = section(ModelConfig, "the model")
    data: DataConfig = section(DataConfig, "the data")
    optimizer: OptimizerConfig = section(OptimizerConfig, "the optimizer")
    schedule: ScheduleConfig = section(ScheduleConfig, "the learning-rate schedule")
    mesh: MeshConfig = section(MeshConfig, "the device mesh")
    train: TrainConfig = section(TrainConfig, "the training loop")
    checkpoint: CheckpointConfig = section(CheckpointConfig, "checkpoints")
    eval: EvalConfig = section(EvalConfig, "evaluation")
    log: LogConfig = section(LogConfig, "progress and records")
    chat: ChatConfig = section(ChatConfig, "how conversations are written and what of them is trained")
    adapter: AdapterConfig | None = option(None, "train little beside frozen weights; null: all weights are trained")
    ranking: RankingConfig = section(RankingConfig, "stage reward: the loss of a reward model")
    dpo: DPOConfig = section(DPOConfig, "stage dpo")
    rollout: RolloutConfig | None = option(None, "stages ppo and grpo: how answers are sampled")
    rewards: list[RewardConfig] = option(list, "stages ppo and grpo: what answers are worth, summed by weight")
    ppo: PPOConfig = section(PPOConfig, "stage ppo")
    grpo: GRPOConfig = section(GRPOConfig, "stage grpo")
    health: HealthConfig = section(HealthConfig, "warnings about a run that learns nothing")
