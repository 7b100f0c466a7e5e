"""float8 matrix products by torchao: which linear layers use them, and how FSDP2 gathers their weights."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from titan_peer.common.errors import UserError
from titan_peer.config.job import Float8
from titan_peer.model import Transformer

HEAD = "output"  # the chunked loss reads its weight, and the last layer is the most sensitive to rounding


def apply_float8(model: Transformer, config: Float8, *, sharded: bool) -> list[str]:
    """Convert those linear layers of the blocks whose dims are multiples of 16 and whose names match no filter.

    Args:
        model: may be on the meta device.
        sharded: FSDP2 will shard the model; otherwise there is nothing to gather in float8.
    Returns:
        The names of the converted layers.
    Raises:
        UserError: torchao is not installed, the device has no float8, or there is no layer to convert.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError:
        raise UserError(
            "float8.enable = true: needs torchao; install it with: pip install 'titan_peer[float8]'"
        ) from None
    if torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 9) and not config.emulate:
        raise UserError(
            f"float8.enable = true: {torch.cuda.get_device_name()} has no float8 matmul (compute capability 8.9 is "
            "needed); --float8.emulate true rounds as float8 does and computes in higher precision"
        )
    recipe = dataclasses.replace(
        Float8LinearConfig.from_recipe_name(config.recipe_name),
        emulate=config.emulate,
        enable_fsdp_float8_all_gather=config.enable_fsdp_float8_all_gather and sharded,
    )
    converted: list[str] = []

    def fits(module: nn.Module, name: str) -> bool:
        ok = isinstance(module, nn.Linear) and name != HEAD and all(size % 16 == 0 for size in module.weight.shape)
        ok = ok and not any(part in name for part in config.filter_fqns)
        if ok:
            converted.append(name)
        return ok

    convert_to_float8_training(model, config=recipe, module_filter_fn=fits)
    if not converted:
        raise UserError(
            "float8.enable = true: no linear layer of the blocks has both dims a multiple of 16 and a name without "
            f"float8.filter_fqns = {config.filter_fqns}"
        )
    return converted


def master_weight(weight: Tensor) -> Tensor:
    """The weight itself, without the wrapper that torchao puts around it for gathering in float8. It shares the memory;
    checkpoints hold it, so that any job can read them. Other tensors are returned unchanged."""
    if not isinstance(weight, DTensor) or "torchao.float8.fsdp_utils" not in sys.modules:
        return weight
    from torchao.float8.fsdp_utils import WeightWithDynamicFloat8CastTensor

    part = weight.to_local()
    if not isinstance(part, WeightWithDynamicFloat8CastTensor):
        return weight
    mesh, placements = weight.device_mesh, weight.placements
    return DTensor.from_local(
        part._tensor, mesh, placements, run_check=False, shape=weight.shape, stride=weight.stride()
    )


def refresh_scales(model: nn.Module) -> None:
    """Compute the scales that `precompute_scales_after_step` keeps anew, if it does, after something other than a step
    has written the weights. Called by every process."""
    parts = (p.to_local() for p in model.parameters() if isinstance(p, DTensor))
    if any(getattr(part, "_precomputed_scale", None) is not None for part in parts):
        from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

        precompute_float8_dynamic_scale_for_fsdp(model)


def precompute_scales_after_step(
    model: Transformer, optimizers: Sequence[torch.optim.Optimizer], config: Float8
) -> None:
    """After each step of the last of the optimizers, compute the scales of all weights that FSDP2 gathers in float8 at once: one all-reduce for the
    model instead of one per layer."""
    if not (config.enable and config.precompute_float8_dynamic_scale_for_fsdp):
        return
    from torchao.float8 import precompute_float8_dynamic_scale_for_fsdp

    optimizers[-1].register_step_post_hook(lambda *_: precompute_float8_dynamic_scale_for_fsdp(model))
