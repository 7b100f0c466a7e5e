"""Which tokens begin and end documents: those that the tokenizer's settings name, else its special entries, never other
entries with such a text."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from corpora import SAMPLE, TOKENIZER, make_loader
from tokenizers import AddedToken

from titan_peer.checkpoint.files import read_tokenizer_files, stored_tokenizer_path
from titan_peer.checkpoint.folder import TOKENIZER as STORED
from titan_peer.common.errors import UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.data.special_tokens import describe
from titan_peer.data.tokenizer import load_tokenizer


def write_tokenizer(
    folder: Path, *, special: tuple[str, ...] = (), text: tuple[str, ...] = (), **settings: dict[str, Any]
) -> Path:
    """The bundled tokenizer without its special tokens, with others from 4,096 on, and settings files in its folder."""
    content = json.loads((Path(TOKENIZER) / "tokenizer.json").read_text(encoding="utf-8"))
    content["added_tokens"] = []
    content["model"]["vocab"] = {
        {"<|begin_of_text|>": "unused 0", "<|end_of_text|>": "unused 1"}.get(entry, entry): i
        for entry, i in content["model"]["vocab"].items()
    } | {entry: 4096 + i for i, entry in enumerate(text)}
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, values in settings.items():
        (folder / f"{name}.json").write_text(json.dumps(values), encoding="utf-8")
    return folder / "tokenizer.json"


def ids(path: Path) -> tuple[int | None, int | None]:
    tokenizer = load_tokenizer(str(path))
    return tokenizer.bos_id, tokenizer.eos_id


def test_tokens_of_any_name_are_taken_from_the_settings_beside_the_tokenizer(tmp_path: Path) -> None:
    config = {"bos_token": {"content": "<doc>", "special": True}, "eos_token": "<done>"}
    file = write_tokenizer(tmp_path, special=("<done>", "<doc>", "<s>"), tokenizer_config=config)
    assert ids(file) == ids(tmp_path) == (4097, 4096)
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "special_tokens_map.json")
    assert ids(file) == (4097, 4096)
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<s>"}', encoding="utf-8")  # it goes first
    assert ids(file) == (4097, 4098)


def test_entries_of_text_are_no_begin_and_end_tokens_unless_the_settings_say_so(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, text=("<s>", "</s>"), encoding="utf-8")
    assert ids(file) == (None, None)
    assert load_tokenizer(str(file)).decode([4096]) == "<s>"
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}', encoding="utf-8")
    assert ids(file) == (4096, 4097)
    assert load_tokenizer(str(file)).decode([4096, 70, 4097]) == load_tokenizer(str(file)).decode([70])


def test_special_entries_of_the_usual_names_are_found_without_settings(tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, special=("<pad>", "<s>", "</s>"))
    assert ids(file) == (4097, 4098)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null}', encoding="utf-8")
    assert ids(file) == (None, 4098)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('{"bos_token": "<doc>"}', "bos_token = '<doc>': tokenizer.json has no such token"),
        ('{"eos_token": 3}', "eos_token = 3: tokenizer.json has no such token"),
        ("{", "tokenizer_config.json: cannot be read"),
        ("[]", "must hold a JSON object"),
    ],
)
def test_settings_that_cannot_be_meant_are_named(settings: str, message: str, tmp_path: Path) -> None:
    file = write_tokenizer(tmp_path, special=("<s>",))
    (tmp_path / "tokenizer_config.json").write_text(settings, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_tokenizer(str(file))
    assert message in str(caught.value) and str(tmp_path / "tokenizer_config.json") in str(caught.value)


def test_a_checkpoint_keeps_the_settings_with_the_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "from").mkdir()
    config = {"bos_token": "<doc>", "eos_token": "<done>"}
    file = write_tokenizer(tmp_path / "from", special=("<done>", "<doc>"), tokenizer_config=config)
    for path in (file, file.parent):
        stored = tmp_path / path.name / STORED
        stored.mkdir(parents=True)
        for name, content in read_tokenizer_files(str(path)).items():
            (stored / name).write_bytes(content)
        assert ids(Path(stored_tokenizer_path(stored.parent, str(path)))) == (4097, 4096)


def test_a_job_says_what_its_documents_begin_and_end_with_and_warns_of_what_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("titan_peer"), "propagate", True)
    file = write_tokenizer(tmp_path, special=("</s>",))
    specials = load_tokenizer(str(file)).specials
    assert describe(specials, Data()) == (
        "documents begin without a token, end with </s> (4096); by the special tokens of tokenizer.json"
    )
    assert describe(specials, Data(add_eos=False)) == "documents begin without a token, end without a token"
    with caplog.at_level(logging.WARNING, "titan_peer"):
        make_loader([DataSource(str(SAMPLE))], tokenizer=str(file))
    assert "data.add_bos = true, but the tokenizer has no begin token" in caplog.text
    assert "name it as bos_token in a tokenizer_config.json beside tokenizer.json" in caplog.text
    assert "add_eos" not in caplog.text
    caplog.clear()
    make_loader([DataSource(str(SAMPLE))], tokenizer=str(file), add_bos=False)
    assert not caplog.text
