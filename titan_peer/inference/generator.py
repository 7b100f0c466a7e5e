"""Generate text with a trained model.

A request is prefilled in MLA's expanded form, then decoded one token at a time in the absorbed form over the paged
latent cache. Requests of different lengths run in one batch; when one ends, the next takes over its place and its
blocks.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from titan_peer.common.characters import require_whole
from titan_peer.common.cpu_threads import one_thread, threads_are_chosen
from titan_peer.common.errors import UserError
from titan_peer.data.tokenizer import Tokenizer
from titan_peer.inference.decoder import Decoder
from titan_peer.inference.latent_cache import BLOCK_SIZE, CacheBatch, LatentCache, blocks_for
from titan_peer.inference.sampling import Sampler
from titan_peer.inference.sampling_params import SamplingParams
from titan_peer.inference.text_stream import TextStream
from titan_peer.model import Transformer

Prompt = str | Sequence[int]
logger = logging.getLogger("titan_peer")

_PREFILL_TOKENS = 8192  # the most tokens per forward pass, all sequences together
_LOGIT_ELEMENTS = 1 << 26  # the most logits that exist at the same time in log_likelihoods: 256 MiB
# A decode step on a CPU that reads less has such short loops that waking threads takes longer than they save
# (docs/generate.md).
_ONE_THREAD_BYTES = 64 << 20
_THREADS_OF_TORCH = torch.get_num_threads()  # before the user has set another number


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str
    """The text, without the stop string or end token that ended it."""
    token_ids: list[int]
    """All drawn tokens, including those of an end token or stop string."""
    logprobs: list[float]
    """log p of each token under the model itself, over the tokenizer's entries, before penalty, temperature and
    truncation."""
    finish_reason: Literal["eos", "stop", "length"]
    """The end token; a stop string; max_new_tokens or the end of the model's context."""
    prompt_tokens: int
    """Tokens of the prompt, including the begin token."""


class LogLikelihood(NamedTuple):
    """How well a model predicts a continuation."""

    sum_logprob: float
    """Sum of log p of its tokens, in nats."""
    is_greedy: bool
    """Whether each of its tokens is the most probable one."""
    num_tokens: int


@dataclass(frozen=True)
class TextPiece:
    """More text of the completion of prompt number `index`; the last piece carries the `completion`."""

    index: int
    text: str
    completion: Completion | None


class _Sequence:
    """A request that is being worked on."""

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, tokenizer: Tokenizer, limit: int) -> None:
        self.index, self.prompt, self.params, self.limit = index, prompt, params, limit
        self.eos_id = None if params.ignore_eos else tokenizer.eos_id
        self.random = params.random_numbers(index)
        self.stream = TextStream(tokenizer, prompt, params.stop)
        self.blocks: list[int] = []
        self.seen: Tensor | None = None  # bool [vocab]
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: Literal["eos", "stop", "length"] | None = None

    @property
    def cached_tokens(self) -> int:
        """Tokens in the cache: the newest token enters it only with the pass that takes it as input."""
        return len(self.prompt) + len(self.token_ids) - 1

    def push(self, token: int, logprob: float) -> TextPiece:
        self.token_ids.append(token)
        self.logprobs.append(logprob)
        text = ""
        if token == self.eos_id:
            self.finish_reason = "eos"
        else:
            text = self.stream.push(token)
            if self.stream.stopped:
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.limit:
                self.finish_reason = "length"
        if self.finish_reason is None:
            return TextPiece(self.index, text, None)
        text += self.stream.finish()
        if self.stream.stopped:  # possibly by an incomplete character, which is final only now
            self.finish_reason = "stop"
        completion = Completion(
            self.stream.text, self.token_ids, self.logprobs, self.finish_reason, prompt_tokens=len(self.prompt)
        )
        return TextPiece(self.index, text, completion)


