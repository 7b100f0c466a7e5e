"""Write a checkpoint as a folder that transformers loads, and that can be shared.

The folder holds safetensors files (with an index if there are several), config.json, the tokenizer, the model's code
(transformers_model/), the job that trained it and a model card. `manifest.json`, as in a checkpoint, has the size and
CRC-32 of each file, so that `titan-peer import` detects a damaged copy.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
import socket
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from titan_peer.checkpoint.choice import find_checkpoint
from titan_peer.checkpoint.files import manifest_entries, stored_tokenizer_path, write_manifest
from titan_peer.checkpoint.folder import CONFIG, TRAIN_STATE
from titan_peer.checkpoint.inference import load_model_for_inference, require_sound_model
from titan_peer.common.errors import UserError
from titan_peer.common.folder_lock import is_running
from titan_peer.config.resolve import resolve_vocabulary
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.model import EXPERT_TABLES, ModelArgs, Transformer
from titan_peer.sharing.export_tokenizer import write_tokenizer
from titan_peer.sharing.folder import CONFIG_JSON, INDEX, TableDtype, new_folder
from titan_peer.sharing.model_card import model_card

CODE_FILES = ("configuration_titan_peer.py", "layers_titan_peer.py", "modeling_titan_peer.py")
_FLOAT_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class _Planned(NamedTuple):
    """A tensor of the export that has not been made yet."""

    name: str
    source: Tensor
    dtype: torch.dtype
    num_bytes: int


def is_table(name: str) -> bool:
    """Whether a parameter is an expert table."""
    return name.rpartition(".")[2] in EXPERT_TABLES


def transformers_config(args: ModelArgs, tokenizer: Tokenizer, dtype: str, table_dtype: TableDtype) -> dict[str, Any]:
    """The content of config.json.

    Raises:
        UserError: a block has a kind of feed-forward that the exported code does not know.
    """
    for layer in range(args.n_layers):
        if (kind := args.feed_forward_kind(layer)) not in ("feed_forward", "peer"):
            raise UserError(
                f"block {layer} is of the kind {kind!r}: only models of dense and PEER blocks can be exported"
            )
    numbers = {f.name: getattr(args, f.name) for f in dataclasses.fields(ModelArgs)}
    for key in ("n_dense_layers", "peer_every_n_layers"):  # peer_layers lists the layers instead
        del numbers[key]
    numbers["initializer_range"] = numbers.pop("init_std")
    return {
        "architectures": ["TitanPeerForCausalLM"],
        "model_type": "titan_peer",
        "auto_map": {
            "AutoConfig": "configuration_titan_peer.TitanPeerConfig",
            "AutoModelForCausalLM": "modeling_titan_peer.TitanPeerForCausalLM",
        },
        **numbers,
        "mla": dataclasses.asdict(args.mla),
        "peer": dataclasses.asdict(args.peer),
        "peer_layers": args.layers_of("peer"),
        "table_dtype": table_dtype,
        "dtype": dtype,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }


def quantize_rows(table: Tensor, table_dtype: TableDtype) -> tuple[Tensor, Tensor]:
    """A table [N, E, D] as one-byte codes and a float32 scale per row [N, E], made by torchao.

    float8 codes are returned as uint8, so that no loader converts them to another floating dtype.
    """
    try:
        from torchao.quantization import Float8Tensor, Int8Tensor, PerRow
    except ImportError:
        raise UserError(
            f"--table_dtype {table_dtype}: needs torchao; install it with: pip install 'titan_peer[export]'"
        ) from None
    rows = table.float().flatten(0, 1)
    largest = rows.abs().amax(dim=1, keepdim=True)
    # torchao makes NaN of a row of zeros in float8, and zeros of a row of numbers below 1e-5 in int8
    rows = torch.where(largest > 0, rows / largest, 1.0)
    if table_dtype == "int8":
        quantized = Int8Tensor.from_hp(rows, granularity=PerRow())
        codes = quantized.qdata
    else:
        quantized = Float8Tensor.from_hp(rows, float8_dtype=torch.float8_e4m3fn, granularity=PerRow())
        codes = quantized.qdata.view(torch.uint8)
    scale = quantized.scale.float().view_as(largest) * largest
    return codes.view(table.shape).contiguous(), scale.view(table.shape[:2]).contiguous()


def _plan(model: Transformer, dtype: torch.dtype, table_dtype: TableDtype) -> list[_Planned]:
    """The model's tensors in order; a quantised table is one entry for its codes and scales."""
    parameters = {name for name, _ in model.named_parameters()}
    planned = []
    for name, tensor in model.state_dict().items():
        if name == "output.weight" and model.args.tie_embeddings:
            continue
        kept = dtype if name in parameters else tensor.dtype  # running statistics stay float32
        size = tensor.numel() * kept.itemsize
        if is_table(name) and table_dtype != "float":
            size = tensor.numel() + 4 * tensor.shape[0] * tensor.shape[1]
        planned.append(_Planned(name, tensor, kept, size))
    return planned


