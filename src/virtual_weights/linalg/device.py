"""Whether an accelerator multiplies as the processor does."""

from __future__ import annotations

from functools import cache

import torch

from virtual_weights.errors import ResourceError
from virtual_weights.linalg.gram_blocks import ThinBlock, WideBlock, gram_products
from virtual_weights.linalg.numerics import random_generator
from virtual_weights.linalg.pairing import MapStack

_AGREES = 1e-6
"""Largest difference of products on two devices, over ``||G_r|| ||G_w||``."""


@cache
def check_device(device: str) -> None:
    """Compare products on an accelerator with those of the processor, on a small sample, once in a process.

    Raises:
        ResourceError: they differ: the accelerator multiplies in less than float32, or wrongly.
    """
    if torch.device(device).type == "cpu":
        return
    maps = torch.randn(6, 8, 600, generator=random_generator(0))
    products = list[torch.Tensor]()
    for where in ("cpu", device):
        thin = ThinBlock(MapStack.unplaced(maps), torch.float32, where)
        wide = WideBlock([[rows] for rows in maps], maps.shape[2], torch.float32, where)
        ((product,),) = gram_products([thin], [wide], [[True]])
        products.append(product)
    sizes = products[0].diagonal().sqrt()
    difference = float(((products[0] - products[1]).abs() / (sizes[:, None] * sizes)).max())
    if not difference < _AGREES:
        raise ResourceError(
            f"products on {device} differ from the processor's by {difference:.1e} of the factors' norms",
            expected=f"less than {_AGREES}: float32 products of unit maps",
            do="compute on the cpu",
        )
