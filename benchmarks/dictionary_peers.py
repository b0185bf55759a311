"""Write dictionaries with SAELens and sparsify, read them here, and compare what both compute.

Run in an environment of its own, outside the repository::

    python3.11 -m venv /tmp/peers && /tmp/peers/bin/pip install torch==2.13.0 'sae-lens==6.54.*' 'eai-sparsify==1.3.*'
    PYTHONPATH=src /tmp/peers/bin/python benchmarks/dictionary_peers.py

Printed are the largest differences of pre-activations, activations and outputs, relative to the largest value, float64.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from sae_lens.saes.gated_sae import GatedSAE, GatedSAEConfig
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.saes.transcoder import (
    JumpReLUSkipTranscoder,
    JumpReLUSkipTranscoderConfig,
    JumpReLUTranscoder,
    JumpReLUTranscoderConfig,
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
)
from sparsify import SparseCoder, SparseCoderConfig

from virtual_weights.checkpoint.dictionaries import open_dictionary

D, F, K, TOKENS = 32, 96, 8, 64
DTYPE = torch.float64


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(TOKENS, D, dtype=DTYPE)
    print(f"{'written by':<40}{'pre':>12}{'activations':>14}{'output':>12}")
    for label, cls, config, settings in (
        ("SAELens standard", StandardSAE, StandardSAEConfig, {}),
        ("SAELens standard, b_dec not subtracted", StandardSAE, StandardSAEConfig, {"apply_b_dec_to_input": False}),
        ("SAELens gated", GatedSAE, GatedSAEConfig, {}),
        ("SAELens jumprelu", JumpReLUSAE, JumpReLUSAEConfig, {}),
        ("SAELens topk", TopKSAE, TopKSAEConfig, {"k": K}),
        ("SAELens topk, rescaled", TopKSAE, TopKSAEConfig, {"k": K, "rescale_acts_by_decoder_norm": True}),
        ("SAELens transcoder", Transcoder, TranscoderConfig, {"d_out": D}),
        ("SAELens skip_transcoder", SkipTranscoder, SkipTranscoderConfig, {"d_out": D}),
        ("SAELens jumprelu_transcoder", JumpReLUTranscoder, JumpReLUTranscoderConfig, {"d_out": D}),
        ("SAELens jumprelu_skip_transcoder", JumpReLUSkipTranscoder, JumpReLUSkipTranscoderConfig, {"d_out": D}),
    ):
        if "d_out" in settings:
            settings = {**settings, "apply_b_dec_to_input": False}
        metadata = SAEMetadata(hook_name="blocks.3.hook_resid_post", hook_name_out="blocks.3.hook_mlp_out")
        sae = cls(config(d_in=D, d_sae=F, dtype="float64", metadata=metadata, **settings))
        randomise(sae)
        pre: dict[str, torch.Tensor] = {}
        sae.hook_sae_acts_pre.register_forward_hook(lambda _m, _i, out, pre=pre: pre.update(pre=out))
        acts = sae.encode(x)
        hidden = pre["pre"]
        if "rescaled" in label:  # the hook comes before the factor, the activations behind it
            hidden = hidden * sae.W_dec.norm(dim=-1)
        if "gated" in label:  # the hook shows the magnitude; the part's pre-activation is the gate's
            hidden = sae.process_sae_in(x) @ sae.W_enc + sae.b_gate
        with tempfile.TemporaryDirectory() as folder:
            sae.save_model(folder)
            report(label, Path(folder), x, (hidden, acts, sae(x)))
    for label, settings in (
        ("sparsify sae", {}),
        ("sparsify transcoder", {"transcode": True}),
        ("sparsify skip transcoder", {"transcode": True, "skip_connection": True}),
    ):
        coder = SparseCoder(D, SparseCoderConfig(num_latents=F, k=K, **settings), dtype=DTYPE)
        randomise(coder)
        top, indices, post = coder.encode(x)
        acts = torch.zeros(TOKENS, F, dtype=DTYPE).scatter(-1, indices, top)
        y = coder.decode(top, indices) + (x @ coder.W_skip.mT if coder.W_skip is not None else 0)
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "layers.3.mlp"
            coder.save_to_disk(folder)
            report(label, folder, x, (post, acts, y), rectified=True)


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(torch.randn_like(parameter) * (0.3 if name == "r_mag" else 1))
            if name == "threshold":
                parameter.abs_()


def report(
    label: str,
    folder: Path,
    x: torch.Tensor,
    theirs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    rectified: bool = False,
) -> None:
    part = open_dictionary(folder).parts[0]
    assert part.encoder is not None
    everything = slice(0, part.features)
    pre = x @ part.encoder(everything).double().T + (0 if part.bias is None else part.bias.double())
    ours = part.activation(pre)
    decoder = part.decoders[0]
    y = ours @ decoder.rows(everything).double() + (0 if decoder.bias is None else decoder.bias.double())
    y = y if part.skip is None else y + x @ part.skip.double().T
    pairs = zip((pre.relu() if rectified else pre, ours, y), theirs, strict=True)
    errors = [float((a - b.detach()).abs().max() / b.detach().abs().max()) for a, b in pairs]
    print(f"{label:<40}{errors[0]:>12.1e}{errors[1]:>14.1e}{errors[2]:>12.1e}", flush=True)


if __name__ == "__main__":
    main()
