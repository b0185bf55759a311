"""Small random dictionaries in every file format, each with its function in plain torch, by the format's definition."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFWriter
from safetensors.torch import save_file
from torch import Tensor

Function = Callable[[Tensor], tuple[Tensor, Tensor, list[Tensor]]]
"""From inputs (n, d) to pre-activations, activations, and what is written at each place; the skip is in the first."""


@dataclass
class Part:
    layer: int | None
    reads: str | None
    writes: list[str]
    function: Function
    tag: str = ""


@dataclass
class Written:
    path: Path
    kind: str
    parts: list[Part] = field(default_factory=list)


class Draw:
    """Random tensors in float32, by whose values in float64 everything is judged."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def positive(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator) * 0.5 + 0.2


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def save(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the tensors; the same in float64 come back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return {name: tensor.double() for name, tensor in tensors.items()}


def jump(pre: Tensor, threshold: Tensor | float) -> Tensor:
    return pre * (pre > threshold)


def largest(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row as they are, zeros elsewhere."""
    strongest = pre.argsort(-1, descending=True)[..., :k]
    mask = torch.zeros_like(pre).scatter(-1, strongest, 1.0)
    return pre * mask


# circuit-tracer ------------------------------------------------------------------------------------------------------


def circuit_tracer_set(
    folder: Path, d: int, features: int, layers: int, seed: int, *, activation: str | None = None
) -> Written:
    """Per-layer transcoders; JumpReLU and a skip without an activation in the settings."""
    draw, k = Draw(seed), 3
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "# settings of a set",
        "model_name: 'org/model'",
        "model_kind: transcoder_set",
        "feature_input_hook: hook_resid_mid  # before the norm",
        'feature_output_hook: "hook_mlp_out"',
        "transcoders:",
        *(f"  - hf://org/repo/layer_{i}.safetensors?revision=main" for i in range(layers)),
    ]
    lines += [f"activation: {activation}"] if activation else []
    lines += [f"k: {k}"] if activation == "topk" else []
    (folder / "config.yaml").write_text("\n".join(lines) + "\n")
    written = Written(folder, "tc")
    for i in range(layers):
        tensors = {"W_enc": draw(features, d), "W_dec": draw(features, d), "b_enc": draw(features), "b_dec": draw(d)}
        if activation is None:
            tensors |= {"activation_function.threshold": draw.positive(features), "W_skip": draw(d, d)}
        t = save(folder / f"layer_{i}.safetensors", tensors)

        def function(x: Tensor, t: dict[str, Tensor] = t) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = x @ t["W_enc"].T + t["b_enc"]
            if activation is None:
                a = jump(pre, t["activation_function.threshold"])
            else:
                a = pre.clamp(min=0) if activation == "relu" else largest(pre, k)
            y = a @ t["W_dec"] + t["b_dec"]
            return pre, a, [y + x @ t["W_skip"].T if activation is None else y]

        written.parts.append(Part(i, f"blocks.{i}.hook_resid_mid", [f"blocks.{i}.hook_mlp_out"], function))
    return written


def circuit_tracer_clt(folder: Path, d: int, features: int, layers: int, seed: int, *, jumps: bool = True) -> Written:
    """A cross-layer transcoder, with thresholds and skips or with neither."""
    draw = Draw(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(
        "model_name: m\nmodel_kind: cross_layer_transcoder\nfeature_input_hook: mlp.hook_in\n"
        "feature_output_hook: mlp.hook_out\nscan: [a, b]\n"
    )
    written = Written(folder, "clt")
    for i in range(layers):
        tensors = {f"W_enc_{i}": draw(features, d), f"b_enc_{i}": draw(features), f"b_dec_{i}": draw(d)}
        if jumps:
            tensors |= {f"threshold_{i}": draw.positive(features), f"W_skip_{i}": draw(d, d)}
        t = save(folder / f"W_enc_{i}.safetensors", tensors)
        w = save(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": draw(features, layers - i, d)})[f"W_dec_{i}"]

        def function(
            x: Tensor, i: int = i, t: dict[str, Tensor] = t, w: Tensor = w
        ) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = x @ t[f"W_enc_{i}"].T + t[f"b_enc_{i}"]
            a = jump(pre, t[f"threshold_{i}"]) if jumps else pre.clamp(min=0)
            outs = list(torch.einsum("nf,fld->lnd", a, w))
            outs[0] = outs[0] + t[f"b_dec_{i}"] + (x @ t[f"W_skip_{i}"] if jumps else 0)
            return pre, a, outs

        writes = [f"blocks.{j}.mlp.hook_out" for j in range(i, layers)]
        written.parts.append(Part(i, f"blocks.{i}.mlp.hook_in", writes, function))
    return written


def bytedance_clt(folder: Path, d: int, features: int, layers: int, seed: int) -> Written:
    """A cross-layer top-k transcoder; the function is that before the joint selection."""
    draw = Draw(seed)
    written = Written(folder, "clt")
    for i in range(layers):
        enc, dec = draw(features, d), draw(features, layers - i, d)
        norm = dec.square().sum((1, 2)).sqrt()
        save(folder / f"W_enc_{i}.safetensors", {f"W_enc_{i}": enc})
        save(folder / f"W_dec_{i}.safetensors", {f"W_dec_{i}": dec})
        save(folder / f"W_dec_norm_{i}.safetensors", {f"W_dec_norm_{i}": norm})

        def function(x: Tensor, enc: Tensor = enc, dec: Tensor = dec) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = x @ enc.double().T
            a = pre.clamp(min=0)
            return pre, a, list(torch.einsum("nf,fld->lnd", a, dec.double()))

        writes = [f"blocks.{j}.hook_mlp_out" for j in range(i, layers)]
        written.parts.append(Part(i, f"blocks.{i}.hook_resid_mid", writes, function))
    write_json(folder / "config.json", {"d_feature": features, "k": 2})
    return written


# SAELens -------------------------------------------------------------------------------------------------------------


def saelens(folder: Path, d: int, features: int, layers: int, seed: int, *, architecture: str = "standard") -> Written:
    """One dictionary; ``old``: flat top-k settings of before version 6; ``scaled``: a scaler of the input beside it."""
    k, layer, coding = 3, layers - 1, "transcoder" in architecture
    reads = writes = f"blocks.{layer}.hook_resid_post"
    metadata = {"hook_name": reads, "model_name": "m"}
    if coding:
        reads, writes = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
        metadata = {"hook_name": reads, "hook_name_out": "hook_mlp_out"}
    cfg: dict[str, Any] = {"architecture": architecture, "d_in": d, "d_sae": features, "normalize_activations": "none"}
    cfg |= {"apply_b_dec_to_input": not coding, "dtype": "float32", "metadata": metadata}
    if architecture == "jumprelu_transcoder":
        del cfg["apply_b_dec_to_input"]  # true where a file does not say, and of no transcoder all the same
    if architecture == "topk":
        cfg |= {"k": k, "rescale_acts_by_decoder_norm": True}
    if architecture == "old":
        kwargs = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": k}, "normalize_activations": False}
        cfg = {"hook_point": reads, "d_in": d, "d_sae": features, **kwargs}
    if architecture == "scaled":
        cfg |= {"architecture": "standard", "normalize_activations": "expected_average_only_in"}
    t = save(folder / "sae_weights.safetensors", _saelens_tensors(Draw(seed), d, features, architecture))
    write_json(folder / "cfg.json", cfg)
    if architecture == "scaled":
        write_json(folder / "activation_scaler.json", {"scaling_factor": 0.37, "has_whitening": False})
    return Written(
        folder, "tc" if coding else "sae", [Part(layer, reads, [writes], _saelens_function(t, architecture, k))]
    )


def _saelens_tensors(draw: Draw, d: int, features: int, architecture: str) -> dict[str, Tensor]:
    t = {"W_enc": draw(d, features), "W_dec": draw(features, d), "b_enc": draw(features), "b_dec": draw(d)}
    if "jumprelu" in architecture:
        t["threshold"] = draw(features)  # where it is below 0, the activation still is not
    if "skip" in architecture:
        t["W_skip"] = draw(d, d)
    if architecture == "gated":
        del t["b_enc"]
        t |= {"b_gate": draw(features), "b_mag": draw(features), "r_mag": draw(features) * 0.3}
    return {"W_dec": t["W_dec"], "b_dec": t["b_dec"]} if architecture == "matching_pursuit" else t


def _saelens_function(t: dict[str, Tensor], architecture: str, k: int) -> Function:
    factor = 0.37 if architecture == "scaled" else 1.0

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        inner = factor * x - (0 if "transcoder" in architecture else t["b_dec"])
        if architecture == "matching_pursuit":
            return inner @ t["W_dec"].T, inner @ t["W_dec"].T
        if architecture == "gated":
            pre = inner @ t["W_enc"] + t["b_gate"]
            magnitude = inner @ (t["W_enc"] * t["r_mag"].exp()) + t["b_mag"]
            return pre, (pre > 0) * magnitude.clamp(min=0)
        pre = inner @ t["W_enc"] + t["b_enc"]
        if architecture == "topk":
            pre = pre * t["W_dec"].norm(dim=1)
        a = largest(pre, k).clamp(min=0) if architecture in ("topk", "old") else pre.clamp(min=0)
        return pre, a * (pre > t["threshold"]) if "jumprelu" in architecture else a

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre, a = encode(x)
        decoded = (a / t["W_dec"].norm(dim=1) if architecture == "topk" else a) @ t["W_dec"]
        y = (decoded + t["b_dec"]) / factor
        return pre, a, [y + x @ t["W_skip"].T if "skip" in architecture else y]

    return function


# Gemma Scope ---------------------------------------------------------------------------------------------------------


def gemma_scope_1(
    folder: Path, d: int, features: int, layers: int, seed: int, *, release: str = "res", packed: bool = False
) -> Written:
    draw, layer = Draw(seed), layers - 1
    middle = "embedding" if release == "embedding" else f"layer_{layer}"
    path = folder / f"gemma-scope-2b-pt-{'res' if release == 'embedding' else release}" / middle / "width_1k" / "l0_5"
    path.mkdir(parents=True)
    t = {"W_enc": draw(d, features), "W_dec": draw(features, d), "b_enc": draw(features), "b_dec": draw(d)}
    t["threshold"] = draw.positive(features)
    (np.savez_compressed if packed else np.savez)(path / "params.npz", **{n: v.numpy() for n, v in t.items()})
    t = {name: tensor.double() for name, tensor in t.items()}
    root = math.sqrt(d) if release == "embedding" else 1.0

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre = (x / root) @ t["W_enc"] + t["b_enc"]
        a = (pre > t["threshold"]) * pre.clamp(min=0)
        return pre, a, [(a @ t["W_dec"] + t["b_dec"]) * root]

    block = f"blocks.{layer}."
    places = {
        "res": (f"{block}hook_resid_post",) * 2,
        "att": (f"{block}attn.hook_z",) * 2,
        "mlp": (f"{block}hook_mlp_out",) * 2,
        "embedding": ("hook_embed",) * 2,
        "transcoders": (f"{block}ln2.hook_normalized", f"{block}hook_mlp_out"),
    }
    reads, writes = places[release]
    number = None if release == "embedding" else layer
    return Written(path, "tc" if release == "transcoders" else "sae", [Part(number, reads, [writes], function)])


def gemma_scope_2(folder: Path, d: int, features: int, layers: int, seed: int, *, site: str = "transcoder") -> Written:
    """One folder in a site's folder, ``transcoder_all`` with an affine skip or ``resid_post``."""
    draw, layer = Draw(seed), layers - 1
    path = folder / f"{site}_all" / f"layer_{layer}_width_16k_l0_small"
    affine = site == "transcoder"
    t = {"w_enc": draw(d, features), "w_dec": draw(features, d), "b_enc": draw(features), "b_dec": draw(d)}
    t |= {"threshold": draw.positive(features)} | ({"affine_skip_connection": draw(d, d)} if affine else {})
    t = save(path / "params.safetensors", t)
    module = f"model.layers.{layer}"
    reads = f"{module}.pre_feedforward_layernorm.output" if affine else f"{module}.output"
    writes = f"{module}.post_feedforward_layernorm.output" if affine else reads
    config = {"hf_hook_point_in": reads, "hf_hook_point_out": writes, "architecture": "jump_relu", "width": features}
    write_json(path / "config.json", {**config, "model_name": "gemma", "affine_connection": affine, "l0": 5})

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre = x @ t["w_enc"] + t["b_enc"]
        a = (pre > t["threshold"]) * pre.clamp(min=0)
        y = a @ t["w_dec"] + t["b_dec"]
        return pre, a, [y + x @ t["affine_skip_connection"] if affine else y]

    return Written(path, "tc" if affine else "sae", [Part(layer, reads, [writes], function)])


def gemma_scope_2_clt(folder: Path, d: int, features: int, layers: int, seed: int) -> Written:
    draw = Draw(seed)
    written = Written(folder, "clt")
    for i in range(layers):
        t = {"w_enc": draw(d, features), "w_dec": draw(features, layers, d), "b_enc": draw(features), "b_dec": draw(d)}
        t |= {"threshold": draw.positive(features), "affine_skip_connection": draw(d, d)}
        t = save(folder / f"params_layer_{i}.safetensors", t)

        def function(x: Tensor, i: int = i, t: dict[str, Tensor] = t) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = x @ t["w_enc"] + t["b_enc"]
            a = (pre > t["threshold"]) * pre.clamp(min=0)
            outs = [a @ t["w_dec"][:, j] for j in range(i, layers)]
            outs[0] = outs[0] + t["b_dec"] + x @ t["affine_skip_connection"]
            return pre, a, outs

        reads = f"model.layers.{i}.pre_feedforward_layernorm.output"
        writes = [f"model.layers.{j}.post_feedforward_layernorm.output" for j in range(i, layers)]
        written.parts.append(Part(i, reads, writes, function))
    return written


# sparsify ------------------------------------------------------------------------------------------------------------


def sparsify(folder: Path, d: int, features: int, layers: int, seed: int, *, transcode: bool = False) -> Written:
    """A folder for each hookpoint, in a parent."""
    draw, k = Draw(seed), 3
    written = Written(folder, "tc" if transcode else "sae")
    for layer in range(layers):
        module = f"layers.{layer}.mlp" if transcode else f"layers.{layer}"
        t = {"encoder.weight": draw(features, d), "encoder.bias": draw(features), "W_dec": draw(features, d)}
        t |= {"b_dec": draw(d)} | ({"W_skip": draw(d, d)} if transcode else {})
        t = save(folder / module / "sae.safetensors", t)
        cfg = {"activation": "topk", "num_latents": features, "k": k, "transcode": transcode, "d_in": d}
        cfg |= {"skip_connection": transcode, "expansion_factor": 32, "normalize_decoder": True, "multi_topk": False}
        write_json(folder / module / "cfg.json", cfg)

        def function(x: Tensor, t: dict[str, Tensor] = t) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = (x if transcode else x - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"]
            a = largest(pre.clamp(min=0), k)
            y = a @ t["W_dec"] + t["b_dec"]
            return pre, a, [y + x @ t["W_skip"].T if transcode else y]

        reads = f"{module}.{'input' if transcode else 'output'}"
        written.parts.append(Part(layer, reads, [f"{module}.output"], function))
    return written


# dictionary_learning -------------------------------------------------------------------------------------------------


def dictionary_learning(
    folder: Path, d: int, features: int, layers: int, seed: int, *, name: str = "AutoEncoder"
) -> Written:
    draw, k, layer = Draw(seed), 3, layers - 1
    linear = {"encoder.weight": draw(features, d), "decoder.weight": draw(d, features)}
    biased = {**linear, "encoder.bias": draw(features)}
    plain = {"W_enc": draw(d, features), "b_enc": draw(features), "W_dec": draw(features, d), "b_dec": draw(d)}
    scalar = torch.tensor(0.4)
    t = {
        "AutoEncoder": {**biased, "bias": draw(d)},
        "AutoEncoderNew": {**biased, "decoder.bias": draw(d)},
        "GatedAutoEncoder": {
            **linear,
            "decoder_bias": draw(d),
            "gate_bias": draw(features),
            "mag_bias": draw(features),
            "r_mag": draw(features) * 0.3,
        },
        "AutoEncoderTopK": {**biased, "b_dec": draw(d), "k": torch.tensor(k), "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": {**biased, "b_dec": draw(d), "k": torch.tensor(k), "threshold": scalar},
        "MatryoshkaBatchTopKSAE": {**plain, "k": torch.tensor(k), "threshold": scalar},
        "JumpReluAutoEncoder": {**plain, "threshold": draw.positive(features)},
    }[name]
    t = save(folder / "ae.safetensors", t)
    trainer = {"dict_class": name, "layer": layer, "submodule_name": f"resid_post_layer_{layer}", "lm_name": "m"}
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        offset = next(t[bias] for bias in ("bias", "decoder.bias", "decoder_bias", "b_dec") if bias in t)
        inner = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - offset
        encoder = t["W_enc"] if "W_enc" in t else t["encoder.weight"].T
        decoder = t["W_dec"] if "W_dec" in t else t["decoder.weight"].T
        if name == "GatedAutoEncoder":
            pre = inner @ encoder + t["gate_bias"]
            a = (pre > 0) * (t["r_mag"].exp() * (inner @ encoder) + t["mag_bias"]).clamp(min=0)
        else:
            pre = inner @ encoder + t.get("encoder.bias", t.get("b_enc", 0))
            a = pre.clamp(min=0)
            if name == "AutoEncoderTopK":
                a = largest(a, k)
            elif "threshold" in t:
                a = a * (pre > t["threshold"])
        return pre, a, [a @ decoder + offset]

    place = f"blocks.{layer}.hook_resid_post"
    return Written(folder, "sae", [Part(layer, place, [place], function)])


# llamascopium and Llama Scope ----------------------------------------------------------------------------------------


def llamascopium(
    folder: Path, d: int, features: int, layers: int, seed: int, *, act: str = "jumprelu", out: str = "hook_resid_post"
) -> Written:
    """An autoencoder or transcoder whose states are scaled by their mean norms over a dataset."""
    draw, k, layer = Draw(seed), 3, layers - 1
    place, place_out = f"blocks.{layer}.hook_resid_post", f"blocks.{layer}.{out}"
    t = {"W_E": draw(d, features), "b_E": draw(features), "W_D": draw(features, d) * 0.5, "b_D": draw(d)}
    t |= {f"dataset_average_activation_norm.{place}": torch.tensor(7.0)}
    t |= {f"dataset_average_activation_norm.{place_out}": torch.tensor(3.0 if place != place_out else 7.0)}
    if act == "jumprelu":
        t["activation_function.log_jumprelu_threshold"] = draw.positive(features).log()
    t = save(folder / "sae_weights.safetensors", t)
    config = {"sae_type": "sae", "d_model": d, "expansion_factor": features / d, "act_fn": act, "top_k": k}
    config |= {"hook_point_in": place, "hook_point_out": place_out, "norm_activation": "dataset-wise"}
    write_json(folder / "config.json", {**config, "sparsity_include_decoder_norm": True, "use_glu_encoder": False})

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre = (x * math.sqrt(d) / 7.0) @ t["W_E"] + t["b_E"]
        norms = t["W_D"].norm(dim=1)
        weighted = pre * norms
        if act == "jumprelu":
            gated = jump(weighted, t["activation_function.log_jumprelu_threshold"].exp())
        else:
            gated = largest(weighted.clamp(min=0), k) if act == "topk" else weighted.clamp(min=0)
        a = gated / norms
        scale = math.sqrt(d) / (3.0 if place != place_out else 7.0)
        return pre, a, [(a @ t["W_D"] + t["b_D"]) / scale]

    return Written(folder, "sae" if place == place_out else "tc", [Part(layer, place, [place_out], function)])


def llamascopium_clt(folder: Path, d: int, features: int, layers: int, seed: int, *, act: str = "jumprelu") -> Written:
    draw, k = Draw(seed), 3
    reads = [f"blocks.{i}.hook_resid_mid" for i in range(layers)]
    writes = [f"blocks.{i}.hook_mlp_out" for i in range(layers)]
    t = {"W_E": draw(layers, d, features), "b_E": draw(layers, features)}
    t |= {f"W_D.{j}": draw(j + 1, features, d) for j in range(layers)} | {f"b_D.{j}": draw(d) for j in range(layers)}
    norms = {hook: 3.0 + i for i, hook in enumerate(reads + writes)}
    t |= {f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}
    t["activation_function.log_jumprelu_threshold"] = draw.positive(layers, features).log()
    t = save(folder / "sae_weights.safetensors", t)
    config = {"sae_type": "clt", "d_model": d, "act_fn": act, "top_k": k, "sparsity_include_decoder_norm": True}
    write_json(folder / "config.json", {**config, "hook_points_in": reads, "hook_points_out": writes})
    written = Written(folder, "clt")
    for i in range(layers):

        def function(x: Tensor, i: int = i) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = (x * math.sqrt(d) / norms[reads[i]]) @ t["W_E"][i] + t["b_E"][i]
            weight = torch.stack([t[f"W_D.{j}"][i].square().sum(1) for j in range(i, layers)]).sum(0).sqrt()
            threshold = t["activation_function.log_jumprelu_threshold"][i].exp()
            weighted = pre * weight
            gated = jump(weighted, threshold) if act == "jumprelu" else largest(weighted.clamp(min=0), k)
            a = gated / weight
            outs = [a @ t[f"W_D.{j}"][i] for j in range(i, layers)]
            outs[0] = outs[0] + t[f"b_D.{i}"]
            return pre, a, [y / (math.sqrt(d) / norms[writes[j]]) for j, y in enumerate(outs, i)]

        written.parts.append(Part(i, reads[i], writes[i:], function))
    return written


def lorsa(folder: Path, d: int, features: int, layers: int, seed: int) -> Written:
    """Heads of rank one; the function of the first part is that of a token that attends to itself alone."""
    draw, heads, channels, layer = Draw(seed), 2, 3, layers - 1
    reads, writes = f"blocks.{layer}.ln1.hook_normalized", f"blocks.{layer}.hook_attn_out"
    t = {"W_V": draw(features, d), "W_O": draw(features, d), "b_V": draw(features), "b_D": draw(d)}
    t |= {"W_Q": draw(heads, d, channels), "W_K": draw(heads, d, channels)}
    t |= {"b_Q": draw(heads, channels), "b_K": draw(heads, channels), "mask": torch.ones(4, 4)}
    t = save(folder / "sae_weights.safetensors", t)
    config = {"sae_type": "lorsa", "d_model": d, "act_fn": "relu", "hook_point_in": reads, "hook_point_out": writes}
    write_json(folder / "config.json", {**config, "norm_activation": "inference", "d_qk_head": channels})

    def values(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre = x @ t["W_V"].T + t["b_V"]
        a = pre.clamp(min=0)
        return pre, a, [a @ t["W_O"] + t["b_D"]]

    def side(name: str) -> Function:
        def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = (torch.einsum("nd,hdk->nhk", x, t[f"W_{name}"]) + t[f"b_{name}"]).flatten(1)
            return pre, pre, []

        return function

    parts = [Part(layer, reads, [writes], values)]
    return Written(folder, "lorsa", [*parts, *(Part(layer, reads, [], side(n), n.lower()) for n in "QK")])


def llama_scope(folder: Path, d: int, features: int, layers: int, seed: int) -> Written:
    draw, layer = Draw(seed), layers - 1
    t = {"encoder.weight": draw(features, d), "encoder.bias": draw(features)}
    t |= {"decoder.weight": draw(d, features), "decoder.bias": draw(d)}
    t = save(folder / "checkpoints" / "final.safetensors", t)
    reads, writes = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    config = {"d_model": d, "d_sae": features, "hook_point_in": reads, "hook_point_out": writes, "act_fn": "jumprelu"}
    config |= {"jump_relu_threshold": 0.5, "dataset_average_activation_norm": {"in": 7.0, "out": 3.0}}
    write_json(folder / "hyperparams.json", {**config, "sparsity_include_decoder_norm": True})

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        pre = (x * math.sqrt(d) / 7.0) @ t["encoder.weight"].T + t["encoder.bias"]
        a = pre * (pre * t["decoder.weight"].norm(dim=0) > 0.5)
        return pre, a, [(a @ t["decoder.weight"].T + t["decoder.bias"]) * 3.0 / math.sqrt(d)]

    return Written(folder, "tc", [Part(layer, reads, [writes], function)])


# CLT-Forge -----------------------------------------------------------------------------------------------------------


def clt_forge(
    folder: Path, d: int, features: int, layers: int, seed: int, *, ranks: int = 0, crossing: bool = True
) -> Written:
    draw = Draw(seed)
    pairs = [(i, j) for i in range(layers) for j in range(i, layers)] if crossing else [(i, i) for i in range(layers)]
    t = {"W_enc": draw(layers, d, features), "b_enc": draw(layers, features)}
    t |= {"W_dec": draw(len(pairs), features, d), "b_dec": draw(len(pairs), d)}
    t |= {"log_threshold": draw.positive(layers, features).log()}
    t |= {f"estimated_norm_scaling_factor_{side}": draw.positive(layers) for side in ("in", "out")}
    axes = {"W_enc": 2, "b_enc": 1, "W_dec": 1, "log_threshold": 1}
    for rank in range(ranks):
        part = {n: v.chunk(ranks, axes[n])[rank] if n in axes else v for n, v in t.items()}
        save(folder / f"rank{rank}_clt_weights.safetensors", part)
    t = {n: v.double() for n, v in t.items()} if ranks else save(folder / "clt_weights.safetensors", t)
    cfg = {"d_in": d, "d_latent": features, "n_layers": layers, "cross_layer_decoders": crossing, "model_name": "m"}
    write_json(folder / "cfg.json", {**cfg, "feature_sharding": bool(ranks), "activation_fn": "jumprelu"})
    written = Written(folder, "clt" if crossing else "tc")
    for i in range(layers):

        def function(x: Tensor, i: int = i) -> tuple[Tensor, Tensor, list[Tensor]]:
            pre = (x * t["estimated_norm_scaling_factor_in"][i]) @ t["W_enc"][i] + t["b_enc"][i]
            a = jump(pre, t["log_threshold"][i].exp())
            numbers = [(n, j) for n, (source, j) in enumerate(pairs) if source == i]
            scale = t["estimated_norm_scaling_factor_out"]
            return pre, a, [(a @ t["W_dec"][n] + t["b_dec"][n]) / scale[j] for n, j in numbers]

        writes = [f"blocks.{j}.hook_mlp_out" for source, j in pairs if source == i]
        written.parts.append(Part(i, f"blocks.{i}.ln2.hook_normalized", writes, function))
    return written


# components, adapters, vectors ---------------------------------------------------------------------------------------

_MODULES = {
    "self_attn.q_proj": ("q", "attn.hook_in"),
    "self_attn.k_proj": ("k", "attn.hook_in"),
    "self_attn.o_proj": ("o", "attn.hook_out"),
    "mlp.up_proj": ("up", "mlp.hook_in"),
    "mlp.down_proj": ("down", "mlp.hook_out"),
}


def _only(vectors: Tensor, *, reads: bool) -> Function:
    """A part that has readers (n, d) alone, or writers (n, d) alone, driven by activations made of the input's sums."""

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        if reads:
            return x @ vectors.T, x @ vectors.T, []
        a = x.sum(1, keepdim=True).expand(-1, len(vectors))
        return a, a, [a @ vectors]

    return function


def _modules(layers: int) -> Iterator[tuple[int, str, str, str]]:
    """Layer, path, tag and hook of every module."""
    for layer in range(layers):
        for leaf, (tag, hook) in _MODULES.items():
            yield layer, f"model.layers.{layer}.{leaf}", tag, hook


def _module_part(layer: int, tag: str, hook: str, readers: Tensor, writers: Tensor) -> Part:
    """The part of a module, which reads the stream or writes to it."""
    place = f"blocks.{layer}.{hook}"
    if hook.endswith("in"):
        return Part(layer, place, [], _only(readers.double(), reads=True), tag)
    return Part(layer, None, [place], _only(writers.double(), reads=False), tag)


def components(folder: Path, d: int, features: int, layers: int, seed: int, *, form: str = "dashed") -> Written:
    draw, inner = Draw(seed), 7
    t: dict[str, Tensor] = {"target_model.model.norm.weight": draw(d)}
    path = folder / "components.safetensors"
    written = Written(path, "comp")
    for layer, module, tag, hook in _modules(layers):
        into, out = (d, inner) if hook.endswith("in") else (inner, d)
        v, u = draw(into, features), draw(features, out)
        prefix = {
            "dashed": f"_components.{module.replace('.', '-')}",
            "older": f"target_model.{module}.components",
            "newer": f"target_model.{module}",
        }[form]
        t |= {f"{prefix}.V": v, f"{prefix}.U": u}
        written.parts.append(_module_part(layer, tag, hook, v.T, u))
    save(path, t)
    return written


def lora(folder: Path, d: int, rank: int, layers: int, seed: int) -> Written:
    draw, inner, alpha = Draw(seed), 7, 5.0
    t: dict[str, Tensor] = {}
    written = Written(folder, "lora")
    for layer, module, tag, hook in _modules(layers):
        into, out = (d, inner) if hook.endswith("in") else (inner, d)
        a, b = draw(rank, into), draw(out, rank)
        name = f"base_model.model.{module}"
        t |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        written.parts.append(_module_part(layer, tag, hook, a, alpha / rank * b.T.double()))
    save(folder / "adapter_model.safetensors", t)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "base_model_name_or_path": "m"}
    write_json(folder / "adapter_config.json", config)
    return written


def plain_vectors(folder: Path, d: int, features: int, layers: int, seed: int, *, form: str = "npy") -> Written:
    draw = Draw(seed)
    folder.mkdir(parents=True, exist_ok=True)
    vectors = draw(features, d) if form != "one" else draw(d)
    path = folder / ("vectors.safetensors" if form == "safetensors" else "vectors.npy")
    if form == "safetensors":
        save(path, {"probe": vectors})
    else:
        np.save(path, vectors.numpy())
    rows = vectors.double().reshape(-1, d)

    def function(x: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        return x @ rows.T, x @ rows.T, [x @ rows.T @ rows]

    return Written(path, "vec", [Part(None, None, [""], function)])


def control_vectors(folder: Path, d: int, features: int, layers: int, seed: int) -> Written:
    draw = Draw(seed)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "control.gguf"
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "m")
    writer.add_uint32("controlvector.layer_count", layers)
    written = Written(path, "vec")
    for layer in range(1, layers + 1):
        direction = draw(d)
        writer.add_tensor(f"direction.{layer}", direction.numpy())
        function = _only(direction.double()[None], reads=False)
        written.parts.append(Part(layer, None, [f"blocks.{layer}.hook_resid_post"], function))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return written


FORMATS: dict[str, Callable[..., Written]] = {
    "circuit-tracer jumprelu skip": circuit_tracer_set,
    "circuit-tracer relu": partial(circuit_tracer_set, activation="relu"),
    "circuit-tracer topk": partial(circuit_tracer_set, activation="topk"),
    "circuit-tracer clt": circuit_tracer_clt,
    "circuit-tracer clt relu": partial(circuit_tracer_clt, jumps=False),
    "bytedance clt": bytedance_clt,
    **{
        f"saelens {name}": partial(saelens, architecture=name)
        for name in (
            "standard",
            "gated",
            "jumprelu",
            "topk",
            "old",
            "scaled",
            "matching_pursuit",
            "transcoder",
            "skip_transcoder",
            "jumprelu_transcoder",
            "jumprelu_skip_transcoder",
        )
    },
    **{
        f"gemma scope {name}": partial(gemma_scope_1, release=name)
        for name in ("res", "att", "mlp", "transcoders", "embedding")
    },
    "gemma scope packed": partial(gemma_scope_1, packed=True),
    "gemma scope 2 transcoder": gemma_scope_2,
    "gemma scope 2 sae": partial(gemma_scope_2, site="resid_post"),
    "gemma scope 2 clt": gemma_scope_2_clt,
    "sparsify sae": sparsify,
    "sparsify transcoder": partial(sparsify, transcode=True),
    **{
        f"dictionary_learning {name}": partial(dictionary_learning, name=name)
        for name in (
            "AutoEncoder",
            "AutoEncoderNew",
            "GatedAutoEncoder",
            "AutoEncoderTopK",
            "BatchTopKSAE",
            "MatryoshkaBatchTopKSAE",
            "JumpReluAutoEncoder",
        )
    },
    "llamascopium jumprelu": llamascopium,
    "llamascopium relu": partial(llamascopium, act="relu"),
    "llamascopium topk transcoder": partial(llamascopium, act="topk", out="hook_mlp_out"),
    "llamascopium clt": llamascopium_clt,
    "llamascopium clt topk": partial(llamascopium_clt, act="topk"),
    "llamascopium lorsa": lorsa,
    "llama scope": llama_scope,
    "clt-forge": clt_forge,
    "clt-forge ranks": partial(clt_forge, ranks=2),
    "clt-forge per layer": partial(clt_forge, crossing=False),
    "components": components,
    "components older": partial(components, form="older"),
    "components newer": partial(components, form="newer"),
    "lora": lora,
    "vectors npy": plain_vectors,
    "vectors one": partial(plain_vectors, form="one"),
    "vectors safetensors": partial(plain_vectors, form="safetensors"),
    "control vectors": control_vectors,
}
"""A writer for every format, called with (folder, d, features, layers, seed)."""
