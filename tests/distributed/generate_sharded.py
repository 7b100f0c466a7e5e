"""Run by test_generate.py in two processes: completions and log-likelihoods from a model under FSDP and expert
parallelism.

The first process writes the results.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch.distributed as dist

from titan_peer.config.parse import load_config
from titan_peer.distributed.world import init_world
from titan_peer.inference.generator import Generator, SamplingParams
from titan_peer.trainer import Trainer


def main(output: Path, prompts: list[str], arguments: list[str]) -> None:
    config = load_config(arguments)
    world = init_world(config.parallelism)
    trainer = Trainer(config, world)
    generator = Generator(trainer.model, trainer.tokenizer)
    completions = generator.generate(prompts, SamplingParams(max_new_tokens=10, temperature=0, ignore_eos=True))
    scores = generator.log_likelihoods([(prompt, " and so on") for prompt in prompts])
    if world.is_first:
        result = {"token_ids": [c.token_ids for c in completions], "sum_logprobs": [s.sum_logprob for s in scores]}
        output.write_text(json.dumps(result), encoding="utf-8")
    if dist.is_initialized():
        dist.destroy_process_group()
