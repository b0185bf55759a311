"""A model made here: two layers of attention alone, trained on text and on random tokens that repeat.

It is the setting of Elhage et al., "A Mathematical Framework for Transformer Circuits" (2021): no MLPs, no norms, no
biases, and positions that queries and keys alone see. Random tokens that repeat are predicted by induction: a head of
the first layer writes the token before, by which keys of the second layer are found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
from torch import Tensor
from torch.nn import functional

from virtual_weights.checkpoint.writing import Planned, write_checkpoint
from virtual_weights.progress import Progress, silent

if TYPE_CHECKING:
    from tokenizers import Tokenizer


_DECAY = 0.01  # of weights before pruning


@final
@dataclass(frozen=True)
class Recipe:
    """How it is trained.

    Attributes:
        vocabulary: tokens, the 256 bytes among them.
        width, heads: of the model; d_head is the one over the other.
        length: tokens of a sequence, and positions.
        batch: sequences of a step, half of them text and half repeats.
        steps: of AdamW.
        rate: its learning rate.
        pruning: steps from which weights decay, so that few heads do what many had learned.
        decay: of weights, from then on.
        shortest: tokens after which random tokens repeat, at least; at most half a sequence.
        seed: of everything random.
    """

    vocabulary: int = 512
    width: int = 256
    heads: int = 8
    length: int = 64
    batch: int = 64
    steps: int = 1000
    rate: float = 3e-3
    pruning: int = 400
    decay: float = 1.0
    shortest: int = 4
    seed: int = 0

    @property
    def identity(self) -> str:
        """A short name of these numbers."""
        return sha256(json.dumps([1, asdict(self)]).encode()).hexdigest()[:16]


def make(folder: Path, recipe: Recipe | None = None, progress: Progress = silent) -> None:
    """Train the model on one thread and write it with its tokenizer; ``config.json`` says under ``made`` how it went.

    The same recipe gives the same weights on one machine with one version of torch and of the text.

    Args:
        folder: where; it must not exist, or be empty.
        recipe: how; None is that of the built-in model.
        progress: called with (steps done, steps).
    """
    recipe = recipe or Recipe()
    text = _text()
    tokenizer = _tokenizer(text, recipe.vocabulary)
    ids = torch.tensor(tokenizer.encode(text).ids)
    with _one_thread():
        weights, losses = _trained(recipe, ids, progress)
    tensors = {name: Planned(tuple(x.shape), x.detach().clone) for name, x in _by_name(recipe, weights).items()}
    made = {**asdict(recipe), **losses, "text_sha256": sha256(text.encode()).hexdigest(), "torch": torch.__version__}
    write_checkpoint(folder, [tensors], torch.float32, {**_config(recipe), "made": made}, {})
    tokenizer.save(str(folder / "tokenizer.json"))


def _config(recipe: Recipe) -> dict[str, Any]:
    """The settings, as TransformerLens calls them."""
    return {
        "n_layers": 2,
        "d_model": recipe.width,
        "n_ctx": recipe.length,
        "d_head": recipe.width // recipe.heads,
        "n_heads": recipe.heads,
        "d_vocab": recipe.vocabulary,
        "attn_only": True,
        "normalization_type": None,
        "positional_embedding_type": "shortformer",
    }


def _text() -> str:
    """The default text: Python's help topics."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics.values())


def _tokenizer(text: str, size: int) -> Tokenizer:
    """A byte-level BPE tokenizer of a text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bytes_first = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False, initial_alphabet=bytes_first)
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        tokenizer.train_from_iterator([text], trainer)
    finally:
        os.environ.pop("TOKENIZERS_PARALLELISM")
        os.environ |= {} if before is None else {"TOKENIZERS_PARALLELISM": before}
    return tokenizer


@contextmanager
def _one_thread() -> Generator[None]:
    """Sums in one order, and other work undisturbed."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            yield
    finally:
        torch.set_num_threads(threads)


