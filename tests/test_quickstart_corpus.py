"""The corpus that ships with the quickstart: clean, split without leaks, and made by the rules its README states."""

import gzip
import importlib.util
import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"
spec = importlib.util.spec_from_file_location("make_quickstart_corpus", SCRIPTS / "make_quickstart_corpus.py")
make = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make)


@pytest.fixture(scope="module")
def corpus():
    def rows(name):
        lines = gzip.decompress((SCRIPTS / "quickstart_corpus" / f"{name}.jsonl.gz").read_bytes()).splitlines()
        return [make.Page(row["id"], row["lang"], row["text"].split("\n")) for row in map(json.loads, lines)]

    return {f"{side}.{lang}": rows(f"{side}.{lang}") for side in ("train", "heldout") for lang in make.LANGUAGES}


def test_sizes_are_those_of_the_readme(corpus):
    readme = (SCRIPTS / "quickstart_corpus" / "README.md").read_text()
    table = re.findall(r"\| (\w+\.\w+)\.jsonl\.gz \| (\d+) \| ([\d,]+) \|", readme)
    sizes = {name: (len(pages), sum(len(page.text.encode()) for page in pages)) for name, pages in corpus.items()}
    assert {name: (int(count), int(size.replace(",", ""))) for name, count, size in table} == sizes
    heldout = sum(sizes[f"heldout.{lang}"][1] for lang in make.LANGUAGES)
    assert 0.08 < heldout / sum(size for _, size in sizes.values()) < 0.1


def test_no_page_and_no_long_line_is_on_both_sides(corpus):
    train = [page for lang in make.LANGUAGES for page in corpus[f"train.{lang}"]]
    heldout = [page for lang in make.LANGUAGES for page in corpus[f"heldout.{lang}"]]
    assert not {page.name for page in train} & {page.name for page in heldout}
    lines = {line for page in train for line in page.lines}
    assert not [line for page in heldout for line in page.lines if len(line) >= make.SHORTEST_LEAK and line in lines]


def test_both_sides_hold_long_pages_and_chinese_pages_are_chinese(corpus):
    for name, pages in corpus.items():
        assert max(len(page.text) for page in pages) > 3000
        assert min(len(page.text) for page in pages) >= make.SHORTEST_DOCUMENT
        if name.endswith("zh"):
            assert all(make.is_chinese(line) for page in pages for line in page.lines)
        assert not re.search(r"Download the ebook|debian\.org", "\n".join(page.text for page in pages))


def test_blocks_join_inline_markup_and_keep_listings():
    page = """<html xmlns="http://www.w3.org/1999/xhtml"><head><title>no</title></head><body>
      <ul class="docnav"><li>Next</li></ul><h2>6.3. The <code>apt</code> 命令</h2>
      <div class="para">Run  <em>it</em>
        now.<pre>$ apt  update\n# done\n</pre>Then <a href="x">wait</a>.</div></body></html>"""
    expected = ["6.3. The apt 命令", "Run it now.", "$ apt  update\n# done", "Then wait."]
    assert make.blocks(ElementTree.fromstring(page)) == expected