def _shards(planned: Iterable[_Planned], max_bytes: int) -> list[list[_Planned]]:
    """The tensors grouped into files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[_Planned]] = [[]]
    size = 0
    for tensor in planned:
        if shards[-1] and size + tensor.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.num_bytes
    return shards


def _made(planned: _Planned, table_dtype: TableDtype) -> Iterator[tuple[str, Tensor]]:
    if is_table(planned.name) and table_dtype != "float":
        codes, scale = quantize_rows(planned.source, table_dtype)
        yield planned.name, codes
        yield f"{planned.name}_scale", scale
    else:
        yield planned.name, planned.source.to(planned.dtype).contiguous()


def _write_weights(
    model: Transformer, folder: Path, dtype: torch.dtype, table_dtype: TableDtype, max_shard_bytes: int
) -> None:
    """Write the safetensors files, with only one of them in memory at a time, and the index if there are several."""
    from safetensors.torch import save_file

    shards = _shards(_plan(model, dtype, table_dtype), max_shard_bytes)
    where: dict[str, str] = {}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing weights") as progress:
        for number, shard in enumerate(shards, start=1):
            suffix = "" if len(shards) == 1 else f"-{number:05d}-of-{len(shards):05d}"
            tensors = dict(pair for planned in shard for pair in _made(planned, table_dtype))
            save_file(tensors, folder / f"model{suffix}.safetensors", metadata={"format": "pt"})
            where.update(dict.fromkeys(tensors, f"model{suffix}.safetensors"))
            progress.update(sum(planned.num_bytes for planned in shard))
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _generation_config(config: dict[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """The content of generation_config.json: special tokens, and the ids without text, which must not be generated."""
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id") if config[key] is not None}
    without_text = [*tokenizer.unused_ids, *range(tokenizer.vocab_size, config["vocab_size"])]
    return tokens | ({"suppress_tokens": without_text} if without_text else {})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _partial_prefix(folder: Path) -> str:
    return f".{folder.name}.partial-{socket.gethostname()}-"


def _remove_leftovers(folder: Path) -> None:
    """Remove what exports to `folder` that were killed on this machine left behind; other exports may be running."""
    prefix = _partial_prefix(folder)
    for left in folder.parent.glob(f"{glob.escape(prefix)}*"):
        number = left.name.removeprefix(prefix)
        if number.isdecimal() and (int(number) == os.getpid() or not is_running(int(number))):
            shutil.rmtree(left)


def export_checkpoint(
    checkpoint: Path,
    output: Path,
    *,
    dtype: str = "float32",
    table_dtype: TableDtype = "float",
    max_shard_bytes: int = 5_000_000_000,
    license_name: str = "",
    ema: bool = False,
) -> None:
    """Write `checkpoint` (see `find_checkpoint`) to the new folder `output`, whole or not at all.

    Args:
        ema: write the moving averages of the weights in place of them.
    Raises:
        UserError: the checkpoint is damaged or not ours, the output exists or cannot be written to, or a library is
            missing.
    """
    try:
        from safetensors import SafetensorError
    except ImportError:
        raise UserError("export needs safetensors; install it with: pip install 'titan_peer[export]'") from None
    checkpoint = find_checkpoint(checkpoint, "--checkpoint")
    folder = new_folder("--output", output, checkpoint)
    partial = folder.with_name(f"{_partial_prefix(folder)}{os.getpid()}")

    def refusal(error: Exception) -> UserError:
        return UserError(f"--output {output}: cannot be written ({error})")

    try:
        try:
            _remove_leftovers(folder)
            partial.mkdir(parents=True)
        except OSError as error:
            raise refusal(error) from None
        model, job, tokenizer = load_model_for_inference(checkpoint, mmap_tables=True, ema=ema)
        resolve_vocabulary(job.model, tokenizer.vocab_size)
        require_sound_model(checkpoint, ema=ema)
        try:
            config = transformers_config(job.model, tokenizer, dtype, table_dtype)
            _write_weights(model, partial, _FLOAT_DTYPES[dtype], table_dtype, max_shard_bytes)
            tokenizer_path = stored_tokenizer_path(checkpoint, job.model.tokenizer_path)
            pad_id = write_tokenizer(tokenizer_path, partial, job.model.max_seq_len)
            config["pad_token_id"] = pad_id
            _write_json(partial / CONFIG_JSON, config)
            _write_json(partial / "generation_config.json", _generation_config(config, tokenizer))
            for name in CODE_FILES:
                shutil.copyfile(Path(__file__).with_name("transformers_model") / name, partial / name)
            for name in (CONFIG, TRAIN_STATE):
                shutil.copyfile(checkpoint / name, partial / name)
            card = model_card(checkpoint, model, job, table_dtype, license_name)
            (partial / "README.md").write_text(card, encoding="utf-8")
            for path in partial.glob("*.safetensors"):  # safetensors creates files that only their owner can read
                shutil.copymode(partial / CONFIG_JSON, path)
            write_manifest(partial, manifest_entries(partial, (p for p in partial.rglob("*") if p.is_file())))
            partial.replace(folder)
        except (OSError, SafetensorError) as error:
            raise refusal(error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
