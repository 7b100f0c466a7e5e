"""Compiles every Triton kernel for an H100 (sm_90), which needs no GPU, and prints properties of the compiled code as
JSON.

This is a separate script because kernels that were imported for the interpreter cannot be compiled.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from titan_peer.ops.triton import adamw, experts, normalized, pairs, retrieval, rows, tuning

D, K, N_KEYS, AXIS_DIM = 1024, 128, 1024, 128
SCALARS = ("decay", "step_size", "beta", "beta1", "beta2", "root_correction", "eps", "floor", "damping")
SCALARS += ("log2_beta1", "log2_beta2", "log2_decay")
TYPES = {"indices_ptr": "*i32", "offsets_ptr": "*i64", "split_stride": "i64", **dict.fromkeys(SCALARS, "fp32")}
TYPES |= dict.fromkeys(("order_ptr", "row_id_ptr", "run_start_ptr", "num_rows_ptr", "run_ptr", "ranks_ptr"), "*i32")
TYPES |= dict.fromkeys(("weight_ptr", "gate_ptr", "z_ptr", "dz_ptr", "hidden_ptr", "dgate_ptr", "values_ptr"), "*fp32")
TYPES |= dict.fromkeys(("grad_scale_ptr", "value_ptr", "out_ptr", "factor_ptr"), "*fp32")
TYPES |= dict.fromkeys(("index_ptr", "expert_ptr", "key_row_ptr", "last_use_ptr"), "*i32")
TYPES |= dict.fromkeys(("vector_ptr", "dotted_ptr", "summed_ptr", "query_ptr", "key_ptr"), "*bf16")


def compiled(kernel: Any, num_warps: int, constants: dict[str, Any], **types: str) -> dict[str, Any]:
    """Registers, spilled bytes, and the widths in bits of global loads and stores."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, TYPES.get(n, "i32")) for n in names}
    places = {(names.index(name),): value for name, value in constants.items()}
    # as for a launch: torch's memory is aligned, strides are multiples of 16
    aligned = [n for n in names if signature[n].startswith("*") or n.endswith("stride")]
    attributes = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned}
    source = ASTSource(kernel, signature, places, attributes)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True, encoding="utf-8"
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    lines = re.findall(r"(ld|st|red|atom)\.global[\w.:]*?(?:\.v(\d))?\.[bf](\d+)", binary.asm["ptx"])
    widths = {
        kind: sorted({int(count or 1) * int(bits) for k, count, bits in lines if k == kind}) for kind, _, _ in lines
    }
    return {"registers": int(found[1]), "spilled": int(found[2]), "shared": binary.metadata.shared, "widths": widths}


def main() -> None:
    bf16, f32 = torch.bfloat16, torch.float32

    def rule(kernel: str, width: int, dtype: torch.dtype = bf16) -> tuning.Launch:
        return tuning.by_rule(tuning.Problem(kernel, width, K, 1, dtype, False))

    results = {}
    for backward, kernel in ((False, "experts_forward"), (True, "experts_backward")):
        launch = rule(kernel, D)
        shapes = {"K": K, "E": 1, "D": D, "O": D, "BLOCK": launch.block, "BLOCK_D": D, "BLOCK_O": D, "CHUNK": K}
        constants = {**shapes, "ACTIVATION": "gelu", "BACKWARD": backward, "STAGES": launch.num_stages}
        results[kernel] = compiled(
            experts.gather_dot_sum, launch.num_warps, constants, index_ptr="*i64", out_ptr="*bf16"
        )
    launch = rule("adamw", D, f32)
    by_row = {"K": K, "E": 1, "D": D, "BLOCK_P": launch.block, "BLOCK_D": D}
    split = {"COMPACT": False, "ADD": True, "SPLITS": 1}
    results["write_gradient"] = compiled(rows.write_gradient, launch.num_warps, {**by_row, **split})
    results["add_gradient"] = compiled(rows.add_gradient, 4, by_row)
    results["sum_squares"] = compiled(rows.sum_squares, launch.num_warps, by_row, out_ptr="*fp64")
    for kind, kernel in (("element", adamw.adamw_element), ("row", adamw.adamw_row)):
        for dtype in ("fp32", "bf16"):
            second = "*fp32" if kind == "row" else f"*{dtype}"
            state = {"param_ptr": f"*{dtype}", "exp_avg_ptr": f"*{dtype}", "exp_avg_sq_ptr": second}
            constants = {**by_row, "CATCH_UP": True}
            results[f"adamw_{kind} {dtype}"] = compiled(kernel, launch.num_warps, constants, **state)
    for E in (1, 4):
        tile = {"BLOCK_E": 1 if E == 1 else 16, "BLOCK_D": D if E == 1 else 128, "ITERATIONS": 20}
        constants = {"K": K, "E": E, "D": D, **tile, "MOMENTUM": True, "CATCH_UP": True}
        state = {"param_ptr": "*fp32", "momentum_ptr": "*bf16"}
        results[f"normalized E={E}"] = compiled(normalized.normalized, launch.num_warps, constants, **state)
    results["mark_used"] = compiled(adamw.mark_used, 4, {"BLOCK": 1024})
    results["mark_runs"] = compiled(pairs.mark_runs, 4, {"BLOCK": 1024})
    launch = rule("best_sub_keys", AXIS_DIM)
    keys = {"H": 8, "N_KEYS": N_KEYS, "Q": AXIS_DIM, "BLOCK_Q": AXIS_DIM}
    tile = {"BEST": 16, "LIST": 16, "BLOCK_T": launch.block, "BLOCK_N": 64, "PRECISION": "tf32", "WIDEN": False}
    results["best_sub_keys"] = compiled(retrieval.best_sub_keys, launch.num_warps, {**keys, **tile}, index_ptr="*i32")
    best = {"C": 2, "M": 50, "K": 16, "BLOCK_R": 32, "BLOCK_M": 64}
    results["best_combinations"] = compiled(retrieval.best_combinations, 4, best, index_ptr="*i64")
    sums = {**keys, "K": 16, "BLOCK_R": 8}
    results["sum_sub_keys"] = compiled(retrieval.sum_sub_keys, 4, sums, index_ptr="*i64", out_ptr="*bf16")
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
