"""Who may import whom: a module imports from its own layer or from lower ones, see docs/design.md."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# The longest matching prefix counts.
LAYERS = {
    "jaxllm": 3,  # the package itself offers the families' names
    "jaxllm.errors": 1,
    "jaxllm.spec": 1,
    "jaxllm.types": 1,
    "jaxllm.config": 1,
    "jaxllm.nn": 2,
    "jaxllm.losses": 2,
    "jaxllm.sharding": 2,
    "jaxllm.tokenizers": 2,
    "jaxllm.checkpoint": 4,
    "jaxllm.checkpoint.keymap": 2,
    "jaxllm.checkpoint.tensors": 2,
    "jaxllm.families": 3,
    "jaxllm.data": 4,
    "jaxllm.train": 5,
    "jaxllm.generate": 5,
    "jaxllm.language_model": 6,
    "jaxllm.train.dry_run": 7,
    "jaxllm.train.evaluate": 7,
    "jaxllm.train.loop": 7,
    "jaxllm.train.setup": 7,
    "jaxllm.train.start": 7,
    "jaxllm.cli": 8,
    "jaxllm.arguments": 8,
    "jaxllm.environment": 8,
}
# Rooms of layer 2 stand alone, but for these.
BESIDES = {"jaxllm.nn": {"jaxllm.sharding"}}
FORBIDDEN = {"torch", "transformers", "tensorflow", "flax.nnx", "pickle"}
MODULES = sorted((ROOT / "jaxllm").rglob("*.py"))


def name_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def home(module):
    """Return the entry of LAYERS that a module belongs to."""
    return max((name for name in LAYERS if f"{module}.".startswith(f"{name}.")), key=len)


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            files = [ROOT / Path(*name.split(".")) for name in submodules]
            found = [
                name
                for name, file in zip(submodules, files, strict=True)
                if file.is_dir() or file.with_suffix(".py").is_file()
            ]
            yield from found or [node.module]


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_go_down(path):
    here = home(name_of(path))
    for imported in imports(path):
        assert not any(f"{imported}.".startswith(f"{name}.") for name in FORBIDDEN), imported
        if not imported.startswith("jaxllm.") or here == "jaxllm.cli":
            continue
        there = home(imported)
        assert LAYERS[there] <= LAYERS[here], f"{name_of(path)} imports {imported}"
        if LAYERS[here] == LAYERS[there] == 2 and here != there:
            assert there in BESIDES.get(here, ()), f"{name_of(path)} imports {imported}"


def test_every_module_has_a_layer():
    assert {home(name_of(path)) for path in MODULES} == set(LAYERS)
