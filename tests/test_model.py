"""The model compared with independent implementations: transformers' DeepSeek-V3 attention and brute-force PEER."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from small_models import built, small_model
from torch import Tensor
from transformers.models.deepseek_v3.configuration_deepseek_v3 import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention, DeepseekV3RotaryEmbedding

from titan_peer.model import MLA, PEER, MLAArgs, ModelArgs, PEERArgs, rope_table
from titan_peer.ops.attention import causal_mask, document_positions
from titan_peer.ops.cross_entropy import linear_cross_entropy

DIM = 96


# ---- MLA


def transformers_attention(mla: MLAArgs, seq_len: int) -> tuple[DeepseekV3Attention, DeepseekV3RotaryEmbedding]:
    rope: dict[str, object] = {"rope_type": "default", "rope_theta": mla.rope_theta}
    if mla.rope_factor > 1:
        rope = {
            "rope_type": "yarn",
            "rope_theta": mla.rope_theta,
            "factor": mla.rope_factor,
            "original_max_position_embeddings": mla.original_seq_len,
            "beta_fast": mla.beta_fast,
            "beta_slow": mla.beta_slow,
            "mscale": mla.mscale,
            "mscale_all_dim": mla.mscale_all_dim,
        }
    config = DeepseekV3Config(
        hidden_size=DIM,
        num_attention_heads=mla.n_heads,
        num_key_value_heads=mla.n_heads,
        q_lora_rank=mla.q_lora_rank or None,
        kv_lora_rank=mla.kv_lora_rank,
        qk_nope_head_dim=mla.qk_nope_head_dim,
        qk_rope_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        max_position_embeddings=4 * seq_len,
        rope_parameters=rope,
        rope_interleave=True,
        attn_implementation="eager",
    )
    return DeepseekV3Attention(config, layer_idx=0).eval(), DeepseekV3RotaryEmbedding(config)


def copy_weights(ours: MLA, theirs: DeepseekV3Attention) -> None:
    pairs = {
        "wkv_a": "kv_a_proj_with_mqa",
        "kv_norm": "kv_a_layernorm",
        "wkv_b": "kv_b_proj",
        "wo": "o_proj",
        "wq": "q_proj",
        "wq_a": "q_a_proj",
        "q_norm": "q_a_layernorm",
        "wq_b": "q_b_proj",
    }
    for our_name, their_name in pairs.items():
        if hasattr(ours, our_name):
            getattr(theirs, their_name).weight.data.copy_(getattr(ours, our_name).weight)


@pytest.mark.parametrize("q_lora_rank", [0, 24])
@pytest.mark.parametrize("yarn", ["none", "equal mscales", "unequal mscales"])
@pytest.mark.parametrize("v_head_dim", [8, 24, 40])
def test_mla_equals_transformers_deepseek_v3_attention(q_lora_rank: int, yarn: str, v_head_dim: int) -> None:
    seq_len = 48
    mla = MLAArgs(
        n_heads=4,
        q_lora_rank=q_lora_rank,
        kv_lora_rank=32,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=v_head_dim,
        rope_theta=1000.0,
    )
    if yarn != "none":
        mla.rope_factor, mla.original_seq_len = 8.0, 16
        mla.mscale, mla.mscale_all_dim = (1.0, 1.0) if yarn == "equal mscales" else (0.7, 1.3)
    torch.manual_seed(0)
    ours = MLA(ModelArgs(vocab_size=10, dim=DIM, mla=mla))
    ours.init_weights(std=0.15, residual_std=0.15)  # outputs of order one
    torch.nn.init.uniform_(ours.kv_norm.weight, 0.5, 1.5)
    theirs, rotary = transformers_attention(mla, seq_len)
    copy_weights(ours, theirs)
    x = torch.randn(2, seq_len, DIM)
    cos_sin = rotary(x, torch.arange(seq_len)[None])
    causal = torch.full((seq_len, seq_len), float("-inf")).triu(1)[None, None]
    expected = theirs(x, cos_sin, causal)[0]
    actual = ours(x, rope_table(mla, seq_len)[None], causal_mask(None, 2, seq_len, x.device))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_packed_documents_give_the_logits_of_the_documents_alone() -> None:
    model = built(small_model(mla__rope_factor=4.0, mla__original_seq_len=8)).eval()
    lengths = [5, 1, 9, 7]
    tokens = torch.randint(50, (1, sum(lengths)))
    ids = torch.repeat_interleave(torch.arange(4), torch.tensor(lengths))[None]
    with torch.no_grad():
        packed = model(tokens, ids)
        alone = torch.cat([model(part) for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-6)


def test_document_positions_restart_at_every_border() -> None:
    ids = torch.tensor([[0, 0, 1, 1, 1, 2], [3, 3, 3, 3, 3, 3]])
    assert document_positions(ids).tolist() == [[0, 1, 0, 1, 2, 0], [0, 1, 2, 3, 4, 5]]


# ---- PEER


def brute_force_peer(peer: PEER, x: Tensor, args: PEERArgs) -> Tensor:
    """Every expert's score from its own key, full sort, one expert at a time; x [T, D] float64."""
    T = x.shape[0]
    queries = F.linear(x, peer.wq.weight).view(T, args.num_heads, args.query_dim)
    if args.query_norm == "batch":
        mean, var = queries.mean(0), queries.var(0, unbiased=False)
        norm = peer.query_norm
        queries = (queries - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias
    elif args.query_norm == "rms":
        queries = F.rms_norm(queries, (args.query_dim,), peer.query_norm.weight)
    parts = queries.chunk(len(args.product_key_dim), dim=-1)
    keys = list(peer.sub_keys)
    if args.norm_query:
        parts = [p / p.norm(dim=-1, keepdim=True) for p in parts]
    if args.norm_keys:
        keys = [k / k.norm(dim=-1, keepdim=True) * peer.axis_dim**0.5 for k in keys]
    out = torch.zeros_like(x)
    activation = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}[args.activation]
    for t, h in itertools.product(range(T), range(args.num_heads)):
        scores = []
        for place in itertools.product(*(range(n) for n in args.product_key_dim)):
            key_set = h if args.keys_per_head else 0
            scores.append(sum(parts[c][t, h] @ keys[c][key_set, i] for c, i in enumerate(place)))
        best = torch.stack(scores).topk(args.num_experts_per_tok)
        gates = {"softmax": lambda s: s.softmax(0), "sigmoid": torch.sigmoid, "relu": F.relu}[args.gates](best.values)
        for gate, n in zip(gates, best.indices):
            hidden = activation(peer.experts.expert_down[n] @ x[t])  # [E]
            out[t] = out[t] + gate * (hidden @ peer.experts.expert_up[n])
    return out


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"product_key_dim": [24], "query_norm": "rms", "gates": "sigmoid", "activation": "relu"},
        {"product_key_dim": [2, 3, 4], "query_dim": 12, "query_norm": "none", "expert_hidden_size": 3},
        {"product_key_dim": [2, 3, 2, 2], "norm_query": True, "norm_keys": True, "keys_per_head": False},
        {"gates": "relu", "activation": "silu", "num_experts_per_tok": 1},
    ],
)
def test_peer_equals_a_loop_over_all_experts_in_value_and_gradient(changes: dict[str, object]) -> None:
    args = PEERArgs(num_experts=24, product_key_dim=[4, 6], num_heads=2, num_experts_per_tok=5, query_dim=8)
    for key, value in changes.items():
        setattr(args, key, value)
    torch.manual_seed(1)
    peer = PEER(10, args).double()
    peer.init_weights(std=0.5, residual_scale=1.0)
    x = torch.randn(1, 7, 10, dtype=torch.float64, requires_grad=True)
    actual = peer(x)
    expected = brute_force_peer(peer, x[0], args)
    # scores and gates are float32 by contract
    torch.testing.assert_close(actual[0], expected, rtol=1e-5, atol=1e-6)
    direction = torch.randn_like(expected)
    parameters = [x, *peer.parameters()]
    ours = torch.autograd.grad((actual[0] * direction).sum(), parameters)
    theirs = torch.autograd.grad((expected * direction).sum(), parameters)
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-4, atol=1e-5)


