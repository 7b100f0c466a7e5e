"""Input that is not valid text, and output encodings that lack characters."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import sys
from collections.abc import Callable

import pytest
from small_models import build_model

from titan_peer import train
from titan_peer.commands import generate as generate_command
from titan_peer.commands import main as cli
from titan_peer.common.characters import (
    read_standard_input,
    require_whole,
    with_whole_characters,
    write_every_character,
)
from titan_peer.common.errors import UserError
from titan_peer.config.parse import load_config
from titan_peer.data.tokenizer import ByteTokenizer
from titan_peer.inference.generator import Generator, SamplingParams


@pytest.fixture
def generator() -> Generator:
    return Generator(build_model(258, n_layers=1), ByteTokenizer())


def given_standard_input(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="latin-1"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caf\udce9", "--prompt 2: has the byte 0xe9, which is not UTF-8, after 'caf'"),
        ("\ud83d!", r"--prompt 2: has half of a surrogate pair (\ud83d), which is not a character, after ''"),
    ],
)
def test_what_is_no_character_is_named_with_its_place(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        require_whole(text, "--prompt 2")
    assert str(caught.value) == message
    assert with_whole_characters(text) == text.replace("\udce9", "\ufffd").replace("\ud83d", "\ufffd")
    assert require_whole("日🙂\ufffd", "") == with_whole_characters("日🙂\ufffd") == "日🙂\ufffd"


def test_arguments_of_a_command_and_a_job_that_are_not_utf_8_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, named in ((["--prompt", "a", "--prompt", "b\udcff"], "--prompt 2"), (["--stop", "\udcff"], "stop")):
        assert cli.main(["generate", "--checkpoint", "none", *words]) == 2
        assert f"error: {named}: has the byte 0xff, which is not UTF-8" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"command line: --job.description: has the byte 0xe9"):
        load_config(["--job.description", "caf\udce9"])


def test_prompts_and_continuations_from_python_are_refused_by_number(generator: Generator) -> None:
    with pytest.raises(UserError, match="prompt 1: has half of a surrogate pair"):
        generator.generate(["a", "b\ud83d"])
    with pytest.raises(UserError, match="continuation 1: has half of a surrogate pair"):
        generator.log_likelihoods([("a", "b"), ("a", "\udc00")])


@pytest.mark.parametrize(("content", "text"), [("日é\n".encode(), "日é\n"), (b"\xef\xbb\xbfa\r\nb", "a\nb"), (b"", "")])
def test_standard_input_is_utf_8_whatever_the_locale(
    content: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_standard_input(monkeypatch, content)
    assert read_standard_input() == text


def test_standard_input_that_is_not_utf_8_is_refused_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    given_standard_input(monkeypatch, b"one\ncaf\xe9\n")
    with pytest.raises(UserError, match=r"standard input: line 2 has the byte 0xe9, which is not UTF-8"):
        read_standard_input()


def test_a_typed_line_that_is_not_utf_8_is_left_out_of_a_conversation(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    given_standard_input(monkeypatch, "\xe9\n".encode("latin-1") + "日\n".encode())
    with caplog.at_level(logging.ERROR, "titan_peer"):
        assert list(generate_command._typed_lines()) == ["日"]
    assert "the byte 0xe9" in caplog.text and "it is left out" in caplog.text


def test_an_output_without_a_character_gets_its_number_instead(
    generator: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    write_every_character()
    monkeypatch.setattr(generator.tokenizer, "decode", lambda ids: "é日🙂\udce9"[: len(ids)])
    generate_command.write(generator, [[1]], SamplingParams(max_new_tokens=3), as_json=False)
    generate_command.write(generator, ["é"], SamplingParams(max_new_tokens=1), as_json=True)
    text, json_line = written.getvalue().decode("latin-1").splitlines()
    assert text == r"\u65e5\U0001f642\udce9"
    assert json.loads(json_line)["prompt"] == "é"


@pytest.mark.parametrize("main", [cli.main, train.main])
def test_every_command_may_print_any_character(
    main: Callable[[list[str]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    with contextlib.suppress(SystemExit):
        main(["--help"])
    print("日本", flush=True)
    assert sys.stdout.buffer.getvalue().endswith(rb"\u65e5\u672c" + b"\n")  # type: ignore[attr-defined]
