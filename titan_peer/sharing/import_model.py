"""Turn an exported folder into a checkpoint for decoding, evaluation and training."""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from titan_peer.checkpoint.checkpointer import Checkpointer
from titan_peer.checkpoint.files import DamagedCheckpointError, misfits, read_tokenizer_files, verify
from titan_peer.checkpoint.folder import CONFIG, MANIFEST, TRAIN_STATE
from titan_peer.checkpoint.saving import CheckpointSaveError
from titan_peer.common.errors import UserError
from titan_peer.config.job import JobConfig
from titan_peer.config.parse import job_from_table
from titan_peer.config.resolve import resolve_vocabulary
from titan_peer.config.saved_job import read_saved_job
from titan_peer.data.tokenizer import load_tokenizer
from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer, rope_table
from titan_peer.optim.optimizers import Optimizers
from titan_peer.sharing.export import is_table, transformers_config
from titan_peer.sharing.folder import CONFIG_JSON, INDEX, new_folder, require_exported

logger = logging.getLogger("titan_peer")

_UNFINISHED = ".import-in-progress"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: does not exist; give a folder that titan-peer export wrote") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: must hold a JSON object")
    return content


def _weight_files(folder: Path) -> list[Path]:
    if not (folder / INDEX).is_file():
        return [folder / "model.safetensors"]
    names = _read_json(folder / INDEX).get("weight_map", {}).values()
    return [folder / name for name in sorted(set(names))]


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of an exported folder; quantised tables as float32.

    Raises:
        UserError: a file is missing or invalid.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError("import needs safetensors; install it with: pip install 'titan_peer[export]'") from None
    weights: dict[str, Tensor] = {}
    for path in tqdm(_weight_files(folder), desc="reading weights", unit="file"):
        try:
            with safe_open(path, framework="pt") as file:
                weights.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 - not a dict
        except FileNotFoundError:
            raise UserError(f"{path}: does not exist") from None
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: is not a complete safetensors file: {error}") from None
    for name in [n for n in weights if n.endswith("_scale") and is_table(n.removesuffix("_scale"))]:
        table, scale = name.removesuffix("_scale"), weights.pop(name)
        codes = weights[table]
        codes = codes.view(torch.float8_e4m3fn) if codes.dtype == torch.uint8 else codes
        weights[table] = codes.float() * scale[..., None]
    return weights


def read_job(folder: Path) -> tuple[JobConfig, dict[str, Any]]:
    """The job that trained an exported model, and its state: step, tokens, data.

    A folder that transformers has saved again contains neither; its job then has the model's architecture and defaults
    for everything else.

    Raises:
        UserError: the folder is not an export of ours, or its config.toml and config.json describe different models.
    """
    config = _read_json(folder / CONFIG_JSON)
    if config.get("model_type") != "titan_peer":
        raise UserError(
            f"{folder / CONFIG_JSON}: model_type = {config.get('model_type')!r}: must be 'titan_peer'; models of other "
            "architectures cannot be imported"
        )
    is_saved_again = not (folder / CONFIG).exists() and not (folder / TRAIN_STATE).exists()
    if is_saved_again:
        job, state = _job_around(config, folder / CONFIG_JSON), {"step": 0, "tokens_seen": 0}
        logger.info(
            "%s: has no %s, probably because transformers has saved it again: the job's keys outside [model] have their "
            "defaults, and training starts at step 0 and needs data.sources",
            folder,
            CONFIG,
        )
    elif not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG}: does not exist; give a folder that titan-peer export wrote")
    else:
        job, state = read_saved_job(folder / CONFIG), _read_json(folder / TRAIN_STATE)
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise UserError(
            f"{file}: does not exist; save the tokenizer there too: AutoTokenizer.from_pretrained(EXPORT, "
            f"trust_remote_code=True).save_pretrained({str(folder)!r})"
        )
    job.model.tokenizer_path = str(file)
    tokenizer = load_tokenizer(job.model.tokenizer_path)
    resolve_vocabulary(job.model, tokenizer.vocab_size)
    wanted = transformers_config(job.model, tokenizer, config.get("dtype", ""), config.get("table_dtype", "float"))  # type: ignore[arg-type]
    later = ("zero_init_outputs", "embedding_norm")  # an earlier version did not write them
    defaults: dict[str, Any] = {"mla": dataclasses.asdict(MLAArgs()), "peer": dataclasses.asdict(PEERArgs())}
    defaults |= {key: getattr(ModelArgs, key) for key in later}
    numbers = ("vocab_size", "dim", "n_layers", "ffn_hidden_dim", "max_seq_len", "norm_eps", "tie_embeddings", *later)
    for key in (*numbers, "mla", "peer", "peer_layers"):
        found = config.get(key, defaults.get(key))
        if isinstance(found, dict):  # an earlier version had fewer keys
            found = defaults[key] | found
        if found != wanted[key]:
            raise UserError(
                f"{folder / CONFIG_JSON}: {key} = {config.get(key)!r}, but {folder / CONFIG} says {wanted[key]!r}"
            )
    return job, state


