"""Losses of predicting the next token."""

from __future__ import annotations

import torch
from torch import Tensor

from virtual_weights.errors import UsageError
from virtual_weights.runtime.running.hooks import wide


def token_losses(logits: Tensor, tokens: Tensor, first: int = 1) -> Tensor:
    """Loss in nats of predicting tokens ``first``, ``first + 1``, ... of each sequence, (B, T - first).

    NaN where a token has no logit, as in a model whose answers are of another vocabulary than what it reads.

    Args:
        logits: (B, T, V).
        tokens: (B, T).
        first: the first token that counts, at least 1; half the length where the second half repeats the first.
    """
    predicted, wanted = wide(logits[:, first - 1 : -1]), tokens[:, first:]
    absent = wanted >= logits.shape[-1]
    losses = torch.nn.functional.cross_entropy(predicted.mT, wanted.masked_fill(absent, 0), reduction="none")
    return losses.masked_fill(absent, torch.nan)


def next_token_loss(logits: Tensor, tokens: Tensor, first: int = 1) -> Tensor:
    """The mean of ``token_losses`` over each sequence, (B,).

    Raises:
        UsageError: a token has no logit.
    """
    losses = token_losses(logits, tokens, first)
    if int(tokens[:, first:].max()) >= logits.shape[-1]:
        raise UsageError(
            f"token {int(tokens[:, first:].max())} among those to predict, and {logits.shape[-1]} logits",
            expected="tokens that the model has logits of",
            do="measure a difference of logits: metric=LogitDifference(token)",
        )
    return losses.mean(1)
