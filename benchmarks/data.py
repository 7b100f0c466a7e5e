"""How fast is the data path, and how long do saving and resuming take? python benchmarks/data.py [--corpora FOLDER]

The first table is the throughput of one training process: of the tokenizer alone on texts in memory, of this package's
loader (with and without worker processes) on the mix of train_configs/three_corpora.toml, and of
`datasets.interleave_datasets` with a plain packing loop on the same files and weights. These are medians of several
rounds in which the contenders alternate. The second table has, after different numbers of documents, the size of the
loader's state, the time to make it, and the time from the state to the first batch: with a file that can be read from
any position (JSONL), with one that cannot (gzip), and with a streamed dataset of the `datasets` library.
`python scripts/fetch_corpora.py` fetches the corpora.
"""

from __future__ import annotations

import gzip
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from report import markdown_table, write_results

from titan_peer.common.command_line import FlagParser
from titan_peer.config.data_source import DataSource
from titan_peer.config.job import Data
from titan_peer.config.parse import load_config
from titan_peer.data.loader import TrainingLoader, build_dataloader
from titan_peer.data.tokenizer import Tokenizer, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
BATCH = 8
MAP_BATCH = 256


def loader_for(sources: list[DataSource], tokenizer: Tokenizer, seq_len: int, **settings: Any) -> TrainingLoader:
    return build_dataloader(
        data=Data(sources=sources, **settings),
        tokenizer=tokenizer,
        seq_len=seq_len,
        global_batch_size=BATCH,
        local_batch_size=BATCH,
        dp_rank=0,
        dp_world_size=1,
        seed=0,
    )


def mix_of(folder: Path) -> list[DataSource]:
    config = load_config(["--job.config_file", str(ROOT / "train_configs/three_corpora.toml")])
    for source in config.data.sources:
        source.path = str(folder / Path(source.path).name)
    return config.data.sources


def texts_of_mix(sources: list[DataSource], characters: int) -> list[str]:
    """Texts of the three sources, whose shares of the characters are about the weights of the mix."""
    texts = []
    for source in sources:
        left = characters * source.weight
        with Path(source.path).open(encoding="utf-8") as file:
            for line in file:
                if left <= 0:
                    break
                texts.append(json.loads(line)["text"])
                left -= len(texts[-1])
    return texts


# --------------------------------------------------------------------------------------------------------------------
# throughput: each returns tokens per second


def bare_tokenizer(tokenizer: Tokenizer, texts: list[str]) -> float:
    start = time.perf_counter()
    tokens = sum(len(ids) for i in range(0, len(texts), 256) for ids in tokenizer.encode_batch(texts[i : i + 256]))
    return tokens / (time.perf_counter() - start)


def our_loader(loader: TrainingLoader, seq_len: int, tokens: int) -> float:
    start = time.perf_counter()
    batches = tokens // (BATCH * seq_len)
    for _ in range(batches):
        next(loader)
    return batches * BATCH * seq_len / (time.perf_counter() - start)


def interleaved(sources: list[DataSource], tokenizer: Tokenizer, shuffle_buffer: int = 1000) -> Any:
    """The mix as a user of `datasets` would write it."""
    streams = [
        datasets.load_dataset("json", data_files=source.path, split="train", streaming=True).select_columns(["text"])
        for source in sources
    ]
    mixed = datasets.interleave_datasets(
        [s.shuffle(seed=0, buffer_size=shuffle_buffer) for s in streams],
        probabilities=[source.weight for source in sources],
        seed=0,
        stopping_strategy="all_exhausted",
    )
    return mixed.map(
        lambda batch: {"ids": tokenizer.encode_batch(batch["text"])},
        batched=True,
        batch_size=MAP_BATCH,
        remove_columns=["text"],
    )


class PlainPacking:
    """The usual packing loop over the mix, without document ids, masks or a state to resume from."""

    def __init__(self, examples: Any, tokenizer: Tokenizer, seq_len: int) -> None:
        self.examples, self.tokenizer, self.seq_len = iter(examples), tokenizer, seq_len
        self.buffer: list[int] = []

    def run(self, tokens: int) -> float:
        """Tokens per second over whole map batches, so that everything tokenised was also packed."""
        start, fed = time.perf_counter(), 0
        size = BATCH * (self.seq_len + 1)
        while fed < tokens:
            for example in islice(self.examples, MAP_BATCH):
                self.buffer += [self.tokenizer.bos_id, *example["ids"], self.tokenizer.eos_id]
                fed += len(example["ids"]) + 2
                used = 0
                while len(self.buffer) - used >= size:
                    np.array(self.buffer[used : used + size]).reshape(BATCH, self.seq_len + 1)
                    used += size
                del self.buffer[:used]
        return fed / (time.perf_counter() - start)