def _job_around(config: dict[str, Any], file: Path) -> JobConfig:
    """A job for the architecture that config.json describes.

    Raises:
        UserError: the architecture is incomplete or impossible.
    """
    model = {key.name: config[key.name] for key in dataclasses.fields(ModelArgs) if key.name in config}
    model["init_std"] = config.get("initializer_range", ModelArgs.init_std)
    if not config.get("peer_layers"):
        model["peer_every_n_layers"] = 0
    sources = [{"path": "path/of/your/data.jsonl"}]
    job = job_from_table({"model": model, "data": {"sources": sources}}, str(file))
    if problems := job.model.problems():
        raise UserError("\n".join(f"{file}: {problem}" for problem in problems))
    job.training.seq_len = min(job.training.seq_len, job.model.max_seq_len)
    return job


def import_model(folder: Path, output: Path) -> Path:
    """Create the run folder `output` with a checkpoint of an exported model; returns the checkpoint.

    Training continues from it with the optimizer's moments at zero; the random numbers are those of a new run.

    Raises:
        UserError: the export is damaged or not ours, or the output exists.
    """
    require_exported(folder)
    _remove_remains(output)
    new_folder("--output", output, folder)
    job, state = read_job(folder)
    if (folder / MANIFEST).is_file():
        try:
            verify(folder)
        except DamagedCheckpointError as damage:
            raise UserError(
                f"{folder}: the export is damaged: {damage}; if its files were changed on purpose, remove its {MANIFEST}"
            ) from None
    weights = read_weights(folder)

    with torch.device("meta"):
        model = Transformer(job.model)
    if job.model.tie_embeddings and "tok_embeddings.weight" in weights:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items()}
    if problem := misfits(wanted, shapes):
        raise UserError(f"{folder}: {problem}; the weights are not those of {CONFIG_JSON}")
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()}, assign=True)
    if job.model.tie_embeddings:
        model.output.weight = model.tok_embeddings.weight
    model.rope = rope_table(job.model.mla, job.model.max_seq_len)

    try:
        return _write_run(folder, output, job, model, state)
    except (OSError, CheckpointSaveError) as error:
        shutil.rmtree(output, ignore_errors=True)
        raise UserError(f"--output {output}: cannot be written ({error})") from None


def _remove_remains(output: Path) -> None:
    """Remove what an import that was killed left behind, so that it can be started again."""
    if (output / _UNFINISHED).is_file():
        shutil.rmtree(output)


def _write_run(folder: Path, output: Path, job: JobConfig, model: Transformer, state: dict[str, Any]) -> Path:
    """Write the run's folder: tokenizer, config.toml and the checkpoint, which is returned."""
    tokenizer = output / "tokenizer"
    output.mkdir(parents=True, exist_ok=True)
    (output / _UNFINISHED).touch()
    tokenizer.mkdir()
    for name, content in read_tokenizer_files(str(folder / "tokenizer.json")).items():
        (tokenizer / name).write_bytes(content)
    job.model.tokenizer_path, job.job.dump_folder, job.job.config_file = str(tokenizer), str(output), ""
    (output / CONFIG).write_text(job.to_toml(), encoding="utf-8")
    checkpointer = Checkpointer(job, model, Optimizers(model, job.optimizer))
    checkpointer.save(state["step"], state, wait=True)
    ((_, saved),) = checkpointer.newly_saved()
    (output / _UNFINISHED).unlink()
    return saved