def test_query_batch_norm_uses_running_statistics_in_evaluation() -> None:
    model = built(small_model())
    norm = model.layers[1].peer.query_norm
    queries = torch.randn(4000, 2, 16) * 3 + 1
    for _ in range(60):
        norm(queries)
    norm.eval()
    out = norm(queries[:5])
    expected = (queries[:5] - queries.mean(0)) / (queries.var(0, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(out, expected, rtol=2e-2, atol=1e-2)


# ---- the whole model


def test_layers_with_peer_follow_the_arguments() -> None:
    def chosen(**changes: object) -> list[int]:
        args = small_model(n_layers=6, **changes)
        model = built(args)
        return [i for i, block in enumerate(model.layers) if hasattr(block, "peer")]

    assert chosen() == [1, 2, 3, 4, 5]
    assert chosen(n_dense_layers=2, peer_every_n_layers=2) == [2, 4]
    assert chosen(peer_layers=[0, 5]) == [0, 5]
    assert chosen(peer_every_n_layers=0) == []


def test_shared_experts_are_one_pair_of_tables_with_gradients_from_all_layers() -> None:
    model = built(small_model(peer__share_experts=True))
    tables = [name for name, _ in model.named_parameters() if "expert_" in name]
    assert tables == ["shared_experts.expert_down", "shared_experts.expert_up"]
    tokens = torch.randint(50, (2, 16))
    model(tokens, labels=tokens).backward()
    used = (model.shared_experts.expert_up.grad.abs().sum((1, 2)) > 0).sum()
    assert used > model.args.peer.num_heads * model.args.peer.num_experts_per_tok


def test_tied_head_is_the_embedding() -> None:
    model = built(small_model(tie_embeddings=True))
    assert model.output.weight is model.tok_embeddings.weight


@pytest.mark.parametrize("chunk_size", [7, 16, 1000])
def test_loss_in_chunks_equals_cross_entropy_of_the_logits(chunk_size: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(40, (30,))
    labels[::4] = -100
    expected = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    actual = linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size)
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-6)
    ours = torch.autograd.grad(actual * 0.5, [hidden, weight])
    theirs = torch.autograd.grad(expected * 0.5, [hidden, weight])
    for our, their in zip(ours, theirs):
        torch.testing.assert_close(our, their, rtol=1e-5, atol=1e-5)  # logits are float32 by contract
    with torch.no_grad():
        torch.testing.assert_close(
            linear_cross_entropy(hidden, weight, labels, chunk_size=chunk_size).double(), expected, rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("changes", [{}, {"peer__share_experts": True, "mla__q_lora_rank": 8}])
def test_compiled_blocks_have_no_graph_breaks_and_agree_with_eager(changes: dict[str, object]) -> None:
    args = small_model(**changes)
    tokens = torch.randint(50, (2, 24))
    ids = torch.arange(24).div(10, rounding_mode="floor").expand(2, -1)
    losses, gradients = [], []
    for compiled in (False, True):
        model = built(args)
        if compiled:
            for block in model.layers:
                block.compile(fullgraph=True)
            model.compile_loss = True
        loss = model(tokens, ids, tokens)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(*gradients):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5)
