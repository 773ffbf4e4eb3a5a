"""Eight forced host devices, errors on rank promotion, and programs that compile fast and are kept, for every test."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Without optimisation tiny programs compile three times faster.
FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAGS}"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "jaxllm-test-xla-cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"

import hypothesis  # noqa: E402 (jax reads the environment above when it is first imported)
import jax  # noqa: E402
import pytest  # noqa: E402

# A shared machine makes single examples slow now and then.
hypothesis.settings.register_profile("jaxllm", deadline=None)
hypothesis.settings.load_profile("jaxllm")

GOLDENS = Path(__file__).parent / "goldens"


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--all"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow: run with --all"))


@pytest.fixture(scope="module", autouse=True)
def _few_programs_at_once():
    """Let go of compiled programs before a process has as many memory mappings as Linux allows it (65,530)."""
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture(scope="session")
def goldens() -> Path:
    return GOLDENS
