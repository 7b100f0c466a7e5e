"""Make assets/sample_text from three Debian packages: python scripts/make_sample_text.py

The texts are the Jargon File 4.4.7 (package dict-jargon; public domain), one document per entry, and the New Testament
of the King James Bible (packages bible-kjv and bible-kjv-text; the text is public domain), one document per chapter.
The hash of its text decides whether a document is written to validation.jsonl (5%) or to train.jsonl. The script needs
apt-get and dpkg.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import string
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from titan_peer.common.command_line import FlagParser

OUTPUT = Path(__file__).resolve().parent.parent / "assets" / "sample_text"
PACKAGES = ("dict-jargon", "bible-kjv", "bible-kjv-text")
DICTD_DIGITS = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"


def unpack_packages(folder: Path, packages: Sequence[str] = PACKAGES) -> None:
    subprocess.run(["apt-get", "download", *packages], cwd=folder, check=True)
    for package in folder.glob("*.deb"):
        subprocess.run(["dpkg", "-x", package, folder], check=True)


def dictd_number(text: str) -> int:
    """A number as a dictd index writes it: base 64, most significant digit first."""
    value = 0
    for digit in text:
        value = value * 64 + DICTD_DIGITS.index(digit)
    return value


def dictionary_entries(folder: Path, name: str) -> Iterator[str]:
    """The unchanged entries of a dictd dictionary, in the order of its file."""
    data = gzip.decompress((folder / f"usr/share/dictd/{name}.dict.dz").read_bytes())
    places = set()
    for line in (folder / f"usr/share/dictd/{name}.index").read_text(encoding="utf-8").splitlines():
        word, offset, length = line.split("\t")
        if not word.startswith("00-database"):
            places.add((dictd_number(offset), dictd_number(length)))
    for offset, length in sorted(places):
        yield data[offset : offset + length].decode(errors="replace")  # gcide has a few stray bytes


def jargon_entries(folder: Path) -> Iterator[str]:
    """Entries of the Jargon File: head word and grammar on the first line, then paragraphs of one line each."""
    for entry in dictionary_entries(folder, "jargon"):
        head, _, body = entry.strip().partition("\n\n")
        head = " ".join(head.split())
        paragraphs = [" ".join(p.split()) for p in body.split("\n\n")]
        text = "\n".join([head, *(p for p in paragraphs if p)])
        yield re.sub(r"\{\s*([^{}]*?)\s*\}", r"\1", text)  # {cross references} lose their braces


def bible_chapters(folder: Path, passage: str) -> Iterator[str]:
    """Chapters of a passage such as Matt1:1-Rev22:21 as one paragraph each, without verse numbers."""
    command = [folder / "usr/bin/bible", "-l100000", "-p", folder / "usr/lib", "-f", passage]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    chapters: dict[str, list[str]] = {}
    for line in printed.splitlines():
        chapter, text = re.fullmatch(r"(\w+):\d+ (.*)", line).groups()  # Mat2:3 When Herod the king ...
        chapters.setdefault(chapter, []).append(text.strip())
    return (" ".join(verses) for verses in chapters.values())


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        unpack_packages(folder)
        documents = [{"text": text, "source": "jargon-4.4.7"} for text in jargon_entries(folder)]
        documents += [
            {"text": text, "source": "kjv-new-testament"} for text in bible_chapters(folder, "Matt1:1-Rev22:21")
        ]
    OUTPUT.mkdir(parents=True, exist_ok=True)
    with (
        (OUTPUT / "train.jsonl").open("w", encoding="utf-8") as train,
        (OUTPUT / "validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for document in documents:
            held_out = hashlib.sha256(document["text"].encode()).digest()[0] < 0.05 * 256
            print(json.dumps(document, ensure_ascii=False), file=validation if held_out else train)


if __name__ == "__main__":
    FlagParser(__doc__).parse_args()
    main()
