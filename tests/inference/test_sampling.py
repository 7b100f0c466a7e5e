"""Drawing tokens: compared with transformers, and by counting."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from titan_peer.common.errors import UserError
from titan_peer.inference.sampling import Sampler, SamplingParams


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.5, top_k=20, top_p=0.7, min_p=0.05, repetition_penalty=1.4),
    ],
)
def test_the_tokens_drawn_have_the_distribution_of_transformers_processors(params: SamplingParams) -> None:
    torch.manual_seed(3)
    logits, seen_ids = torch.randn(1, 40) * 2, torch.randint(40, (1, 10))
    processors = LogitsProcessorList()
    if params.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    processors.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    expected = processors(seen_ids, logits.clone()).softmax(-1)[0]

    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n  # every quantile once: the shares are exact up to 1/n
    seen = torch.zeros(1, 40, dtype=torch.bool).scatter_(1, seen_ids, True).repeat(n, 1)
    drawn = Sampler([params] * n, seen, torch.device("cpu"))(logits.expand(n, -1), uniform)
    shares = torch.bincount(drawn, minlength=40) / n
    torch.testing.assert_close(shares, expected, rtol=0, atol=2 / n)
    assert not (shares[expected == 0] > 0).any()


def test_greedy_and_sampled_sequences_share_a_batch() -> None:
    logits = torch.randn(2, 30)
    params = [SamplingParams(temperature=0), SamplingParams(top_k=3)]
    counts: list[Counter[int]] = [Counter(), Counter()]
    for i in range(100):
        tokens = Sampler(params, None, torch.device("cpu"))(
            logits, torch.tensor([i / 100, i / 100], dtype=torch.float64)
        )
        for counter, token in zip(counts, tokens.tolist()):
            counter[token] += 1
    assert list(counts[0]) == [int(logits[0].argmax())]
    assert set(counts[1]) == set(logits[1].topk(3).indices.tolist())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0: must be 0 (greedy) or more, and finite"),
        ({"top_p": 0.0}, "top_p = 0.0: must be more than 0 and at most 1"),
        ({"temperature": float("nan")}, "temperature = nan: must be"),
        ({"temperature": float("inf")}, "temperature = inf: must be"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty = inf: must be"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"stop": ("",)}, "stop = ('',): must not contain the empty string"),
    ],
)
def test_impossible_sampling_is_refused(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        SamplingParams(**values)  # type: ignore[arg-type]
    assert message in str(caught.value)


@pytest.mark.parametrize("temperature", [1e-60, 1e-40, 1e-6])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.tensor([[3.0, float("-inf"), 5.0, 4.9], [-90.0, float("-inf"), -80.0, -3e4]])
    for changes in ({}, {"top_k": 3, "top_p": 0.9}):
        sampler = Sampler([SamplingParams(temperature=temperature, **changes)] * 2, None, torch.device("cpu"))
        assert sampler(logits, torch.tensor([0.0, 0.999], dtype=torch.float64)).tolist() == [2, 2]
