"""Published vocabulary files, in the folder that JAXLLM_ASSETS names; they are not part of the tree."""

import gzip
import os
from pathlib import Path

import pytest


def read_asset(name: str) -> bytes:
    """Return the content of a file, which may be gzipped there; skips the test where it is not."""
    assets = Path(os.environ.get("JAXLLM_ASSETS") or pytest.skip(f"JAXLLM_ASSETS names no folder with {name}"))
    if (assets / name).exists():
        return (assets / name).read_bytes()
    if not (assets / f"{name}.gz").exists():
        pytest.skip(f"{assets}, the folder that JAXLLM_ASSETS names, holds no {name}")
    return gzip.decompress((assets / f"{name}.gz").read_bytes())
