"""Make the documents of the bundled lm-eval tasks from the held-out sample text: python scripts/make_lm_eval_tasks.py"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from titan_peer.common.command_line import FlagParser

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "titan_peer/evaluation/lm_eval_tasks"
SAMPLES = 60


def sentences(text: str) -> list[str]:
    return [s.strip() for s in re.split(r"(?<=[.!?:;])\s+", text) if s.strip()]


def write(name: str, documents: Iterable[dict[str, Any]]) -> None:
    lines = [json.dumps(d, ensure_ascii=False) + "\n" for d in documents]
    (OUTPUT / name).write_text("".join(lines), encoding="utf-8")
    print(f"{OUTPUT / name}: {len(lines)} documents, {(OUTPUT / name).stat().st_size:,} bytes")


def main() -> None:
    rng = random.Random(0)
    with (ROOT / "assets/sample_text/validation.jsonl").open(encoding="utf-8") as file:
        documents = [json.loads(line) for line in file]
    by_source: dict[str, list[list[str]]] = {}
    for document in documents:
        by_source.setdefault(document["source"], []).append(sentences(document["text"]))

    write("texts.jsonl", ({"text": d["text"][:2000]} for d in documents[: SAMPLES // 2]))

    continuations, last_words, lines = [], [], []
    for source in sorted(by_source):
        passages = [(i, j) for i, s in enumerate(by_source[source]) for j in range(len(s) - 1)]
        fitting = [(i, j) for i, j in passages if 6 <= len(by_source[source][i][j + 1].split()) <= 25]
        for i, j in rng.sample(fitting, SAMPLES // 2):
            others = [by_source[source][a][b + 1] for a, b in rng.sample([p for p in fitting if p[0] != i], 3)]
            choices = [by_source[source][i][j + 1], *others]
            rng.shuffle(choices)
            context = " ".join(by_source[source][i][max(0, j - 3) : j + 1])
            label = choices.index(by_source[source][i][j + 1])
            continuations.append({"context": context, "choices": choices, "label": label})
            words = f"{context} {by_source[source][i][j + 1]}".rstrip(".!?:;)”\"'").split()
            last_words.append({"context": " ".join(words[:-1]), "word": words[-1]})
            lines.append({"line": " ".join(by_source[source][i][j + 1].split()[:10])})
    write("continuations.jsonl", continuations)
    write("last_words.jsonl", last_words)
    write("lines.jsonl", lines)


if __name__ == "__main__":
    FlagParser(__doc__).parse_args()
    main()
