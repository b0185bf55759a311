"""Which score of an edge predicts what removing it does: hundreds of edges, drawn evenly by decile of every score.

    python benchmarks/predictors.py smollm2-135m -o study.json            # some hours on 2 cores, minutes on a GPU
    python benchmarks/predictors.py small --device cuda -o small.json     # a small model, trained here first

Edges are those of every writer (heads, MLPs, embeddings) into queries, keys and values. Of each score's deciles the
same number is drawn, whatever the others say, so that no score chooses what it is tested on; ``1 / P(drawn)`` weighs
precision back to all edges. Each edge is removed exactly (``EdgeAblation``: the writer's mean in its place, scalars
held) on text that no score has seen, but for ``attribution_same``, the gradient on that very text. Heads that share a
key/value head count as one reader, whose score is the mean of theirs. Prose is the default text, in halves (small: two
parts of what it was not trained on); repeats are random tokens that come twice, with other seeds.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import virtual_weights as vw
from virtual_weights.analysis.pairs.alignment import aligned
from virtual_weights.linalg import rank_correlation
from virtual_weights.runtime.edges.edge import Edge, group_readers
from virtual_weights.runtime.running.text import texts

PORTS = ("Q", "K", "V")
SCORES = ("activity", "score", "strength", "lift", "overlap", "contribution", "attribution", "attribution_same")
LENGTH = 64


@dataclass(frozen=True)
class Texts:
    """A text that scores may use, and another on which edges are removed."""

    name: str
    seen: vw.Run
    unseen: vw.Run


def language_model(name: str, device: str) -> list[Texts]:
    """Prose in halves, and repeats with two seeds."""
    stream, how = vw.open(name), dict[str, Any](device=device, batch=16)
    prose = vw.Run.on_text(stream, None, 16384, 256, **how)
    seen, unseen = prose.halves()
    how["model"] = prose.runner
    repeats = [vw.Run.on_repeats(stream, 8192, 128, seed, **how) for seed in (1, 0)]
    return [Texts("prose", seen, unseen.shortened(LENGTH)), Texts("repeats", *repeats)]


def small(device: str, steps: int = 3000) -> list[Texts]:
    """A Llama of 3 layers on bytes, trained on the first nine tenths of the default text and on repeated bytes."""
    import transformers

    torch.manual_seed(0)
    sizes = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=3, num_attention_heads=8)
    config = transformers.LlamaConfig(**sizes, vocab_size=256, max_position_embeddings=128, attn_implementation="eager")
    model: Any = transformers.LlamaForCausalLM(config)
    model.to(device)
    data = torch.tensor(list("\n".join(texts(None)).encode()))
    train, held_out = data[: len(data) * 9 // 10], data[len(data) * 9 // 10 :]
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 3e-3, total_steps=steps)
    loss = torch.tensor(math.nan)
    for step in range(steps):
        starts = torch.randint(len(train) - 128, (32,))
        half = torch.randint(256, (16, 64))
        batch = torch.cat([torch.stack([train[i : i + 128] for i in starts]), half.repeat(1, 2)]).to(device)
        loss = model(batch, labels=batch).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
        if step % 500 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    model.eval()
    stream, how = vw.open(model), dict[str, Any](model=model, batch=16)
    rows = held_out[: len(held_out) // 128 * 128].view(-1, 128)
    seen, unseen = (vw.Run.on_tokens(stream, part, text="held-out bytes", **how) for part in (rows[:128], rows[128:]))
    repeats = [vw.Run.on_repeats(stream, 8192, 128, seed, **how) for seed in (1, 0)]
    found = [Texts("prose", seen, unseen.shortened(LENGTH)), Texts("repeats", *repeats)]
    for some in found:
        print(f"{some.name}: loss {_loss(some.unseen):.3f} nats", flush=True)
    return found


def _loss(run: vw.Run) -> float:
    tokens = run.sequences(16)
    with torch.no_grad():
        logits = run.module(tokens).logits[:, run.first - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.mT, tokens[:, run.first :]))


def scores(some: Texts, port: Any, moments: vw.Moments) -> tuple[list[str], list[str], dict[str, Tensor]]:
    """Readers, one of every key/value group, writers, and every score over them; NaN where an edge cannot be."""
    stream = some.seen.stream
    composition = vw.Composition(port, writers="all")(stream)
    contribution = vw.Contribution(port, moments, writers="all")(stream)
    records = {
        "activity": (contribution, "activity"),
        "score": (composition, "score"),
        "strength": (composition, "strength"),
        "lift": (composition, "lift"),
        "overlap": (vw.Overlap(port, "all")(stream), "overlap"),
        "contribution": (contribution, "contribution"),
        "attribution": (vw.Attribution(port, "all")(some.seen), "size"),
        "attribution_same": (vw.Attribution(port, "all", sequences=32)(some.unseen), "size"),
    }
    readers, writers = composition.axis("reader").labels, composition.axis("writer").labels
    firsts = group_readers(stream, port)
    shared = len(readers) // len(firsts)
    found = {
        name: aligned(record, composition, column).unflatten(0, (-1, shared)).mean(1)
        for name, (record, column) in records.items()
    }
    known = torch.stack(list(found.values())).isfinite().all(0)
    known &= ~torch.tensor([stream.groups.of(writer).constant for writer in writers])
    return list(firsts), list(writers), {name: value.where(known, torch.nan) for name, value in found.items()}


def drawn(found: Mapping[str, Tensor], each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Flat indices of edges, ``each`` of every decile of every score, and the probability that each was drawn."""
    generator = torch.Generator().manual_seed(seed)
    known = next(iter(found.values())).flatten().isfinite().nonzero()[:, 0]
    missed, chosen = torch.ones(len(known), dtype=torch.float64), torch.zeros(len(known), dtype=torch.bool)
    for value in found.values():
        order = value.flatten()[known].argsort()
        for decile in order.tensor_split(10):
            pick = torch.randperm(len(decile), generator=generator)[:each]
            chosen[decile[pick]] = True
            missed[decile] *= 1 - len(pick) / len(decile)
    return known[chosen], 1 - missed[chosen]


