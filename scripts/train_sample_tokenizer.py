"""Train assets/tokenizer/tokenizer.json on the sample text: python scripts/train_sample_tokenizer.py

The tokenizer is a byte-level BPE with 4,096 entries. It is trained on train.jsonl only, without the held-out documents.
"""

from __future__ import annotations

import sys
from pathlib import Path

from titan_peer.commands.data_train_tokenizer import main
from titan_peer.common.command_line import FlagParser

ASSETS = Path(__file__).resolve().parent.parent / "assets"

if __name__ == "__main__":
    FlagParser(__doc__).parse_args()
    source = ["--source.path", str(ASSETS / "sample_text" / "train.jsonl")]
    sys.exit(main([*source, "--vocab_size", "4096", "--output", str(ASSETS / "tokenizer")]))
