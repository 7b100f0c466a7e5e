"""How a job continues in its data from a checkpoint: which settings must be equal, and where each source continues."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from titan_peer.common.errors import UserError
from titan_peer.data.identity import another_reading
from titan_peer.data.pipeline import Pipeline
from titan_peer.data.sources import Source
from titan_peer.data.streams import State

logger = logging.getLogger("titan_peer")


# --------------------------------------------------------------------------------------------------------------------
# Settings of the job


def order_settings(pipeline: Pipeline) -> State:
    """The settings, by key, that decide the documents' order and what is added to them."""
    data, encoder = pipeline.data, pipeline.encoder
    return {
        "data.shuffle": data.shuffle,
        "data.shuffle_buffer_size": data.shuffle_buffer_size if data.shuffle else None,
        "debug.seed": pipeline.seed if data.shuffle else None,
        # the keys have no effect if the tokenizer has no such token
        "data.add_bos": data.add_bos and encoder.tokenizer.bos_id is not None,
        "data.add_eos": data.add_eos and encoder.tokenizer.eos_id is not None,
    }


def require_same_order(saved: State, pipeline: Pipeline) -> None:
    """Raise UserError if a saved place in the data would mean another place with the current settings.

    Args:
        saved: `order_settings` at the save; empty in states of versions that did not store them.
    """
    now = order_settings(pipeline)
    for key, value in saved.items():
        if now[key] != value and None not in (now[key], value):
            raise UserError(
                f"{key} = {_word(now[key])}: the checkpoint was made with {_word(value)}, and its place in the data is "
                "valid only with that"
            )


def _word(value: object) -> str:
    return str(value).lower()


# --------------------------------------------------------------------------------------------------------------------
# Sources


def described(source: Source) -> State:
    """What a checkpoint stores about a source, besides how much of it was read."""
    return {"fingerprint": source.fingerprint(), "seed": source.seed, **source.identity}


def continue_sources(state: State, sources: Sequence[Source]) -> State:
    """Match a job's sources with those of a loader's state, and log for each whether it continues.

    Sources are identified by their names. One without a name, whose path serves as its name, is also identified by its
    content, so that files which were moved continue in the order they had.

    Returns:
        the state, with the current names.
    Raises:
        UserError: a source's files, or the way they are read, are not those of the checkpoint.
    """
    saved, called = state["sources"], {}
    free = [name for name in saved if name not in {source.name for source in sources}]
    lines = []
    for source in sources:
        name = source.name if source.name in saved else None if source.config.name else _moved(source, saved, free)
        if name is None:
            known_by = "name" if source.config.name else "path or content"
            lines.append(f"{source.name} starts from its beginning: the checkpoint has no source with that {known_by}")
            continue
        _require_same(source, saved[name])
        if name != source.name:
            free.remove(name)
            called[name] = source.name
        source.reorder(saved[name].get("seed", source.seed))
        lines.append(_going_on(source, name, saved[name]))
    lines += [f"{name} is in the checkpoint but not in the job" for name in free]
    for line in lines:
        logger.info("data: %s", line)
    return _renamed(state, called)


def _moved(source: Source, saved: Mapping[str, State], free: Sequence[str]) -> str | None:
    """The saved name of an unnamed source whose files have been moved; None if there is no such source."""
    now = described(source)

    def is_same(entry: State) -> bool:
        return (
            all(entry.get(key) == now[key] for key in ("fingerprint", "content"))
            and another_reading(entry["reading"], now["reading"]) is None
        )

    return next((name for name in free if is_same(saved[name])), None)


def _require_same(source: Source, saved: State) -> None:
    """Raise UserError unless a saved place in the source is still valid; older states store less to compare."""
    now, key = described(source), source.key
    if saved["fingerprint"] != now["fingerprint"] or saved.get("content", now["content"]) != now["content"]:
        raise UserError(
            f"{key}.path = {source.config.path}: its files have changed since the checkpoint; give it another {key}.name "
            "to read it from its beginning"
        )
    reading = another_reading(saved["reading"], now["reading"]) if "reading" in saved else None
    if reading is not None:
        raise UserError(
            f"{key}.{reading} = {now['reading'].get(reading)!r}: the checkpoint was made with "
            f"{saved['reading'].get(reading, 'another key')!r}, which makes other documents from the same files; go back to "
            f"that, or give another {key}.name to read them from their beginning"
        )


def _going_on(source: Source, name: str, saved: State) -> str:
    line = f"{source.name} continues in epoch {saved['epoch']}, after {saved['tokens']:,} tokens"
    if name != source.name:
        line += f"; the checkpoint calls the same files {name}"
    if saved.get("modified", source.identity["modified"]) < source.identity["modified"]:
        line += "; a file was written to after the save, but its size and the parts of it that are compared have not changed"
    return line


def _renamed(state: State, called: Mapping[str, str]) -> State:
    """A loader's state with its sources renamed: `called` maps old names to new ones."""

    def renamed(by_name: Mapping[str, State]) -> State:
        return {called.get(name, name): value for name, value in by_name.items()}

    def renamed_mixture(mixture: State) -> State:
        return {key: renamed(value) if isinstance(value, dict) else value for key, value in mixture.items()}

    streams = {}
    for number, stream in state["streams"].items():
        sequences = stream["sequences"]
        if state["mix_by"] == "tokens":
            sequences = renamed_mixture(sequences)
        else:
            sequences = {**sequences, "documents": renamed_mixture(sequences["documents"])}
        streams[number] = {**stream, "sequences": sequences}
    return {**state, "sources": renamed(state["sources"]), "streams": streams}
