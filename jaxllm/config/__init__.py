"""The configuration of a run: its schema, strict loading with overrides, validation, printing and comparison."""

from jaxllm.config.dump import config_help, diff_configs, dump_config
from jaxllm.config.loader import load_config
from jaxllm.config.rules import validate
from jaxllm.config.schema import (
    BatchRampConfig,
    BlankInfillingConfig,
    BlankTokensConfig,
    CheckpointConfig,
    DataConfig,
    EmbeddingShrinkConfig,
    EvalConfig,
    InitConfig,
    LogConfig,
    MeshConfig,
    MixtureConfig,
    ModelConfig,
    OptimizerConfig,
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
)

__all__ = [
    "BatchRampConfig",
    "BlankInfillingConfig",
    "BlankTokensConfig",
    "CheckpointConfig",
    "DataConfig",
    "EmbeddingShrinkConfig",
    "EvalConfig",
    "InitConfig",
    "LogConfig",
    "MeshConfig",
    "MixtureConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ProfileConfig",
    "RunConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "config_help",
    "diff_configs",
    "dump_config",
    "load_config",
    "validate",
]