class Generator:
    """Completions and log-likelihoods from a model.

    The model may be on any device, in any floating dtype; it is used in evaluation mode and returned to its earlier
    mode. A model may have a larger vocabulary than the tokenizer: ids without an entry are never drawn and have
    probability 0. Under FSDP every process must make the same calls: parameters are gathered for the duration of the
    call.

    Args:
        max_batch_size: the most sequences that are decoded together.
        compile: compile the decode step; None does so on CUDA only, since on a CPU the compiler takes longer than
            most completions.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, *, max_batch_size: int = 32, compile: bool | None = None
    ) -> None:
        if model.args.vocab_size < tokenizer.vocab_size:
            raise UserError(
                f"the tokenizer has ids up to {tokenizer.vocab_size - 1}, the model has {model.args.vocab_size} entries: they do "
                "not belong together"
            )
        self.model, self.tokenizer, self.max_batch_size = model, tokenizer, max_batch_size
        self.device = model.tok_embeddings.weight.device
        self._without_text = {*tokenizer.unused_ids, *range(tokenizer.vocab_size, model.args.vocab_size)}
        self._masked = torch.tensor(sorted(self._without_text), device=self.device)
        self.decoder = Decoder(model, compile=self.device.type == "cuda" if compile is None else compile)

    # ---- completions

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Completion]:
        """Complete every prompt.

        Args:
            prompts: text, which begins a document as in training (with the begin token, if there is one); or ids, used
                unchanged.
            params: for all prompts, or one for each.
        Returns:
            one completion per prompt, in the order of the prompts.
        Raises:
            UserError: a prompt is empty, does not fit the model's context, or has ids outside the vocabulary.
        """
        done = {piece.index: piece.completion for piece in self.stream(prompts, params) if piece.completion is not None}
        return [done[index] for index in range(len(prompts))]

    def stream(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[TextPiece]:
        """Like `generate`, but yields the text of all completions piece by piece, as it is made."""
        every = [params or SamplingParams()] * len(prompts) if not isinstance(params, Sequence) else params
        if len(every) != len(prompts):
            raise UserError(f"{len(every)} sampling parameters for {len(prompts)} prompts: give one, or one per prompt")
        waiting = deque(self._sequence(i, prompt, every[i]) for i, prompt in enumerate(prompts))
        return self._run(waiting)

    def _sequence(self, index: int, prompt: Prompt, params: SamplingParams) -> _Sequence:
        ids, context = self.encode(prompt, f"prompt {index}"), self.model.args.max_seq_len
        if len(ids) >= context:
            raise UserError(
                f"prompt {index} has {len(ids)} tokens: must be fewer than the model's context of {context}"
            )
        return _Sequence(index, ids, params, self.tokenizer, min(params.max_new_tokens, context - len(ids)))

    def encode(self, prompt: Prompt, name: str = "a prompt") -> list[int]:
        """A prompt's ids; text gets the begin token.

        Raises:
            UserError: it is empty, contains lone surrogates, or has ids without an entry in the tokenizer.
        """
        if isinstance(prompt, str):
            require_whole(prompt, name)
            bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
            ids = [*bos, *self.tokenizer.encode_batch([prompt])[0]]
        else:
            ids = list(prompt)
        if not ids:
            raise UserError(f"{name} is empty and the tokenizer has no begin token: give at least one token")
        outside = [i for i in ids if not 0 <= i < self.tokenizer.vocab_size]
        if outside:
            raise UserError(f"token {outside[0]} of {name}: must be from 0 to {self.tokenizer.vocab_size - 1}")
        if not self._without_text.isdisjoint(ids):
            unknown = next(i for i in ids if i in self._without_text)
            raise UserError(f"token {unknown} of {name}: the tokenizer has no entry of this id")
        return ids

    def _run(self, waiting: deque[_Sequence]) -> Iterator[TextPiece]:
        """Process the requests: admit and prefill as many as fit, then decode one more token of each."""
        needs = sorted((blocks_for(len(s.prompt) + s.limit - 1) for s in waiting), reverse=True)
        cache = self.decoder.new_cache(sum(needs[: self.max_batch_size]))
        running: list[_Sequence] = []
        with self._ready():
            while waiting or running:
                while waiting and len(running) < self.max_batch_size:
                    room = min(len(waiting), self.max_batch_size - len(running))
                    admitted = [waiting.popleft() for _ in range(room)]
                    for group in _groups_of_similar_length(admitted):
                        yield from self._prefill(group, cache)
                    running = _without_ended(running + admitted, cache)
                if not running:
                    return
                batch = CacheBatch([s.blocks for s in running], [s.cached_tokens for s in running], self.device)
                sampler = self._sampler(running)
                while all(s.finish_reason is None for s in running):
                    yield from self._decode(running, batch, sampler, cache)
                running = _without_ended(running, cache)

    @torch.no_grad()
    def _prefill(self, sequences: list[_Sequence], cache: LatentCache) -> list[TextPiece]:
        """Run the prompts, padded to the longest, in chunks of some thousand tokens; choose the first token after
        each."""
        for sequence in sequences:
            sequence.blocks = cache.reserve(len(sequence.prompt) + sequence.limit - 1)
            if sequence.params.repetition_penalty != 1:
                sequence.seen = torch.zeros(self.model.args.vocab_size, dtype=torch.bool, device=self.device)
                sequence.seen[sequence.prompt] = True
        lengths = [len(s.prompt) for s in sequences]
        tokens = _padded([s.prompt for s in sequences], self.device)
        batch = CacheBatch([s.blocks for s in sequences], [0] * len(sequences), self.device)
        chunk = max(BLOCK_SIZE, _PREFILL_TOKENS // len(sequences))
        last = torch.zeros(0)
        for start in range(0, max(lengths), chunk):
            counts = [min(max(length - start, 0), chunk) for length in lengths]
            step = batch.step(counts)
            hidden = self.decoder(tokens[:, start : start + chunk], step, cache, "expanded")
            newest = hidden[torch.arange(len(sequences), device=self.device), step.last]
            has_new = torch.tensor(counts, device=self.device)[:, None] > 0
            last = newest if start == 0 else torch.where(has_new, newest, last)
        return self._choose(sequences, self._sampler(sequences), last)

    @torch.no_grad()
    def _decode(
        self, sequences: list[_Sequence], batch: CacheBatch, sampler: Sampler, cache: LatentCache
    ) -> list[TextPiece]:
        """Decode one more token of every sequence."""
        with self._decoding_threads(len(sequences)):
            tokens = torch.tensor([[s.token_ids[-1]] for s in sequences], device=self.device)
            hidden = self.decoder(tokens, batch.step([1] * len(sequences)), cache)
            return self._choose(sequences, sampler, hidden[:, 0])

    def _decoding_threads(self, num_sequences: int) -> AbstractContextManager[None]:
        """A context with one CPU thread if a step reads little, unless the user has chosen the number of threads."""
        short = self.device.type == "cpu" and self.decoder.bytes_read(num_sequences) < _ONE_THREAD_BYTES
        return one_thread() if short and not threads_are_chosen(_THREADS_OF_TORCH) else nullcontext()

    def _choose(self, sequences: list[_Sequence], sampler: Sampler, hidden: Tensor) -> list[TextPiece]:
        """Each sequence's next token from its hidden state [B, D]."""
        logits = self._logits(hidden)
        uniform = torch.tensor([s.random.random() for s in sequences], dtype=torch.float64, device=self.device)
        tokens = sampler(logits, uniform)
        logprobs = logits.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0]
        return [s.push(token, lp) for s, token, lp in zip(sequences, tokens.tolist(), logprobs.tolist())]

    def _logits(self, hidden: Tensor) -> Tensor:
        """[..., D] -> float32 [..., vocab]; ids without an entry in the tokenizer get probability 0."""
        logits = self.decoder.logits(hidden)
        return logits.index_fill(-1, self._masked, float("-inf")) if len(self._masked) else logits

    def _sampler(self, sequences: list[_Sequence]) -> Sampler:
        seen = None
        if any(s.seen is not None for s in sequences):
            none = torch.zeros(self.model.args.vocab_size, dtype=torch.bool, device=self.device)
            seen = torch.stack([none if s.seen is None else s.seen for s in sequences])
            for sequence, row in zip(sequences, seen):  # the sampler marks what it chooses in these rows
                sequence.seen = row
        return Sampler([s.params for s in sequences], seen, self.device)

    # ---- log-likelihoods

    def log_likelihoods(
        self, contexts_and_continuations: Sequence[tuple[Prompt, Prompt]], batch_size: int = 8
    ) -> list[LogLikelihood]:
        """log p(continuation | context) of each pair, by full forward passes over batches of similar length.

        Args:
            contexts_and_continuations: both text (encoded together, so that tokens are as in the whole text; the
                context begins a document) or both ids. An empty context is replaced by the begin token. A context too
                long for the model is cut off at its beginning.
        Raises:
            UserError: a continuation is empty or longer than the model's context.
        """
        pairs = [self._encode_pair(i, *pair) for i, pair in enumerate(contexts_and_continuations)]
        order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]), reverse=True)
        found: dict[int, LogLikelihood] = {}
        with self._ready():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                found.update(zip(chosen, self._score([pairs[i] for i in chosen])))
        return [found[i] for i in range(len(pairs))]

    def _encode_pair(self, index: int, context: Prompt, continuation: Prompt) -> tuple[list[int], int]:
        """All ids, and the number of them, counted from the end, that belong to the continuation."""
        begin = self.tokenizer.eos_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id
        if isinstance(context, str) and isinstance(continuation, str):
            whole = require_whole(context, f"context {index}") + require_whole(continuation, f"continuation {index}")
            alone, ids = self.tokenizer.encode_batch([context, whole])
            shared = next((i for i, (a, b) in enumerate(zip(alone, ids)) if a != b), min(len(alone), len(ids)))
            before = alone[:shared]
            if self.tokenizer.bos_id is not None:
                before, ids = [self.tokenizer.bos_id, *before], [self.tokenizer.bos_id, *ids]
        else:
            if isinstance(context, str) or isinstance(continuation, str):
                raise UserError(f"pair {index}: context and continuation must both be text or both be ids")
            before, ids = list(context), [*context, *continuation]
        if not before:
            if begin is None:
                raise UserError(f"context {index} is empty and the tokenizer has neither begin nor end token")
            before, ids = [begin], [begin, *ids]
        scored, limit = len(ids) - len(before), self.model.args.max_seq_len
        if scored < 1:
            raise UserError(f"continuation {index} is empty: it needs at least one token")
        if scored > limit:
            raise UserError(f"continuation {index} has {scored} tokens: must be at most the model's context of {limit}")
        return self.encode(ids[-(limit + 1) :], f"pair {index}"), scored

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], int]]) -> list[LogLikelihood]:
        hidden = self.decoder.whole(_padded([ids[:-1] for ids, _ in pairs], self.device))  # [B, S, D]
        rows = [hidden[b, len(ids) - 1 - scored : len(ids) - 1] for b, (ids, scored) in enumerate(pairs)]
        labels = torch.tensor([i for ids, scored in pairs for i in ids[-scored:]], device=self.device)
        logprobs, is_best = [], []
        slice_size = max(1, _LOGIT_ELEMENTS // self.model.args.vocab_size)
        for states, wanted in zip(torch.cat(rows).split(slice_size), labels.split(slice_size)):
            logits = self._logits(states)
            logprobs.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].double())
            is_best.append(logits.argmax(dim=-1) == wanted)
        counts = [scored for _, scored in pairs]
        of_pairs = zip(torch.cat(logprobs).split(counts), torch.cat(is_best).split(counts), counts)
        return [LogLikelihood(lp.sum().item(), bool(best.all()), n) for lp, best, n in of_pairs]

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """Put the model in evaluation mode with gathered parameters; restore its earlier state afterwards."""
        was_training = self.model.training
        sharded = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        self.model.eval()
        for module in sharded:
            module.unshard()
        try:
            yield
        finally:
            for module in sharded:
                module.reshard()
            self.model.train(was_training)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [B, longest], zeros on the right."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=device)


def _without_ended(sequences: list[_Sequence], cache: LatentCache) -> list[_Sequence]:
    """The sequences that have not ended; the blocks of the others are released."""
    for sequence in sequences:
        if sequence.finish_reason is not None:
            cache.release(sequence.blocks)
    return [s for s in sequences if s.finish_reason is None]


def _groups_of_similar_length(sequences: list[_Sequence]) -> list[list[_Sequence]]:
    """Groups in which no prompt is more than twice as long as another, so that padding is at most half of the work."""
    groups: list[list[_Sequence]] = []
    for sequence in sorted(sequences, key=lambda s: len(s.prompt)):
        if groups and len(sequence.prompt) <= 2 * len(groups[-1][0].prompt):
            groups[-1].append(sequence)
        else:
            groups.append([sequence])
    return groups
