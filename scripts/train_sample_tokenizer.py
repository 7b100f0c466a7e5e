"""Train assets/tokenizer/tokenizer.json on the sample text: python scripts/train_sample_tokenizer.py

Byte-level BPE with 4,096 entries, from train.jsonl alone (the held-out documents are not looked at).
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
