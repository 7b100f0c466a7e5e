"""Small models that are built in milliseconds."""

from __future__ import annotations

import torch

from titan_peer.model import MLAArgs, ModelArgs, PEERArgs, Transformer


def small_model(**changes: object) -> ModelArgs:
    peer = PEERArgs(num_experts=64, product_key_dim=[8, 8], num_heads=2, num_experts_per_tok=4, query_dim=16)
    mla = MLAArgs(n_heads=2, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8)
    args = ModelArgs(vocab_size=50, dim=32, n_layers=3, ffn_hidden_dim=48, max_seq_len=32, mla=mla, peer=peer)
    for key, value in changes.items():
        target = args
        *path, name = key.split("__")
        for part in path:
            target = getattr(target, part)
        assert hasattr(target, name)
        setattr(target, name, value)
    return args


def built(args: ModelArgs, seed: int = 0) -> Transformer:
    with torch.device("meta"):
        model = Transformer(args)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    return model


def build_model(vocab_size: int, seed: int = 0, **changes: object) -> Transformer:
    """A small model with outputs far from zero and the running statistics of real batches."""
    mla = MLAArgs(n_heads=4, kv_lora_rank=32, qk_nope_head_dim=24, qk_rope_head_dim=8, v_head_dim=16)
    peer = PEERArgs(num_experts=1024, product_key_dim=[32, 32], num_heads=2, num_experts_per_tok=8, query_dim=32)
    args = ModelArgs(
        vocab_size=vocab_size, dim=64, n_layers=3, ffn_hidden_dim=96, max_seq_len=512, init_std=0.15, mla=mla, peer=peer
    )
    for key, value in changes.items():
        section, _, name = key.rpartition("__")
        setattr(getattr(args, section) if section else args, name, value)
    with torch.device("meta"):
        model = Transformer(args)
    model.to_empty(device="cpu")
    torch.manual_seed(seed)
    model.init_weights()
    with torch.no_grad():
        for _ in range(30):  # of the query batch norm
            model(torch.randint(vocab_size, (2, 64)))
    return model.eval()
