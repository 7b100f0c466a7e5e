"""A disk or file server that fails while data are read: not an error of the document or of the user."""

from __future__ import annotations

import errno
import gzip
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpora import write_jsonl, write_parquet

from titan_peer.common.errors import TransientError, UserError
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.data.loader import build_dataloader
from titan_peer.data.sources import Source, open_source
from titan_peer.data.tokenizer import ByteTokenizer, load_tokenizer
from titan_peer.failures import exit_status

ROOT = Path(__file__).resolve().parents[2]
TEXTS = [f"document {i} with a few words" for i in range(200)]


def gz(path: Path) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "a.txt": lambda path: path.write_text("some text", encoding="utf-8"),
    "a.jsonl": lambda path: write_jsonl(path, TEXTS),
    "a.jsonl.gz": gz,
    "a.parquet": lambda path: write_parquet(path, TEXTS),
}


class Failing(io.RawIOBase):
    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def readinto(self, buffer: Any) -> int:
        raise OSError(errno.EIO, "Input/output error")


@pytest.fixture
def fails(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """After its call, files whose paths end like this can be opened but not read."""
    import builtins

    import pyarrow.parquet

    suffix = "nothing yet"
    real, real_io, real_parquet = builtins.open, io.open, pyarrow.parquet.ParquetFile

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not str(file).endswith(suffix):
            return real(file, mode, *args, **kwargs)
        raw = io.BufferedReader(Failing())
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding="utf-8")

    def parquet(path: Any, *args: Any, **kwargs: Any) -> Any:
        if str(path).endswith(suffix):
            raise OSError(errno.EIO, "Input/output error")
        return real_parquet(path, *args, **kwargs)

    def begin(what: str) -> None:
        nonlocal suffix
        suffix = what

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(io, "open", opened)
    monkeypatch.setattr(pyarrow.parquet, "ParquetFile", parquet)
    yield begin
    monkeypatch.setattr(io, "open", real_io)


def read(source: Source) -> list[object]:
    return [record for chunk in range(source.num_chunks) for record in source.records(chunk)]


@pytest.mark.parametrize("on_bad_document", ["error", "skip"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_fails_makes_no_bad_document(
    name: str, on_bad_document: str, tmp_path: Path, fails: Callable[[str], None]
) -> None:
    WRITERS[name](tmp_path / name)
    config = DataSource(str(tmp_path / name), on_bad_document=on_bad_document)  # type: ignore[arg-type]
    source = open_source(config, "data.sources[0]")
    whole = read(source)
    fails(name)
    with pytest.raises(TransientError, match=rf"{name}.*: cannot be read: .*Input/output error"):
        read(source)
    with pytest.raises(TransientError, match=rf"{name}: .*Input/output error"):  # the same where it begins
        open_source(config, "data.sources[0]")
    fails("nothing")
    assert read(source) == whole


@pytest.mark.parametrize("workers", [0, 1])
def test_a_reader_and_a_worker_hand_it_on_as_what_it_is(
    workers: int, tmp_path: Path, fails: Callable[[str], None]
) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    data = Data(sources=[DataSource(str(tmp_path / "a.jsonl"))], num_workers=workers)
    loader = build_dataloader(
        data=data,
        tokenizer=ByteTokenizer(),
        seq_len=64,
        global_batch_size=1,
        local_batch_size=1,
        dp_rank=0,
        dp_world_size=1,
        seed=1,
    )
    fails("a.jsonl")
    with pytest.raises(TransientError, match=r"a.jsonl: cannot be read: .*Input/output error"):
        next(loader)
    loader.close()


def test_a_tokenizer_on_a_failing_disk(tmp_path: Path, fails: Callable[[str], None]) -> None:
    (tmp_path / "tokenizer.json").write_bytes((ROOT / "assets/tokenizer/tokenizer.json").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    fails("tokenizer_config.json")
    with pytest.raises(TransientError, match=r"tokenizer_config.json: cannot be read: Input/output error"):
        load_tokenizer(str(tmp_path))


def test_the_job_may_be_started_again_after_it_and_not_after_what_the_user_has_to_mend(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    assert exit_status(TransientError("a.jsonl: cannot be read: Input/output error")) == 1
    assert exit_status(UserError("a.jsonl: no such file")) == 2
    assert capsys.readouterr().err == (
        "error: a.jsonl: cannot be read: Input/output error\nerror: a.jsonl: no such file\n"
    )
