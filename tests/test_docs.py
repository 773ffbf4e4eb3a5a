"""What the documents say about links, commands, options, Python and parameter counts is true."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

import jaxllm
from jaxllm.arguments import split_overrides
from jaxllm.cli import VERBS_WITH_CONFIG, build_parser
from jaxllm.config import load_config
from jaxllm.config.options import all_options, pattern
from jaxllm.errors import InputError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {name for name, option in all_options().items() if option.is_section and "." not in name}
FILE_SUFFIXES = {
    "md",
    "py",
    "sh",
    "gz",
    "yaml",
    "json",
    "jsonl",
    "txt",
    "safetensors",
    "gguf",
    "bin",
    "pt",
    "model",
    "tiktoken",
}

all_pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)


def inline_code(page: Path) -> list[str]:
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`\n]+)`", prose)


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[list[str]]:
    """Return the arguments of each jaxllm command in the shell blocks of a page."""
    found = []
    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        names = [Path(word).name for word in words]
        if "jaxllm" in names:
            arguments = words[names.index("jaxllm") + 1 :]
            found.append(arguments[: next((i for i, word in enumerate(arguments) if word in "|&&;>"), None)])
    return found


def check_command(arguments: list[str]) -> None:
    """Parse a command and look up the options that it sets."""
    overrides = []
    if arguments[0] in VERBS_WITH_CONFIG:
        arguments, overrides = split_overrides(arguments)
    build_parser().parse_args(arguments)
    for override in overrides:
        check_option(override.removeprefix("--").partition("=")[0])


def check_option(name: str) -> None:
    if name.endswith(".*"):
        assert any(known.startswith(name.removesuffix("*")) for known in all_options()), name
    else:
        assert pattern(name) in all_options(), name


@all_pages
def test_relative_links_resolve(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@all_pages
def test_commands_parse(page):
    for arguments in commands(page):
        check_command(arguments)
    for code in inline_code(page):
        if code.startswith("jaxllm "):
            try:
                check_command(shlex.split(code)[1:])
            except InputError as error:
                assert "the following arguments are required" in str(error), code


def test_the_documents_show_each_verb_at_work():
    verbs = {arguments[0] for page in PAGES for arguments in commands(page)}
    assert verbs == {"train", "plan", "sample", "generate", "chat", "import", "export", "tokenizer", "data", "env"}


@all_pages
def test_options_exist(page):
    for code in inline_code(page):
        name = code.partition("=")[0]
        parts = name.split(".")
        if (ROOT / "configs" / f"{name.replace('.', '/', 1)}.yaml").exists():  # a row of scale.md
            continue
        if re.fullmatch(r"[a-z_]+(\.[\w*]+)+", name) and parts[0] in SECTIONS and parts[-1] not in FILE_SUFFIXES:
            check_option(name)


@all_pages
def test_yaml_loads_or_fails_as_shown(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    # Those of the guide to post-training are loaded whole, in tests/test_post_training_guide.py.
    for config in blocks(page, "yaml") if page.stem != "post_training" else ():
        Path("bad.yaml").write_text(config)
        shown = re.search(re.escape(f"```yaml\n{config}```\n```\njaxllm: error:\n") + "(.*?)\n```", text, re.DOTALL)
        with pytest.raises(InputError) as error:
            load_config(["bad.yaml"])
        if shown:
            assert str(error.value) == shown[1]
        else:
            assert all(re.search("missing|at least one", line) for line in str(error.value).splitlines())


@all_pages
def test_python_names_exist(page):
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names), code
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "jaxllm":
                assert hasattr(jaxllm, node.attr), node.attr


@pytest.mark.slow
def test_the_python_of_the_readme_runs(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tests").symlink_to(ROOT / "tests")
    names = {}
    for code in blocks(ROOT / "README.md", "python"):
        if "runs/" not in code:
            exec(code, names)
    assert (tmp_path / "llama2-copy" / "config.json").is_file()


def test_parameters_are_counted_exactly():
    page = (ROOT / "docs" / "models.md").read_text()
    table = dict(re.findall(r"^\| `([\w.-]+)` \| ([\d,]+) \|", page, re.MULTILINE))
    sizes = [size for family in jaxllm.families().values() for size in family]
    assert table == {size: f"{jaxllm.count_params(jaxllm.spec(size)):,}" for size in sizes}


def test_every_family_is_described():
    page = (ROOT / "docs" / "models.md").read_text()
    assert all(page.count(f"\n| {family} |") >= 1 for family in jaxllm.families())
    readme = (ROOT / "README.md").read_text()
    assert all(f"\n| {family} |" in readme for family in jaxllm.families())


def test_the_readme_is_short_and_lists_every_document():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 260
    assert all(f"docs/{page.name}" in text for page in (ROOT / "docs").glob("*.md"))


def test_every_section_of_a_config_is_documented():
    guide = (ROOT / "docs" / "configuration.md").read_text()
    assert all(f"`{name}`" in guide for name in SECTIONS)
