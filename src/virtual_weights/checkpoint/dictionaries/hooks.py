"""Names of hooks and modules as dictionaries write them down, completed to full names."""

from __future__ import annotations

import re

_LAYER = re.compile(r"(?:^|[./])(?:blocks|layers|h)\.(\d+)(?=[./]|$)")
_OF_THE_MODEL = ("hook_embed", "hook_pos_embed", "ln_final.hook_normalized", "ln_final.hook_scale")


def full_hook(hook: str, layer: int | None) -> str:
    """The full name of a hook of TransformerLens: names without a block are of this layer's.

    Example:
        >>> full_hook("hook_resid_mid", 8), full_hook("blocks.3.hook_mlp_out", 8), full_hook("hook_embed", 0)
        ('blocks.8.hook_resid_mid', 'blocks.3.hook_mlp_out', 'hook_embed')
    """
    if layer is None or hook in _OF_THE_MODEL or layer_of(hook) is not None:
        return hook
    return f"blocks.{layer}.{hook}"


def layer_of(place: str | None) -> int | None:
    """The layer that the name of a hook or a module says; None where it says none.

    Example:
        >>> layer_of("blocks.12.hook_resid_pre"), layer_of("model.layers.5.mlp"), layer_of("hook_embed")
        (12, 5, None)
    """
    match = _LAYER.search(place) if place else None
    return int(match[1]) if match else None


def at_layer(place: str, layer: int) -> str:
    """The same place in another layer.

    Example:
        >>> at_layer("model.layers.0.mlp.output", 7)
        'model.layers.7.mlp.output'
    """
    match = _LAYER.search(place)
    return f"{place[: match.start(1)]}{layer}{place[match.end(1) :]}" if match else place