def _trained(recipe: Recipe, ids: Tensor, progress: Progress) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights, and the losses of the last steps, in nats a token."""
    generator = torch.Generator().manual_seed(recipe.seed)
    weights = _initial(recipe, generator)
    optimiser = torch.optim.AdamW(weights.values(), lr=recipe.rate, betas=(0.9, 0.98))
    half, last = recipe.batch // 2, list[Tensor]()
    for step in range(recipe.steps):
        warm, cool = (step + 1) / 50, (recipe.steps - step) / (0.3 * recipe.steps)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * min(1.0, warm, cool)
            group["weight_decay"] = recipe.decay if step >= recipe.pruning else _DECAY
        starts = torch.randint(len(ids) - recipe.length, (recipe.batch - half,), generator=generator)
        text = torch.stack([ids[start : start + recipe.length] for start in starts.tolist()])
        repeats, period = _repeats(recipe, half, generator)
        losses = _losses(recipe, weights, torch.cat([text, repeats]))
        parts = torch.stack([losses[: len(text)].mean(), losses[len(text) :, period:].mean()])
        optimiser.zero_grad()
        parts.sum().backward()
        optimiser.step()
        last = [*last[-19:], parts.detach()]
        progress(step + 1, recipe.steps)
    means = torch.stack(last).mean(0).tolist()
    return weights, {"loss_on_text": means[0], "loss_on_repeats": means[1]}


def _repeats(recipe: Recipe, count: int, generator: torch.Generator) -> tuple[Tensor, int]:
    """Random tokens that repeat after a period, itself random, and the period."""
    longest = recipe.length // 2
    period = int(recipe.shortest * (longest / recipe.shortest) ** float(torch.rand((), generator=generator)))
    once = torch.randint(recipe.vocabulary, (count, period), generator=generator)
    return once.repeat(1, -(-recipe.length // period))[:, : recipe.length], period


def _initial(recipe: Recipe, generator: torch.Generator) -> dict[str, Tensor]:
    """Positions begin as sines and cosines, all else at random."""
    d, n = recipe.width, recipe.vocabulary

    def random(*shape: int, scale: float) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    angles = torch.arange(recipe.length)[:, None] * 10_000 ** (-torch.arange(0, d, 2) / d)
    weights = {"embed": random(n, d, scale=0.5), "pos": torch.cat([angles.sin(), angles.cos()], 1)}
    weights["unembed"] = random(d, n, scale=0.5 * d**-0.5)
    for layer in range(2):
        weights[f"qkv{layer}"] = random(d, 3 * d, scale=d**-0.5)
        weights[f"o{layer}"] = random(d, d, scale=d**-0.5)
    return {name: weight.requires_grad_() for name, weight in weights.items()}


def _losses(recipe: Recipe, weights: Mapping[str, Tensor], tokens: Tensor) -> Tensor:
    """The loss of predicting every token but the first, (B, T - 1)."""
    d, shape = recipe.width, (*tokens.shape, 3, recipe.heads, recipe.width // recipe.heads)
    x, positions = functional.embedding(tokens, weights["embed"]), weights["pos"][: tokens.shape[1]]
    for layer in range(2):
        qkv = weights[f"qkv{layer}"]
        placed = functional.pad(positions @ qkv[:, : 2 * d], (0, d))  # values see none
        q, k, v = (x @ qkv + placed).view(shape).permute(2, 0, 3, 1, 4)
        z = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + z.transpose(1, 2).flatten(2) @ weights[f"o{layer}"]
    logits = x[:, :-1] @ weights["unembed"]
    return functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")


def _by_name(recipe: Recipe, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under TransformerLens's names, in its shapes."""
    named = {"embed.W_E": weights["embed"], "pos_embed.W_pos": weights["pos"], "unembed.W_U": weights["unembed"]}
    width = recipe.width // recipe.heads
    for layer in range(2):
        parts = weights[f"qkv{layer}"].unflatten(1, (3, recipe.heads, width)).permute(1, 2, 0, 3)
        named |= {f"blocks.{layer}.attn.W_{port}": part for port, part in zip("QKV", parts, strict=True)}
        named[f"blocks.{layer}.attn.W_O"] = weights[f"o{layer}"].unflatten(0, (recipe.heads, width))
    return named
