"""`jaxllm import` and `jaxllm export`."""

from __future__ import annotations

import argparse

from jaxllm.arguments import NATURAL, POSITIVE
from jaxllm.errors import EXIT_OK, InputError


def add(verbs: argparse._SubParsersAction) -> None:
    """Add the verbs to the parser."""
    _add_import(verbs)
    _add_export(verbs)


def _add_import(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "import",
        help="read a published checkpoint into a run folder",
        description="Read a published folder (config.json with safetensors or torch .bin files), a .gguf file, or with "
        "--family the tensor-parallel shards of a GLM, which become a published folder.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a folder or a .gguf file")
    parser.add_argument("output", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--format", choices=("run", "hf"), help="run folder (default), or published folder")
    parser.add_argument("--family", metavar="NAME", help="of shards mp_rank_00_model_states.pt: glm130b or glm")
    parser.add_argument("--num-attention-heads", type=POSITIVE, metavar="N", help="of shards of an unpublished size")
    parser.set_defaults(run=_import)


def _import(arguments: argparse.Namespace) -> int:
    if arguments.family is None and arguments.num_attention_heads is not None:
        raise InputError("--num-attention-heads is for shards: it needs --family")
    if arguments.family is not None and arguments.format == "run":
        raise InputError("--family: shards become a published folder (--format hf); import that one as a run")
    from jaxllm.environment import require_devices

    require_devices()
    from jaxllm.checkpoint import convert

    source, output = arguments.source, arguments.output
    if arguments.family is not None:
        heads = arguments.num_attention_heads
        count = convert.import_shards(source, output, family=arguments.family, num_attention_heads=heads)
    elif arguments.format == "hf":
        count = convert.import_folder(source, output)
    else:
        count = convert.import_run(source, output)
    print(f"{output}: {count:,} tensors from {source}")
    return EXIT_OK


def _add_export(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser(
        "export",
        help="write a model as a published folder",
        description="Write a run, one of its checkpoints, a published folder or a .gguf file as a published folder: "
        "safetensors, config.json, generation_config.json and tokenizer files. What a run trained beside frozen "
        "weights is added to them, or with --adapter written alone, as peft reads it.",
    )
    parser.add_argument("source", metavar="SOURCE", help="a run folder, a checkpoint, a published folder or .gguf file")
    parser.add_argument("output", metavar="OUT", help="a new or empty folder")
    parser.add_argument("--as", dest="target", metavar="FAMILY", help="in the layout of: llama or qwen2")
    parser.add_argument("--dtype", metavar="DTYPE", help="bfloat16, float16 or float32; default: as stored")
    parser.add_argument(
        "--from-step", type=NATURAL, metavar="N", help="step of a run's checkpoint; default: the newest"
    )
    parser.add_argument("--adapter", action="store_true", help="write the run's adapter alone, in peft's format")
    parser.add_argument(
        "--base-model", metavar="NAME", help="what an adapter's files call its model; default: where the run found it"
    )
    parser.set_defaults(run=_export)


def _export(arguments: argparse.Namespace) -> int:
    if arguments.adapter and (arguments.target or arguments.dtype):
        raise InputError("--adapter: adapters are float32 in the layout of their own model; leave out --as and --dtype")
    if arguments.base_model and not arguments.adapter:
        raise InputError("--base-model is for adapters: it needs --adapter")
    from jaxllm.environment import require_devices

    require_devices()
    return _export_adapter(arguments) if arguments.adapter else _export_model(arguments)


def _export_adapter(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from jaxllm.files import require_new_folder
    from jaxllm.train.tuning.adapter_export import export_adapter

    require_new_folder(Path(arguments.output))
    export_adapter(arguments.source, arguments.output, step=arguments.from_step, base_model=arguments.base_model)
    print(f"{arguments.output}: the adapter of {arguments.source}")
    return EXIT_OK


def _export_model(arguments: argparse.Namespace) -> int:
    from pathlib import Path

    from jaxllm.checkpoint.export import export_model
    from jaxllm.checkpoint.formats import parse_dtype
    from jaxllm.files import require_new_folder
    from jaxllm.pretrained import open_model

    dtype = None if arguments.dtype is None else parse_dtype(arguments.dtype)
    require_new_folder(Path(arguments.output))
    opened = open_model(arguments.source, step=arguments.from_step)
    notes = export_model(opened, arguments.output, target=arguments.target, dtype=dtype)
    print(f"{arguments.output}: written from {arguments.source}")
    for note in notes:
        print(note)
    return EXIT_OK
