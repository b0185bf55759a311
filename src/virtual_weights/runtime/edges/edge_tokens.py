"""What one edge does on a text, token by token: what it puts on its reader, and what is predicted without it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.nn.functional import pad

from virtual_weights.checkpoint import text_of
from virtual_weights.progress import Progress, silent
from virtual_weights.record import Axis, Column, Record
from virtual_weights.runtime.edges.arrival import Arrival
from virtual_weights.runtime.edges.attribution import check_how
from virtual_weights.runtime.edges.edge import Edge, EdgeSet, Replacement, Scalars
from virtual_weights.runtime.edges.losses import token_losses
from virtual_weights.runtime.edges.passes import CHANGED, Manner, Pass, passes
from virtual_weights.runtime.running.run import Run
from virtual_weights.stream import Question, cost
from virtual_weights.stream.effective import as_seen

_UNITS = {"Q": "squared logits", "K": "squared logits", "V": "squared norm"}


@final
@dataclass(frozen=True)
class EdgeTokens(Question[Run]):
    """One edge on a text, token by token: a Record over ``row``, ``"1:0"`` for the first token of the first sequence.

    With c(t) what the edge carries to its port at token t and p(t) all that arrives there, both through A, which is
    what becomes of the port's input, see ``Contribution``::

        contribution(t) = |A c(t)|^2    share(t) = |A c(t)|^2 / |A p(t)|^2    c(t) = R~ O z(t) / s(t)

    For Q, t is the query's position, for K and V the key's. Of the same tokens the mean of ``contribution`` is that of
    ``Contribution``, and the mean of ``contribution`` over the mean of |A p|^2 is its ``share``. Where queries and keys
    have a norm of their own, its scalar is here that of the token, there its mean square.

    ``loss`` and ``loss_without`` are what predicting this very token from those before it costs, with the edge and
    without it, removed as in ``EdgeAblation``: its effect is the mean over sequences of the mean of their difference.
    What the edge does at a token shows in later losses alone. ``likeliest`` and ``likeliest_without`` are the tokens
    that were likeliest in this place.

    Edges that are removed in the same way share their passes, asked ``together``. Progress is (edges done, edges in
    all), counted batch by batch.

    Attributes:
        writer: e.g. ``"L16H0"``.
        reader: e.g. ``"L18H6.K"``.
        replacement: see ``EdgeAblation``.
        scalars: likewise.
        sequences: how many of the run's first whole chunks, where it has so many; None for all.
        batch: see ``EdgeAblation``.

    Raises:
        UsageError: a number of sequences that cannot be; when asked, an edge that cannot be, or a replacement that the
            run does not have.

    Example:
        >>> record = EdgeTokens("L16H0", "L18H6.K")(run)  # doctest: +SKIP
        >>> record["loss_without"] - record["loss"]  # doctest: +SKIP
    """

    question: ClassVar[str] = "edge_tokens"

    writer: str
    reader: str
    replacement: Replacement = "mean"
    scalars: Scalars = "held"
    sequences: int | None = 4
    batch: int = cost(8)

    def __post_init__(self) -> None:
        check_how(None, self.sequences, self.batch)

    def __call__(self, subject: Run, progress: Progress = silent) -> Record:
        """Run the model.

        Returns:
            A Record over ``row``: ``sequence`` (from 1), ``position`` (from 0), ``token`` and ``text`` (None without a
            tokenizer), ``contribution``, ``share``, ``loss`` and ``loss_without`` in nats (NaN where the token does not
            count), ``likeliest`` and ``likeliest_without`` with their texts (None at the first token of a sequence).
            The stamp has ``edge``, ``group`` and ``shared_with``, ``effect_nats``, ``loss_changed``, ``clean_loss`` and
            ``sequences``.
        """
        return next(self.together([self], subject, progress))[1]

    @classmethod
    def together(
        cls, questions: Sequence[Question[Any]], subject: Run, progress: Progress = silent
    ) -> Iterator[tuple[Question[Any], Record]]:
        alike: dict[EdgeTokens, list[EdgeTokens]] = {}
        for question in questions:
            assert isinstance(question, EdgeTokens)
            alike.setdefault(replace(question, writer="", reader=""), []).append(question)
        for how, group in alike.items():
            edges = [Edge.of(subject.stream, question.writer, question.reader) for question in group]
            manner = Manner(how.replacement, how.scalars, how.sequences, None, how.batch)
            tokens, clean, others, arrivals = _by_token(subject, edges, manner, progress)
            for question, edge, other, arrival in zip(group, edges, others, arrivals, strict=True):
                yield question, question._record(subject, edge, tokens, [clean, other], arrival)

    def _record(
        self, run: Run, edge: Edge, tokens: Tensor, predicted: Sequence[_Predicted], arrival: Arrival
    ) -> Record:
        """The answer, of the tokens (S, T), what is predicted with the edge and without it, and what it carries."""
        places = [(i + 1, t) for i in range(tokens.shape[0]) for t in range(tokens.shape[1])]
        texts, (energy, whole) = run.stream.source.token_texts(), arrival.energies()
        share = (energy / whole).where(whole > 0, torch.nan)
        meaning = "what the edge carries to the port, |A R~ O z/s|^2"
        columns = [
            Column("sequence", torch.tensor([i for i, _ in places]), "place, from 1", "which of the run's chunks"),
            Column("position", torch.tensor([t for _, t in places]), "place, from 0", "where in the sequence"),
            Column("token", tokens.flatten(), "id", "of the vocabulary"),
            Column("text", tuple(text_of(texts, i) for i in tokens.flatten().tolist()), "", "as the vocabulary has it"),
            Column("contribution", energy.flatten(), _UNITS.get(edge.port, "squared activations"), meaning),
            Column("share", share.flatten(), "1 (ratio), >= 0", "contribution over that of all that arrives here"),
        ]
        for one, suffix, how in zip(predicted, ("", "_without"), ("with the edge", "without it"), strict=True):
            ids = [None if i < 0 else i for i in one.likeliest.flatten().tolist()]
            words = tuple(None if i is None else text_of(texts, i) for i in ids)
            columns += [
                Column(f"loss{suffix}", one.losses.flatten(), "nats", f"of predicting this token, {how}"),
                Column(f"likeliest{suffix}", tuple(ids), "id", f"of the token that was likeliest here, {how}"),
                Column(f"likeliest_text{suffix}", words, "", "its text"),
            ]
        clean, other = (one.losses[:, run.first :] for one in predicted)
        change = other - clean
        figures = {"effect_nats": change.mean(), "loss_changed": (change.abs() > CHANGED).double().mean()}
        figures["clean_loss"] = clean.mean()
        known = not bool(change.isnan().any())  # of a token without a logit there is no loss
        return run.record(
            self,
            (Axis("row", tuple(f"{i}:{t}" for i, t in places)),),
            columns,
            edge=str(edge),
            group=edge.kv_group,
            shared_with=list(edge.shared_with),
            **{name: float(figure) if known else None for name, figure in figures.items()},
            sequences=len(tokens),
            **({"rotary_offset": "mean over causal pairs"} if edge.port in ("Q", "K") else {}),
        )


@final
@dataclass(frozen=True, eq=False)
class _Predicted:
    """What a pass predicts of every token from those before it, on the CPU.

    Attributes:
        losses: (S, T) float64, in nats; NaN where the token does not count.
        likeliest: (S, T) ids; -1 at the first.
    """

    losses: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, run: Run, seen: Pass) -> _Predicted:
        """Of one batch."""
        losses = token_losses(seen.logits, seen.tokens, run.first).double()
        likeliest = seen.logits[:, :-1].argmax(-1)
        return cls(pad(losses, (run.first, 0), value=torch.nan).cpu(), pad(likeliest, (1, 0), value=-1).cpu())

    @classmethod
    def joined(cls, batches: Sequence[_Predicted]) -> _Predicted:
        """Of several batches, one after the other."""
        return cls(torch.cat([one.losses for one in batches]), torch.cat([one.likeliest for one in batches]))


@torch.no_grad()
def _by_token(
    run: Run, edges: Sequence[Edge], manner: Manner, progress: Progress
) -> tuple[Tensor, _Predicted, list[_Predicted], list[Arrival]]:
    """The tokens (S, T), what is predicted with every edge and without each, and what each carries."""
    run = replace(run, stream=as_seen(run.stream, "enc"))
    arrivals = [Arrival(run.stream, edge) for edge in edges]
    sets = [EdgeSet((edge,)) for edge in edges]
    places = {place for arrival in arrivals for place in arrival.places}
    tokens, clean = list[Tensor](), list[_Predicted]()
    others = [list[_Predicted]() for _ in edges]
    for _, seen, without in passes(run, sets, manner, [()] * len(sets), places, progress):
        tokens.append(seen.tokens.cpu())
        clean.append(_Predicted.of(run, seen))
        for arrival in arrivals:
            arrival.see(seen.signals)
        for i, other in without:
            others[i].append(_Predicted.of(run, other))
    return torch.cat(tokens), _Predicted.joined(clean), [_Predicted.joined(other) for other in others], arrivals
