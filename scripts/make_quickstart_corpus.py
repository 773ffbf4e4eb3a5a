"""Build scripts/quickstart_corpus from two Debian packages; what it holds and why is said in its README.md.

    apt-get download debian-handbook gnome-user-docs
    for package in *.deb; do dpkg-deb -x $package unpacked; done
    python scripts/make_quickstart_corpus.py --handbook-dir unpacked/usr/share/doc/debian-handbook/html \
        --gnome-dir unpacked/usr/share/help
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

CORPUS = Path(__file__).parent / "quickstart_corpus"
LANGUAGES = ("en", "zh")
HELDOUT_SHARE = 0.09
SHORTEST_DOCUMENT = 64
"""Characters; below lie pages of which little more than the title is translated."""
SHORTEST_LEAK = 20
"""Characters; shorter lines that stand on both sides are headings such as "See also"."""

# Elements that run on inside a line; every other element starts a new block.
XHTML_INLINE = {"a", "abbr", "acronym", "code", "em", "img", "span", "strong", "sub", "sup", "tt", "var"}
MALLARD_INLINE = {"app", "cmd", "file", "gui", "guiseq", "hi", "input", "key", "keyseq", "link", "output", "sys"}
INLINE = XHTML_INLINE | MALLARD_INLINE
SKIPPED_ELEMENTS = {"comment", "head", "info", "media"}
SKIPPED_CLASSES = {"docnav", "docnav top", "toc"}
SKIPPED_IDS = {"banner", "title"}

HAN = re.compile("[\u4e00-\u9fff]")
LATIN = re.compile("[A-Za-z]")
LEAST_HAN = 0.1
"""Share of Han among Han and Latin letters; below it a block is English with a translated cross reference."""
PROJECT_HOSTS = re.compile(r"(?:[a-z0-9-]+\.)*\bdebian\.(?:org|net)", re.ASCII)


class Page(NamedTuple):
    """One page in one language, as lines of text."""

    name: str
    lang: str
    lines: list[str]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


def read_pages(folder: Path, pattern: str, source: str, lang: str) -> Iterator[Page]:
    """Yield the pages of a folder."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise SystemExit(f"{folder}: found no {pattern}")
    for file in files:
        lines = [line for block in blocks(ElementTree.parse(file).getroot()) for line in block.split("\n")]
        lines = [PROJECT_HOSTS.sub("mirror.example.org", line) for line in lines]
        if lang == "zh":
            lines = [line for line in lines if is_chinese(line)]
        yield Page(f"{source}/{file.name}", lang, lines)


def blocks(root: ElementTree.Element) -> list[str]:
    """Return the text of each paragraph, heading, list item and listing, without navigation."""
    found: list[str] = []
    pending: list[str] = []

    def flush() -> None:
        if text := " ".join("".join(pending).split()):
            found.append(text)
        pending.clear()

    def visit(element: ElementTree.Element) -> None:
        tag = element.tag.rpartition("}")[2]
        if tag in SKIPPED_ELEMENTS or element.get("class") in SKIPPED_CLASSES or element.get("id") in SKIPPED_IDS:
            return
        if tag in ("pre", "screen"):
            flush()
            found.append("".join(element.itertext()).strip("\n"))
            return
        if tag not in INLINE:
            flush()
        pending.append(element.text or "")
        for child in element:
            visit(child)
            pending.append(child.tail or "")
        if tag not in INLINE:
            flush()

    visit(root)
    return found


def is_chinese(line: str) -> bool:
    """Say whether a line of a Chinese page has been translated."""
    num_han = len(HAN.findall(line))
    return num_han > 0 and num_han >= LEAST_HAN * (num_han + len(LATIN.findall(line)))


def heldout_names(pages: list[Page]) -> set[str]:
    """Choose pages, all their languages together, in the order of their names' hashes until the share is reached."""
    sizes: Counter[str] = Counter()
    for page in pages:
        sizes[page.name] += len(page.text.encode())
    chosen: set[str] = set()
    num_bytes = 0
    for name in sorted(sizes, key=lambda name: hashlib.sha256(name.encode()).digest()):
        if num_bytes >= HELDOUT_SHARE * sizes.total():
            break
        chosen.add(name)
        num_bytes += sizes[name]
    return chosen


def without_leaks(train: list[Page], heldout: list[Page]) -> list[Page]:
    """Drop the lines that stand word for word in held-out pages from training pages."""
    heldout_lines = [line for page in heldout for line in page.lines if len(line) >= SHORTEST_LEAK]
    leaks = set(heldout_lines).intersection(line for page in train for line in page.lines)
    share = sum(line in leaks for line in heldout_lines) / len(heldout_lines)
    print(f"{share:.1%} of the held-out lines ({SHORTEST_LEAK} or more characters) stood in training: dropped there")
    return [page._replace(lines=[line for line in page.lines if line not in leaks]) for page in train]


def write(path: Path, pages: list[Page]) -> None:
    """Write pages as gzipped jsonl, the same bytes for the same pages."""
    rows = (json.dumps({"id": page.name, "lang": page.lang, "text": page.text}, ensure_ascii=False) for page in pages)
    with open(path, "wb") as file, gzip.GzipFile("", "wb", 9, file, mtime=0) as stream:
        stream.write("".join(row + "\n" for row in rows).encode())
    num_bytes = sum(len(page.text.encode()) for page in pages)
    longest = max(len(page.text) for page in pages)
    print(f"{path.name:18} {len(pages):4} documents {num_bytes:9,} bytes, longest {longest:6,} characters")


def main() -> None:
    """Read both packages, split, and write the four files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--handbook-dir", type=Path, required=True, help="folder with en-US and zh-CN")
    parser.add_argument("--gnome-dir", type=Path, required=True, help="folder with C and zh_CN")
    parser.add_argument("--output", type=Path, default=CORPUS, help="where the four files go")
    args = parser.parse_args()
    pages = [
        *read_pages(args.handbook_dir / "en-US", "*.html", "debian-handbook", "en"),
        *read_pages(args.handbook_dir / "zh-CN", "*.html", "debian-handbook", "zh"),
        *read_pages(args.gnome_dir / "C/gnome-help", "*.page", "gnome-help", "en"),
        *read_pages(args.gnome_dir / "zh_CN/gnome-help", "*.page", "gnome-help", "zh"),
    ]
    chosen = heldout_names(pages)
    heldout = [page for page in pages if page.name in chosen]
    train = without_leaks([page for page in pages if page.name not in chosen], heldout)
    for side, side_pages in (("train", train), ("heldout", heldout)):
        for lang in LANGUAGES:
            kept = [page for page in side_pages if page.lang == lang and len(page.text) >= SHORTEST_DOCUMENT]
            write(args.output / f"{side}.{lang}.jsonl.gz", kept)


if __name__ == "__main__":
    main()