def throughput(
    sources: list[DataSource], tokenizer: Tokenizer, seq_len: int, tokens: int, rounds: int
) -> dict[str, Any]:
    texts = texts_of_mix(sources, characters=3 * tokens)
    loader = loader_for(sources, tokenizer, seq_len)
    with_workers = loader_for(sources, tokenizer, seq_len, num_workers=2)
    plain = PlainPacking(interleaved(sources, tokenizer), tokenizer, seq_len)
    runs: dict[str, Callable[[], float]] = {
        "bare tokenizer": lambda: bare_tokenizer(tokenizer, texts),
        "titan_peer, one process": lambda: our_loader(loader, seq_len, tokens),
        "titan_peer, 2 workers": lambda: our_loader(with_workers, seq_len, tokens),
        "datasets.interleave_datasets and a packing loop": lambda: plain.run(tokens),
    }
    for run in runs.values():  # to fill the buffers; the second table times opening
        run()
    found: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            found[name].append(run())
    return found


# --------------------------------------------------------------------------------------------------------------------
# state and resume


def resume_times(path: Path, tokenizer: Tokenizer, seq_len: int, documents: list[int]) -> list[dict[str, float]]:
    """The size of a loader's state over one source, and the times to make it and to resume from it, after each of these
    numbers of documents."""
    source = DataSource(str(path), name="source")
    loader = loader_for([source], tokenizer, seq_len)
    results = []
    read = 0
    for target in documents:
        while read < target:
            batch = next(loader)
            read += int((batch["tokens"] == tokenizer.bos_id).sum())
        start = time.perf_counter()
        state = loader.state_dict()
        text = json.dumps(state)
        saved = time.perf_counter() - start
        expected = next(loader)
        read += int((expected["tokens"] == tokenizer.bos_id).sum())
        start = time.perf_counter()
        resumed = loader_for([source], tokenizer, seq_len)
        resumed.load_state_dict(json.loads(text))
        found = next(resumed)
        seconds = time.perf_counter() - start
        assert (found["tokens"] == expected["tokens"]).all()
        results.append({"documents": target, "bytes": len(text), "save_ms": 1e3 * saved, "resume_ms": 1e3 * seconds})
    return results


def datasets_resume_times(path: Path, documents: list[int]) -> list[float]:
    """Milliseconds from the state of a streamed dataset to the next example. The dataset is not shuffled, because its
    state does not contain the shuffle buffer."""
    times = []
    for target in documents:
        stream = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        for _ in islice(iter(stream), target):
            pass
        state = stream.state_dict()
        start = time.perf_counter()
        again = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        again.load_state_dict(state)
        next(iter(again))
        times.append(1e3 * (time.perf_counter() - start))
    return times


def main() -> None:
    parser = FlagParser(__doc__)
    parser.add_argument("--corpora", type=Path, default=ROOT / "outputs/corpora")
    parser.add_argument("--seq_len", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=2_000_000, help="per contender and round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--documents", type=int, nargs="+", default=[10, 1_000, 100_000])
    parser.add_argument("--output", type=Path, default=None, help="folder of the results (default: benchmarks/results)")
    args = parser.parse_args()
    datasets.disable_progress_bars()
    tokenizer = load_tokenizer(str(ROOT / "assets/tokenizer"))
    sources = mix_of(args.corpora)

    speeds = throughput(sources, tokenizer, args.seq_len, args.tokens, args.rounds)
    medians = {name: statistics.median(of_rounds) for name, of_rounds in speeds.items()}
    bare = medians["bare tokenizer"]
    rows = [(name, f"{v:,.0f}", f"{v / bare:.2f}") for name, v in medians.items()]
    text = f"Tokens per second, medians of {args.rounds} rounds.\n\n" + markdown_table(
        ["contender", "tokens/s", "share of the bare tokenizer"], rows
    )

    path = args.corpora / "gcide.jsonl"
    with tempfile.TemporaryDirectory() as scratch:
        compressed = Path(scratch) / "gcide.jsonl.gz"
        with path.open("rb") as source, gzip.open(compressed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        plain = resume_times(path, tokenizer, args.seq_len, args.documents)
        gz = resume_times(compressed, tokenizer, args.seq_len, args.documents)
    theirs = datasets_resume_times(path, args.documents)
    rows = [
        (
            f"{p['documents']:,}",
            f"{p['bytes']:,}",
            f"{p['save_ms']:.2f}",
            f"{p['resume_ms']:.0f}",
            f"{g['resume_ms']:.0f}",
            f"{t:.0f}",
        )
        for p, g, t in zip(plain, gz, theirs)
    ]
    head = ["documents read", "state, bytes", "state, ms", "resume JSONL, ms", "resume gzip, ms", "datasets JSONL, ms"]
    text += "\n\nState and resume (including opening, the first window and the first batch).\n\n" + markdown_table(
        head, rows
    )
    print(text)
    data = {"tokens_per_second": speeds, "jsonl": plain, "gzip": gz, "datasets_resume_ms": theirs}
    where = {} if args.output is None else {"folder": args.output}
    print(write_results("data", "cpu", text, data, **where))


if __name__ == "__main__":
    main()