def removed(run: vw.Run, edges: Iterable[tuple[str, str]], batch: int) -> list[dict[str, Any]]:
    """What the removal of every edge does, in the order given."""
    edges = list(edges)
    order = sorted(range(len(edges)), key=lambda i: Edge.of(run.stream, *edges[i]).state)  # passes start late
    questions = [vw.EdgeAblation(*edges[i], batch=batch) for i in order]
    done: dict[int, dict[str, Any]] = {}
    for i, (_, record) in zip(order, vw.EdgeAblation.together(questions, run), strict=True):
        done[i] = next(iter(record.rows()))
    return [done[i] for i in range(len(edges))]


def average_precision(score: Tensor, positive: Tensor, weight: Tensor) -> float:
    """The mean of the precision at every positive, from the highest score down, edges weighted."""
    order = score.argsort(descending=True)
    hit, weight = positive[order] * weight[order], weight[order]
    return float((hit * hit.cumsum(0) / weight.cumsum(0)).sum() / hit.sum())


def precision_at(recall: float, score: Tensor, positive: Tensor, weight: Tensor) -> float:
    """Precision where so much of the positives is found."""
    order = score.argsort(descending=True)
    hit = (positive[order] * weight[order]).cumsum(0)
    at = int((hit >= recall * hit[-1]).nonzero()[0])
    return float(hit[at] / weight[order].cumsum(0)[at])


def interval(figure: Callable[[Tensor], float | None], count: int, draws: int = 500) -> list[float]:
    """2.5% and 97.5% of a figure over edges drawn anew with replacement."""
    generator = torch.Generator().manual_seed(0)
    values = [figure(torch.randint(count, (count,), generator=generator)) for _ in range(draws)]
    kept = torch.tensor([v for v in values if v is not None and not math.isnan(v)], dtype=torch.float64)
    return [float(kept.quantile(q)) for q in (0.025, 0.975)] if len(kept) else [math.nan, math.nan]


