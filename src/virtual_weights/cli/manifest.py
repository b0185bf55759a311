"""What an atlas and a report say about the model they are of."""

from __future__ import annotations

from typing import Any

from virtual_weights import __version__
from virtual_weights.stream import Component, Stream


def manifest_of(stream: Stream, name: str) -> dict[str, Any]:
    """Name, fingerprint, family, sizes, norm and every component with its positions, as plain JSON values."""
    spec = stream.spec
    return {
        "model": name,
        "reference": stream.source.reference,
        "fingerprint": stream.source.fingerprint,
        "family": stream.model.family,
        "norm": stream.norm_stamp,
        "version": __version__,
        "sizes": {
            "d_model": spec.d_model,
            "n_layers": spec.n_layers,
            "n_heads": spec.n_heads,
            "n_kv_heads": spec.n_kv_heads,
            "d_head": spec.d_head,
            "d_mlp": spec.d_mlp,
            "vocab": spec.vocab,
            "parallel": spec.parallel,
            "gated": spec.gated,
            "states": stream.states,
        },
        "components": [_component(component) for component in stream.components],
    }


def _component(component: Component) -> dict[str, Any]:
    return {
        "label": str(component.label),
        "kind": component.kind,
        "layer": component.label.layer,
        "reads": component.reads,
        "writes": component.writes,
        "channel": component.channel,
    }
