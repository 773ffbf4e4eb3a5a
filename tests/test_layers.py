"""Who may import whom: the layers of the package, read from its imports."""

import ast
from pathlib import Path

import jaxllm

ROOT = Path(jaxllm.__file__).parent

LEVELS = {
    1: ("spec", "spec_parts", "types", "config", "errors", "files"),
    2: ("nn", "losses", "rewards", "tokenizers", "sharding"),
    3: ("families",),
    4: ("data", "checkpoint"),
    5: ("train", "generate"),
    6: ("language_model", "reward_model"),
    7: (
        "pretrained",
        "plan",
        "train.loop",
        "train.start",
        "train.setup",
        "train.evaluate",
        "train.dry_run",
        "train.precomputed",
        "train.rollouts",
        "train.stages",
        "train.sources",
    ),
    8: ("cli", "arguments", "environment"),
}
"""Rooms of each level; the longest name that fits a module decides."""

STRICT_LEVELS = (2, 3, 4, 5, 6)
"""Where the rooms of one level may not import each other, with two exceptions."""
EXCEPTIONS = (("nn", "sharding"), ("train", "generate"))

FORBIDDEN = ("torch", "transformers", "tensorflow", "flax.nnx", "jax.experimental.shard_map", "pickle")


def modules():
    """Yield (name inside the package, imported names) of every module."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        yield name, set(imports(ast.parse(path.read_text())))


def imports(tree):
    """Yield the dotted names that a module imports anywhere; `from a import b` gives a.b."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def starts_with(name, room):
    return name == room or name.startswith(f"{room}.")


def place(name):
    """Return (level, room) of a dotted name inside the package."""
    rooms = [(room, level) for level, rooms in LEVELS.items() for room in rooms if starts_with(name, room)]
    assert rooms, f"{name} has no place in LEVELS"
    room, level = max(rooms, key=lambda entry: len(entry[0]))
    return level, room


def violations():
    for module, names in modules():
        if module == "":
            continue
        level, room = place(module)
        for name in sorted(name.removeprefix("jaxllm.") for name in names if name.startswith("jaxllm.")):
            if name == "__version__":
                continue
            other_level, other_room = place(name)
            is_neighbour = other_level == level and other_room != room and level in STRICT_LEVELS
            is_excepted = any(room == own and starts_with(name, other) for own, other in EXCEPTIONS)
            if other_level > level or (is_neighbour and not is_excepted):
                yield f"{module} (level {level}) imports {name} (level {other_level})"


def test_no_module_imports_from_a_higher_level_or_a_neighbour():
    assert list(violations()) == []


def test_forbidden_packages_are_imported_nowhere():
    found = [
        (module, name) for module, names in modules() for name in names for bad in FORBIDDEN if starts_with(name, bad)
    ]
    assert found == []


def test_the_package_itself_is_light():
    names = next(names for module, names in modules() if module == "")
    heavy = {"jax", "flax", "numpy", "optax", "grain", "orbax"}
    assert {name.split(".")[0] for name in names}.isdisjoint(heavy)
    assert {place(name.removeprefix("jaxllm."))[0] for name in names if name.startswith("jaxllm.")} <= {1, 3}


def test_the_reader_of_imports_sees_them():
    tree = ast.parse("import a.b\nfrom c import d\ndef f():\n    from e.f import g\n")
    assert set(imports(tree)) == {"a.b", "c.d", "e.f.g"}
    assert place("train.tuning.lora") == (5, "train")
    assert place("train.loop.train") == (7, "train.loop")