def figures(rows: list[dict[str, Any]], least: float) -> list[dict[str, Any]]:
    """Of every port and score, over all writers and over heads alone: how well it orders and finds effects."""
    table: list[dict[str, Any]] = []
    for port in PORTS:
        for writers in ("all", "heads"):
            some = [r for r in rows if r["port"] == port and (writers == "all" or "H" in r["writer"])]
            effect = torch.tensor([abs(r["effect_nats"]) for r in some], dtype=torch.float64)
            weight = torch.tensor([1 / r["probability"] for r in some], dtype=torch.float64)
            positive = torch.tensor([r["low"] > least or r["high"] < -least for r in some], dtype=torch.float64)
            for name in SCORES:
                score = torch.tensor([r[name] for r in some], dtype=torch.float64)

                def correlation(i: Tensor, score: Tensor = score, effect: Tensor = effect) -> float | None:
                    return rank_correlation(score[i], effect[i])

                def precision(
                    i: Tensor, score: Tensor = score, positive: Tensor = positive, weight: Tensor = weight
                ) -> float:
                    return average_precision(score[i], positive[i], weight[i])

                everything = torch.arange(len(some))
                row = {"port": port, "writers": writers, "score": name, "edges": len(some)}
                row |= {"causal": int(positive.sum()), "base_rate": float((positive * weight).sum() / weight.sum())}
                row |= {"rank_correlation": correlation(everything)}
                row |= {"rank_correlation_interval": interval(correlation, len(some))}
                row |= {"average_precision": precision(everything)}
                row |= {"average_precision_interval": interval(precision, len(some))}
                if positive.any():
                    row |= {
                        f"precision_at_{int(100 * r)}": precision_at(r, score, positive, weight)
                        for r in (0.25, 0.5, 0.75)
                    }
                table.append(row)
    return table


def table(figures: list[dict[str, Any]]) -> str:
    """Scores over ports: rank correlation, average precision, the latter's value for a random order beside it."""
    lines = ["| score | writers | ρ Q | ρ K | ρ V | AP Q | AP K | AP V |", "|---|---|---|---|---|---|---|---|"]
    for writers in ("all", "heads"):
        known = {(r["score"], r["port"]): r for r in figures if r["writers"] == writers}
        for name in SCORES:
            rows = [known[name, port] for port in PORTS]
            cells = [_short(r["rank_correlation"]) for r in rows] + [_short(r["average_precision"]) for r in rows]
            lines.append(f"| {name} | {writers} | " + " | ".join(cells) + " |")
        rows = [known[SCORES[0], port] for port in PORTS]
        rates = " | ".join(_short(r["base_rate"]) for r in rows)
        lines.append(f"| a random order | {writers} | 0 | 0 | 0 | {rates} |")
        lines.append(
            f"| edges (causal) | {writers} | " + " | ".join(f"{r['edges']} ({r['causal']})" for r in rows) + " | | | |"
        )
    return "\n".join(lines)


def _short(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("0.", ".", 1)


def study(some: Texts, each: int, least: float, batch: int) -> dict[str, Any]:
    """All of it for one model and text."""
    began = time.perf_counter()
    moments = vw.Observation(2048).moments(some.seen)
    rows: list[dict[str, Any]] = []
    for port in PORTS:
        readers, writers, found = scores(some, port, moments)
        chosen, probability = drawn(found, each, seed=0)
        edges = [(writers[i % len(writers)], readers[i // len(writers)]) for i in chosen.tolist()]
        for i, effect, p in zip(chosen.tolist(), removed(some.unseen, edges, batch), probability.tolist(), strict=True):
            kept = {name: effect[name] for name in ("writer", "reader", "effect_nats", "low", "high", "loss_changed")}
            given = {name: float(value.flatten()[i]) for name, value in found.items()}
            rows.append({"port": port, **kept, "probability": p, **given})
    answer: dict[str, Any] = {"text": some.name, "seen": some.seen.text, "unseen": some.unseen.text, "least": least}
    answer |= {"held": moments.held, "edges": rows, "figures": figures(rows, least)}
    answer |= {"seconds": time.perf_counter() - began}
    print(f"\n{some.name}: {len(rows)} edges in {answer['seconds']:.0f} s, causal beyond {least} nats")
    print(table(answer["figures"]), flush=True)
    return answer


def main() -> None:
    """Read the command line and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="small, or what vweights opens")
    parser.add_argument("--each", type=int, default=2, help="edges of every decile of every score")
    parser.add_argument("--least", type=float, default=0.001, help="nats beyond which an effect counts as causal")
    parser.add_argument("--steps", type=int, default=3000, help="of the small model's training")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=32, help="sequences at once where edges are removed")
    parser.add_argument("-o", "--output", type=Path, required=True)
    given = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = False
    runs = small(given.device, given.steps) if given.model == "small" else language_model(given.model, given.device)
    answers = [study(some, given.each, given.least, given.batch) for some in runs]
    given.output.write_text(json.dumps({"model": given.model, "each": given.each, "texts": answers}))


if __name__ == "__main__":
    main()
