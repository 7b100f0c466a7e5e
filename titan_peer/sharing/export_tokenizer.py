"""Write a checkpoint's tokenizer as the files that transformers' AutoTokenizer reads, with the same ids."""

from __future__ import annotations

import json
import re
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors

from titan_peer.common.errors import UserError
from titan_peer.data.special_tokens import SETTINGS_FILES
from titan_peer.data.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, load_tokenizer

_PADDING_NAME = re.compile(r"[<\[|｜_▁]*(pad|padding)[>\]|｜_▁]*", re.IGNORECASE)
_BYTE_BOS, _BYTE_EOS = "<|begin_of_text|>", "<|end_of_text|>"


def write_tokenizer(path: str, folder: Path, max_seq_len: int) -> int | None:
    """Write tokenizer.json and tokenizer_config.json; returns the id of the padding token, if there can be one.

    With special tokens (transformers' default) a text gets the begin token, as every document had in training.

    Args:
        path: as for `load_tokenizer`.
        max_seq_len: the length of the model's context in tokens.
    Raises:
        UserError: the tokenizer is of a kind without a tokenizer.json.
    """
    ours = load_tokenizer(path)
    file = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
    if isinstance(ours, ByteTokenizer):
        theirs = _byte_level(ours)
    elif isinstance(ours, FileTokenizer):
        theirs = tokenizers.Tokenizer.from_file(str(file))
    else:
        raise UserError(
            f"{path}: only tokenizer.json files and bytes can be exported; convert it to a tokenizer.json (transformers' "
            "TikTokenConverter does) and name that in model.tokenizer_path"
        )
    theirs.no_padding()
    theirs.no_truncation()
    _begin_documents(theirs, ours)
    theirs.save(str(folder / "tokenizer.json"))
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": True,  # special tokens spelled out in a text stay text, as in training
        "model_max_length": max_seq_len,
    }
    pad_id = _padding_id(file, theirs, ours)
    for key, token in (("bos_token", ours.bos_id), ("eos_token", ours.eos_id), ("pad_token", pad_id)):
        config[key] = None if token is None else theirs.id_to_token(token)
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    return pad_id


def _padding_id(file: Path, theirs: tokenizers.Tokenizer, ours: Tokenizer) -> int | None:
    """The padding token that the tokenizer has or that its settings name, or else the end token.

    A new token would need a new row of the embedding.
    """
    settings = [file.with_name(name) for name in SETTINGS_FILES if file.name == "tokenizer.json"]
    for path in filter(Path.is_file, settings):
        named = json.loads(path.read_text(encoding="utf-8")).get("pad_token")
        token = theirs.token_to_id(named["content"] if isinstance(named, dict) else named or "")
        if token is not None:
            return int(token)
    for token, added in theirs.get_added_tokens_decoder().items():
        if added.special and _PADDING_NAME.fullmatch(added.content):
            return int(token)
    return ours.bos_id if ours.eos_id is None else ours.eos_id


def _begin_documents(theirs: tokenizers.Tokenizer, ours: Tokenizer) -> None:
    """Make encoding add the begin token, if the tokenizer does not do so already."""
    if ours.bos_id is None or theirs.encode("a").ids[:1] == [ours.bos_id]:
        return
    name = theirs.id_to_token(ours.bos_id)
    begin = processors.TemplateProcessing(single=f"{name} $A", special_tokens=[(name, ours.bos_id)])
    before = theirs.post_processor
    theirs.post_processor = begin if before is None else processors.Sequence([before, begin])


def _byte_level(ours: ByteTokenizer) -> tokenizers.Tokenizer:
    """The byte tokenizer in the `tokenizers` library: no merges, and a byte's id is its value."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    # the library represents bytes as characters: printable ones by themselves, the others by characters from 256 on
    characters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    theirs = tokenizers.Tokenizer(models.BPE({characters[byte]: byte for byte in range(256)}, []))
    theirs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    theirs.decoder = decoders.ByteLevel()
    theirs.add_special_tokens([AddedToken(_BYTE_BOS, special=True), AddedToken(_BYTE_EOS, special=True)])
    assert theirs.token_to_id(_BYTE_BOS) == ours.bos_id and theirs.token_to_id(_BYTE_EOS) == ours.eos_id
    return theirs
