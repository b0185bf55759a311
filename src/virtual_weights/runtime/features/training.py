"""Small dictionaries and adapters to try things on, trained in minutes on a text: transcoders of MLPs, and a LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional

from virtual_weights.errors import UsageError
from virtual_weights.linalg import random_generator
from virtual_weights.progress import Progress, silent
from virtual_weights.runtime.running.hooks import after, before, forward, module_name, module_named, module_of
from virtual_weights.runtime.running.run import Run
from virtual_weights.runtime.running.text import is_token

_HELD_OUT = 8  # one token in so many, the last ones
_BATCH = 512
_LORA_BATCH = 4  # chunks of a step


@final
@dataclass(frozen=True)
class Fit:
    """How well a transcoder gives what its MLP writes.

    Attributes:
        layer: which.
        unexplained: squared error over variance on the tokens that it was trained on.
        held_out: the same on others.
        never_active: features that none of the tokens activates.
    """

    layer: int
    unexplained: float
    held_out: float
    never_active: int


def train_transcoders(  # noqa: PLR0913 - sizes and steps, by keyword only
    run: Run,
    folder: str | Path,
    layers: Sequence[int] = (8, 10, 12),
    *,
    features: int = 1024,
    k: int = 32,
    steps: int = 500,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Fit]:
    """Train a transcoder for the MLP of each layer and write them as circuit-tracer does.

    ``a = top-k(W_enc x + b_enc)``, ``y = W_dec^T a + b_dec``, with x behind the norm and y as the MLP's map gives it;
    Adam on the mean square error of 512 random tokens a step. First tokens of chunks are left out.

    Args:
        run: the model and the text.
        folder: where ``config.yaml`` and ``layer_N.safetensors`` are written.
        layers: which.
        features: of each layer.
        k: active at one token.
        steps: of Adam.
        rate: its learning rate.
        seed: of everything random.
        progress: called with (steps done, steps of all layers).

    Raises:
        UsageError: the model has no such MLP, or a number makes no sense.
    """
    _check(run, layers, features, k, steps)
    _check_folder(Path(folder), layers)
    from safetensors.torch import save_file

    folder, fits = Path(folder), list[Fit]()
    folder.mkdir(parents=True, exist_ok=True)
    for number, (layer, (x, y)) in enumerate(_collected(run, layers).items()):
        trained = _Transcoder(x.shape[1], y.shape[1], features, k, random_generator(seed + layer))
        learnt = len(x) - len(x) // _HELD_OUT
        trained.fit(
            x[:learnt], y[:learnt], steps, rate, lambda step, n=number: progress(n * steps + step, steps * len(layers))
        )
        fits.append(trained.judged(layer, x, y, learnt))
        save_file(trained.tensors, folder / f"layer_{layer}.safetensors")
    config = {
        "model_name": run.stream.source.reference,
        "model_kind": "transcoder_set",
        "feature_input_hook": "mlp.hook_in",
        "feature_output_hook": "mlp.hook_out",
        "activation": "topk",
        "k": k,
    }
    (folder / "config.yaml").write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in config.items()))
    return fits


def _check(run: Run, layers: Sequence[int], features: int, k: int, steps: int) -> None:
    """Refuse sizes that make no sense, and layers without an MLP."""
    if min(features, k, steps) < 1 or k > features or not layers:
        raise UsageError(
            f"{features} features, {k} of them active, {steps} steps, layers {list(layers)}",
            expected="numbers from 1, k at most the number of features, one layer at least",
            do="correct them",
        )
    missing = [layer for layer in layers if f"L{layer}.mlp" not in run.stream.groups]
    if missing:
        raise UsageError(
            f"this model has no MLP in layer {', '.join(map(str, missing))}",
            expected=f"layers from 0 to {run.stream.spec.n_layers - 1} with an MLP",
            do="name other layers",
        )


def _check_folder(folder: Path, layers: Sequence[int]) -> None:
    """Refuse one with other layers, which one file of settings would then be wrong for."""
    others = {path.name for path in folder.glob("layer_*.safetensors")} - {f"layer_{n}.safetensors" for n in layers}
    if others:
        raise UsageError(
            f"{str(folder)!r} holds {', '.join(sorted(others))} already, with settings of their own",
            expected="a folder of its own for what is trained together",
            do="name another folder, or remove these files",
        )


@torch.no_grad()
def _collected(run: Run, layers: Sequence[int]) -> dict[int, tuple[Tensor, Tensor]]:
    """What every MLP received and gave, (tokens, d) float32, first tokens of chunks left out."""
    pairs: dict[int, tuple[list[Tensor], list[Tensor]]] = {layer: ([], []) for layer in layers}
    mask = torch.zeros(0)
    hooks: list[Any] = []

    def keep(side: list[Tensor], tensor: Tensor) -> None:
        side.append(tensor.detach()[mask.to(tensor.device)].float().cpu())

    for layer in layers:
        group, (inputs, outputs) = run.stream.groups[f"L{layer}.mlp"], pairs[layer]
        read = module_of(run.module, run.stream, "gate" if "gate" in group.ports else "up", group.id)
        wrote = module_of(run.module, run.stream, "down", group.id)
        hooks.append(before(read, partial(keep, inputs)))
        hooks.append(after(wrote, partial(keep, outputs)))
    try:
        for tokens in run.batches():
            mask = is_token(tokens)
            mask[:, 0] = False
            forward(run.module, tokens.clamp(min=0))
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: (torch.cat(x), torch.cat(y)) for layer, (x, y) in pairs.items()}


@final
class _Transcoder:
    """Encoder, decoder and biases while they are trained."""

    def __init__(self, d_in: int, d_out: int, features: int, k: int, generator: torch.Generator) -> None:
        self._k, self._generator = k, generator
        rows = functional.normalize(torch.randn(features, d_in, generator=generator), dim=1)
        out = functional.normalize(torch.randn(features, d_out, generator=generator), dim=1)
        self.tensors = {"W_enc": rows, "W_dec": out, "b_enc": torch.zeros(features), "b_dec": torch.zeros(d_out)}

    def activations(self, x: Tensor) -> Tensor:
        """(n, F) of inputs (n, d)."""
        pre = x @ self.tensors["W_enc"].T + self.tensors["b_enc"]
        values, places = pre.topk(self._k)
        return torch.zeros_like(pre).scatter(1, places, values)

    def outputs(self, a: Tensor) -> Tensor:
        """(n, d) of activations (n, F)."""
        return a @ self.tensors["W_dec"] + self.tensors["b_dec"]

    def fit(self, x: Tensor, y: Tensor, steps: int, rate: float, report: Callable[[int], None]) -> None:
        """Adam on the mean square error, over the variance of the outputs."""
        self.tensors["b_dec"] = y.mean(0)
        variance = y.var(0, correction=0).sum()
        self.tensors = {name: tensor.clone().requires_grad_() for name, tensor in self.tensors.items()}
        optimiser = torch.optim.Adam(self.tensors.values(), lr=rate)
        for step in range(steps):
            rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=self._generator)
            loss = (self.outputs(self.activations(x[rows])) - y[rows]).square().sum(1).mean() / variance
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            report(step + 1)
        self.tensors = {name: tensor.detach() for name, tensor in self.tensors.items()}

    @torch.no_grad()
    def judged(self, layer: int, x: Tensor, y: Tensor, learnt: int) -> Fit:
        """Its figures."""
        a = self.activations(x)
        error = (self.outputs(a) - y).square().sum(1)
        learned, other = (
            float(error[part].sum() / (y[part] - y[part].mean(0)).square().sum())
            for part in (slice(0, learnt), slice(learnt, None))
        )
        return Fit(layer, learned, other, int((a == 0).all(0).sum()))


def train_lora(  # noqa: PLR0913 - sizes and steps, by keyword only
    run: Run,
    folder: str | Path,
    *,
    roles: Sequence[str] = ("q", "v", "o", "down"),
    rank: int = 4,
    alpha: float = 8.0,
    steps: int = 60,
    rate: float = 2e-3,
    seed: int = 0,
    progress: Progress = silent,
) -> tuple[float, float]:
    """Train a low-rank adapter of a model on a text and write it as peft does.

    Args:
        run: the model and the text.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` are written.
        roles: which maps of every layer are adapted: ``"q"``, ``"k"``, ``"v"``, ``"o"``, ``"gate"``, ``"up"``,
            ``"down"``.
        rank: of what is added.
        alpha: it is multiplied by ``alpha / rank``.
        steps: of Adam, on four chunks each.
        rate: its learning rate.
        seed: of everything random.
        progress: called with (steps done, steps).

    Returns:
        Loss per token, nats, of the first and the last tenth of the steps.

    Raises:
        UsageError: a role is not a linear map of its own in this model.
    """
    generator = random_generator(seed)
    factors = _factors(run, roles, rank, generator)
    hooks = [
        module_named(run.module, run.stream, name).register_forward_hook(_adding(*pair, alpha / rank))
        for name, pair in factors.items()
    ]
    frozen = [(parameter, parameter.requires_grad) for parameter in run.module.parameters()]
    try:
        for parameter, _ in frozen:
            parameter.requires_grad = False
        losses = _losses(run, [x for pair in factors.values() for x in pair], steps, rate, generator, progress)
    finally:
        for hook in hooks:
            hook.remove()
        for parameter, required in frozen:
            parameter.requires_grad = required
    _write_adapter(Path(folder), run, factors, rank, alpha)
    tenth = max(1, steps // 10)
    return sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth


_Factors = dict[str, tuple[Tensor, Tensor]]
"""By name of the module A (rank, in) and B (out, rank)."""


def _factors(run: Run, roles: Sequence[str], rank: int, generator: torch.Generator) -> _Factors:
    """Factors that add nothing yet, of the maps of all layers that play these roles."""
    factors: _Factors = {}
    for group in (*run.stream.groups.heads, *run.stream.groups.mlps):
        for role in roles:
            if run.stream.model.row(role, group.id) is None:
                continue
            linear = module_of(run.module, run.stream, role, group.id)
            if not isinstance(linear, nn.Linear):
                raise UsageError(
                    f"{role} of {group.id} is a {type(linear).__name__}",
                    expected="a linear map of its own",
                    do="adapt other roles, or train the adapter by peft",
                )
            down = torch.randn(rank, linear.in_features, generator=generator) / linear.in_features**0.5
            up = torch.zeros(linear.out_features, rank)
            name = module_name(run.stream, role, group.id)
            factors[name] = down.to(run.device).requires_grad_(), up.to(run.device).requires_grad_()
    return factors


def _losses(
    run: Run, parameters: list[Tensor], steps: int, rate: float, generator: torch.Generator, progress: Progress
) -> list[float]:
    """Train; the loss of every step."""
    optimiser, losses = torch.optim.Adam(parameters, lr=rate), list[float]()
    chunks = [chunk for chunk in run.chunks if len(chunk) == len(run.chunks[0])]
    for step in range(steps):
        rows = torch.randint(len(chunks), (_LORA_BATCH,), generator=generator)
        tokens = torch.stack([chunks[i] for i in rows.tolist()]).to(run.device)
        logits = run.module(tokens, use_cache=False).logits[:, :-1].float()
        loss = functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
        progress(step + 1, steps)
    return losses


def _write_adapter(folder: Path, run: Run, factors: _Factors, rank: int, alpha: float) -> None:
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name}.lora_{side}.weight": tensor.detach().cpu().contiguous()
        for name, pair in factors.items()
        for side, tensor in zip("AB", pair, strict=True)
    }
    leaves = sorted({name.rpartition(".")[2] for name in factors})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": leaves, "bias": "none"}
    config |= {"base_model_name_or_path": run.stream.source.reference, "fan_in_fan_out": False}
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
    save_file(tensors, folder / "adapter_model.safetensors")


def _adding(down: Tensor, up: Tensor, scale: float) -> Callable[..., Tensor]:
    """A hook that adds ``scale B A x`` to what a module gives."""

    def hook(_module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = given[0]
        return output + scale * (x @ down.to(x).T) @ up.to(x).T

    return hook
