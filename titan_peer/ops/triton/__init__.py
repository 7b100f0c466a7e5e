"""The Triton backend: the functions of `reference`, computed by GPU kernels.

Nothing here makes the host wait for the device: the number of touched rows stays on the device, and tensors whose length
depends on it have the largest possible length. With TRITON_INTERPRET=1 the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from titan_peer.ops import reference, settings
from titan_peer.ops.checks import require_adamw_state, require_contiguous, require_pairs_fit
from titan_peer.ops.sorted_pairs import SortedPairs
from titan_peer.ops.triton import adamw, experts, pairs, retrieval, rows, tuning

_power_of_2 = triton.next_power_of_2


def unavailable_reason(device_type: str) -> str | None:
    """Why the kernels cannot run on a kind of device, or None if they can."""
    if tuning.INTERPRETED:
        return None if device_type == "cpu" else "TRITON_INTERPRET=1 is set: kernels run on CPU tensors only"
    if device_type != "cuda":
        return f"Triton kernels run on CUDA devices, not on {device_type} (TRITON_INTERPRET=1 runs them there, slowly)"
    capability = torch.cuda.get_device_capability()
    return None if capability >= (8, 0) else f"compute capability {capability}: Triton kernels need 8.0 or more"


def description() -> str:
    """One line: what runs, and whether its launches were tuned."""
    if tuning.INTERPRETED:
        return f"Triton {triton.__version__} kernels, interpreted (for tests; very slow)"
    tuned = tuning.is_tuned(torch.device("cuda", torch.cuda.current_device()))
    return f"Triton {triton.__version__} kernels, launched {'as tuned' if tuned else 'by rule'}"


# ---- experts


def peer_forward(
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    z = torch.empty(*indices.shape, down.shape[1], dtype=torch.float32, device=x.device)
    return _gather_dot_sum("experts_forward", x, indices, gates, z, down, up, activation, None, sum_dtype), z


def peer_backward(
    dy: Tensor,
    x: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    down: Tensor,
    up: Tensor,
    activation: str,
    sum_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dz, hidden, dgates = torch.empty_like(z), torch.empty_like(z), torch.empty_like(z)
    sum_dtype, outputs = sum_dtype or x.dtype, (dz, hidden, dgates)
    dx = _gather_dot_sum("experts_backward", dy, indices, gates, z, up, down, activation, outputs, sum_dtype)
    summed = dgates.squeeze(-1) if z.shape[2] == 1 else dgates.sum(-1)
    return dx, summed.to(gates.dtype), dz, hidden


def _gather_dot_sum(
    kernel: str,
    vectors: Tensor,
    indices: Tensor,
    gates: Tensor,
    z: Tensor,
    dotted: Tensor,
    summed: Tensor,
    activation: str,
    outputs: tuple[Tensor, Tensor, Tensor] | None,
    sum_dtype: torch.dtype | None,
) -> Tensor:
    """The sums [T, O], in `sum_dtype` (None: the vectors')."""
    sum_dtype = sum_dtype or vectors.dtype
    (T, K), (_, E, D), O = indices.shape, dotted.shape, summed.shape[2]
    launch = tuning.launch_for(tuning.problem(kernel, dotted, K, E, D), vectors.device)
    places = K * E
    splits = tuning.num_splits(vectors.device, T, triton.cdiv(places, launch.block)) if places else 1
    chunk = triton.cdiv(triton.cdiv(places, launch.block), splits) * launch.block
    out = torch.empty(splits, T, O, dtype=sum_dtype if splits == 1 else torch.float32, device=vectors.device)
    if T == 0:
        return out[0].to(sum_dtype)
    with torch.cuda.device_of(vectors):
        experts.gather_dot_sum[(T, splits)](
            vectors.contiguous(),
            indices.contiguous(),
            gates.contiguous(),
            z,
            dotted.contiguous(),
            summed.contiguous(),
            out,
            *(outputs or (z, z, z)),
            T,
            K=K,
            E=E,
            D=D,
            O=O,
            ACTIVATION=activation,
            BACKWARD=outputs is not None,
            CHUNK=max(chunk, 1),
            BLOCK=launch.block,
            BLOCK_D=_power_of_2(D),
            BLOCK_O=_power_of_2(O),
            STAGES=launch.num_stages,
            num_warps=launch.num_warps,
        )
    return out[0] if splits == 1 else out.sum(0).to(sum_dtype)


# ---- table gradients from their factors


def sort_pairs(indices: Tensor, num_experts: int) -> SortedPairs:
    """As the reference's, but order, row_ids and run_starts have the largest possible lengths, [P], [P] and [P + 1] with
    P = T * K; the contents after the present pairs, and after the runs, are undefined."""
    P, device = indices.numel(), indices.device
    require_pairs_fit(P, num_experts)
    wanted = indices.reshape(-1)
    # int32 halves the number of the sort's passes; absent pairs go last, so that the present ones begin at 0
    keys, order = torch.where(wanted < 0, num_experts, wanted).int().sort(stable=True)
    starts = (keys[1:] != keys[:-1]) & (keys[1:] < num_experts)
    first = keys[:1] < num_experts
    runs = torch.cat([first, starts]).cumsum(0, dtype=torch.int32)
    row_ids = torch.empty(P, dtype=torch.int32, device=device)
    run_starts = torch.empty(P + 1, dtype=torch.int32, device=device)
    num_rows = torch.empty((), dtype=torch.int32, device=device)
    block = 1024
    with torch.cuda.device_of(indices):
        pairs.mark_runs[(triton.cdiv(P + 1, block),)](
            keys, runs, row_ids, run_starts, num_rows, P, num_experts, BLOCK=block
        )
    return SortedPairs(order.int(), row_ids, run_starts, num_rows)


def _row_launch(
    kernel: str, pairs: SortedPairs, weights: Tensor, vectors: Tensor, table: Tensor | None = None
) -> dict[str, int]:
    """Shapes and launch of a kernel over gradient rows: its constants, and the number of programs under "programs"."""
    (K, E), D = weights.shape[1:], vectors.shape[1]
    problem = tuning.problem(kernel, vectors if table is None else table, K, E, D)
    launch = tuning.launch_for(problem, vectors.device)
    block_d = min(_power_of_2(D), 4096)
    most_rows = pairs.order.numel() if table is None else min(pairs.order.numel(), table.shape[0])
    units = most_rows * E * triton.cdiv(D, block_d)
    return {
        "programs": tuning.num_programs(vectors.device, launch.num_warps, units),
        "K": K,
        "E": E,
        "D": D,
        "BLOCK_P": launch.block,
        "BLOCK_D": block_d,
        "num_warps": launch.num_warps,
    }


def _rows_last_contiguous(vectors: Tensor) -> Tensor:
    return vectors if vectors.stride(1) == 1 else vectors.contiguous()


def table_gradient(
    pairs: SortedPairs, weights: Tensor, vectors: Tensor, out: Tensor, *, compact: bool = False, add: bool = False
) -> None:
    require_contiguous("out", out)
    constants = _row_launch("table_gradient", pairs, weights, vectors, out)
    vectors = _rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    # A small table's runs are long: several programs share a run, each writing into a part of its own.
    splits = 1 if compact else tuning.num_splits(out.device, programs, 16)
    parts = out if splits == 1 else torch.zeros(splits, *out.shape, dtype=torch.float32, device=out.device)
    with torch.cuda.device_of(out):
        rows.write_gradient[(programs * splits,)](
            pairs.order,
            pairs.row_ids,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            parts,
            vectors.stride(0),
            out.numel(),
            COMPACT=compact,
            ADD=add and splits == 1,
            SPLITS=splits,
            **constants,
        )
    if splits > 1:
        out.add_(parts.sum(0)) if add else out.copy_(parts.sum(0))


def dense_gradients(indices: Tensor, factors: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    table = factors[0][2]
    K, E, D = indices.shape[1], table.shape[1], table.shape[2]
    launch = tuning.launch_for(tuning.problem("table_gradient", table, K, E, D), table.device)
    if settings.use_atomics(launch.variant == "atomic"):
        for weights, vectors, out in factors:
            _add_gradient(indices, weights, vectors, out)
        return
    sorted_pairs = sort_pairs(indices, table.shape[0])
    for weights, vectors, out in factors:
        table_gradient(sorted_pairs, weights, vectors, out)


def _add_gradient(indices: Tensor, weights: Tensor, vectors: Tensor, out: Tensor) -> None:
    (K, E), D, P = weights.shape[1:], vectors.shape[1], indices.numel()
    require_pairs_fit(P, out.shape[0])
    require_contiguous("out", out)
    if P == 0:
        return
    vectors = _rows_last_contiguous(vectors)
    total = out if out.dtype == torch.float32 else torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    block_p, block_d = 4, min(_power_of_2(D), 1024)
    with torch.cuda.device_of(out):
        rows.add_gradient[(triton.cdiv(P, block_p), E * triton.cdiv(D, block_d))](
            indices.contiguous(),
            weights.contiguous(),
            vectors,
            total,
            vectors.stride(0),
            P,
            K=K,
            E=E,
            D=D,
            BLOCK_P=block_p,
            BLOCK_D=block_d,
        )
    if total is not out:
        out.copy_(total)


def row_norm_squared(pairs: SortedPairs, weights: Tensor, vectors: Tensor) -> Tensor:
    constants = _row_launch("row_norm", pairs, weights, vectors)
    vectors = _rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    squares = torch.empty(programs, dtype=torch.float64, device=vectors.device)
    with torch.cuda.device_of(vectors):
        rows.sum_squares[(programs,)](
            pairs.order,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            squares,
            vectors.stride(0),
            **constants,
        )
    return squares.sum().float()


def rowwise_adamw_(
    param: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    pairs: SortedPairs,
    weights: Tensor,
    vectors: Tensor,
    *,
    grad_scale: Tensor | float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction1: float,
    bias_correction2: float,
    seed: int,
) -> None:
    require_adamw_state(param, exp_avg, exp_avg_sq)
    constants = _row_launch("adamw", pairs, weights, vectors, param)
    vectors = _rows_last_contiguous(vectors)
    programs = constants.pop("programs")
    if not isinstance(grad_scale, Tensor):
        grad_scale = torch.full((), grad_scale, dtype=torch.float32, device=param.device)
    kernel = adamw.adamw_row if exp_avg_sq.ndim == 1 else adamw.adamw_element
    with torch.cuda.device_of(param):
        kernel[(programs,)](
            param,
            exp_avg,
            exp_avg_sq,
            pairs.order,
            pairs.row_ids,
            pairs.run_starts,
            pairs.num_rows,
            weights.contiguous(),
            vectors,
            grad_scale,
            vectors.stride(0),
            float(1 - lr * weight_decay),
            float(lr / bias_correction1),
            float(beta1),
            float(beta2),
            math.sqrt(bias_correction2),
            float(eps),
            seed,
            **constants,
        )


# ---- retrieval


def _by_matmul(variant: str, keys: Tensor, best: int) -> bool:
    """Whether an axis' scores are stored and searched by torch.topk. They must be if the list of the best would not fit into
    registers or a tile of keys into shared memory. By rule they are for short axes, where there is little to save. Scores
    are float32 either way."""
    n, axis_dim = keys.shape[1:]
    if best > 64 or axis_dim * keys.element_size() > 512 or keys.numel() >= 2**31:  # the kernel's offsets are int32
        return True
    if variant:
        return variant == "matmul"
    return n < 4 * best


def retrieve_forward(queries: Tensor, sub_keys: Sequence[Tensor], k: int) -> tuple[Tensor, Tensor]:
    T, H, _ = queries.shape
    queries = queries.contiguous()
    sizes = tuple(keys.shape[1] for keys in sub_keys)
    best = tuple(min(k, n) for n in sizes)
    best_values = torch.empty(T * H * sum(best), dtype=torch.float32, device=queries.device)
    best_indices = torch.empty(T * H * sum(best), dtype=torch.int32, device=queries.device)
    start, begin = 0, 0
    for keys, count in zip(sub_keys, best):
        part = queries[..., start : start + keys.shape[2]]
        shape, span = (T, H, count), slice(begin, begin + T * H * count)
        _axis_topk(part, keys, best_values[span].view(shape), best_indices[span].view(shape))
        start, begin = start + keys.shape[2], span.stop
    values = torch.empty(T, H, k, dtype=torch.float32, device=queries.device)
    indices = torch.empty(T, H, k, dtype=torch.int64, device=queries.device)
    if T == 0:
        return values, indices
    ranks, offsets = _combination_tables(sizes, k, queries.device)
    M = ranks.shape[1]
    block_m = _power_of_2(M)
    block_r = max(1, 2048 // block_m)
    with torch.cuda.device_of(queries):
        retrieval.best_combinations[(triton.cdiv(T * H, block_r),)](
            best_values,
            best_indices,
            ranks,
            offsets,
            values,
            indices,
            T * H,
            C=len(sizes),
            M=M,
            K=k,
            BLOCK_R=block_r,
            BLOCK_M=block_m,
        )
    return values, indices


@functools.lru_cache(maxsize=64)
def _combination_tables(sizes: tuple[int, ...], k: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Candidate ranks int32 [C, M], and int64 [C, 3]: per axis, a query's entries of the axes before it, its entries of this
    axis, and the number of sub-keys. Kept on the device, so that a step copies nothing to it."""
    best = [min(k, n) for n in sizes]
    ranks = torch.tensor(reference.candidate_ranks(tuple(best), k), dtype=torch.int32).t().contiguous()
    offsets = [[sum(best[:c]), best[c], n] for c, n in enumerate(sizes)]
    return ranks.to(device), torch.tensor(offsets, dtype=torch.int64).to(device)


def _axis_topk(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
    """The best of queries [T, H, Q_c] against keys [H or 1, n, Q_c] into values float32 and indices int32 [T, H, best]."""
    (T, H, axis_dim), n, best = queries.shape, keys.shape[1], values.shape[2]
    problem = tuning.problem("best_sub_keys", keys, best, 1, axis_dim)
    launch = tuning.launch_for(problem, queries.device)
    if _by_matmul(launch.variant, keys, best):
        _axis_topk_by_matmul(queries, keys, values, indices)
        return
    if T == 0:
        return
    keys = keys.contiguous()
    # tf32x3 adds the products of the low-order bits that tensor cores cut off from float32
    full_precision = torch.get_float32_matmul_precision() == "highest"
    with torch.cuda.device_of(queries):
        retrieval.best_sub_keys[(triton.cdiv(T, launch.block), H)](
            queries,
            keys,
            values,
            indices,
            T,
            queries.stride(1),
            n * axis_dim if keys.shape[0] > 1 else 0,
            H=H,
            N_KEYS=n,
            Q=axis_dim,
            BEST=best,
            LIST=_power_of_2(best),
            BLOCK_T=launch.block,
            BLOCK_N=64,
            BLOCK_Q=max(16, _power_of_2(axis_dim)),
            PRECISION="tf32x3" if full_precision else "tf32",
            WIDEN=tuning.INTERPRETED,
            num_warps=launch.num_warps,
        )


_SCORE_BYTES = 1 << 28  # the most bytes of scores that exist at the same time


def _axis_topk_by_matmul(queries: Tensor, keys: Tensor, values: Tensor, indices: Tensor) -> None:
    T, H, _ = queries.shape
    size = max(1, _SCORE_BYTES // (4 * H * keys.shape[1]))
    for t in range(0, T, size):
        span = slice(t, t + size)
        scores = torch.matmul(queries[span].transpose(0, 1).float(), keys.transpose(1, 2).float())  # [H, slice, n]
        top = scores.topk(values.shape[2], dim=-1, sorted=True)
        values[span] = top.values.transpose(0, 1)
        indices[span] = top.indices.transpose(0, 1)


def retrieve_backward(
    dvalues: Tensor, indices: Tensor, queries: Tensor, sub_keys: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    (T, H, k), Q = indices.shape, queries.shape[2]
    queries, dvalues, indices = queries.contiguous(), dvalues.contiguous(), indices.contiguous()
    dqueries, dkeys = torch.empty_like(queries), []
    flat_queries, flat_dqueries = queries.view(T * H, Q), dqueries.view(T * H, Q)
    below, start = math.prod(keys.shape[1] for keys in sub_keys), 0
    for keys in sub_keys:
        key_sets, n, axis_dim = keys.shape
        below //= n
        span = slice(start, start + axis_dim)
        key_rows = torch.empty(T * H, k, dtype=torch.int32, device=queries.device)
        block_q = _power_of_2(axis_dim)
        block_r = max(1, 1024 // block_q)
        if T:
            with torch.cuda.device_of(queries):
                retrieval.sum_sub_keys[(triton.cdiv(T * H, block_r),)](
                    dvalues,
                    indices,
                    keys.contiguous(),
                    flat_dqueries[:, span],
                    key_rows,
                    T * H,
                    flat_dqueries.stride(0),
                    below,
                    n if key_sets > 1 else 0,
                    H=H,
                    N_KEYS=n,
                    K=k,
                    Q=axis_dim,
                    BLOCK_R=block_r,
                    BLOCK_Q=block_q,
                )
        gradient = torch.zeros(key_sets * n, 1, axis_dim, dtype=torch.float32, device=queries.device)
        dense_gradients(key_rows, [(dvalues.view(T * H, k, 1), flat_queries[:, span], gradient)])
        dkeys.append(gradient.view_as(keys).to(keys.dtype))
        start += axis_dim
    return dqueries, dkeys
