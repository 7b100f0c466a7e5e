"""Train assets/tokenizer/tokenizer.json on the sample text: python scripts/train_sample_tokenizer.py

Byte-level BPE with 4,096 entries, from train.jsonl alone (the held-out documents are not looked at).
"""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

ASSETS = Path(__file__).resolve().parent.parent / "assets"
SPECIAL_TOKENS = ["<|begin_of_text|>", "<|end_of_text|>"]


def main() -> None:
    with (ASSETS / "sample_text" / "train.jsonl").open() as file:
        texts = [json.loads(line)["text"] for line in file]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    (ASSETS / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(str(ASSETS / "tokenizer" / "tokenizer.json"))


if __name__ == "__main__":
    main()
