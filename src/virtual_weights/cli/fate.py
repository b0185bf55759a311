"""``vweights erased``, ``persistence`` and ``frontier``: what becomes of what was written while the model runs."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, Table
from virtual_weights.cli.verb import Session, running_verb

_ERASER = ("eraser", "mean", "spread", "erased", "overshot", "strengthened", "bimodality", "tokens")
_VERDICTS: tuple[str, ...] = ("unconditional", "conditional", "rare", "overshoots", "never")
_LISTS = {
    "unconditional": ("erase unconditionally", "by share of tokens, then nearest to 1"),
    "conditional": ("erase conditionally", "by bimodality"),
    "overshoots": ("overshoot", "by share of tokens"),
}
_ERASERS = 3  # named for each writer
_WRITER = ("writer", "start", "final", "lowest", "lowest_state", "half_state", "eraser", "taken")
_PRICES = (
    "price",
    "lambda",
    "optimal",
    "model",
    "agreement",
    "chance",
    "shuffled",
    "keep_all",
    "erased_by_optimal",
    "erased_by_model",
)
_POLICY = ("writer", "excess", "erased_by_model", "erased_by_optimal", "utility", "interference", "intended")


class EraserKind(StrEnum):
    """What erases."""

    neuron = "neuron"
    head = "head"
    mlp = "mlp"


@running_verb("text", "repeated", tokens=16384)
def erased(
    session: Session,
    threshold: Annotated[
        float,
        typer.Option(
            "--threshold", metavar="X", help="least coefficient that counts as erasing, below 1; 2 - X is the largest"
        ),
    ] = 0.5,
    kind: Annotated[EraserKind, typer.Option("--kind", help="which erasers to list; all are counted")] = (
        EraserKind.neuron
    ),
    top: o.Top = 10,
) -> Answer:
    """Find neurons, heads and MLPs that erase what they read: at every token of a text, at some, or at few.

    Beyond erasing, a component overshoots: it leaves the opposite of what it read.
    """
    question = vw.Erased(threshold)
    record = session.ask(question)
    counts = _counts(record)
    best = {name: _most(record, kind, name, top) for name in ("unconditional", "conditional", "overshoots")}
    shown: list[Table | str] = [
        Table(
            f"how many components erase (unconditionally, conditionally, rarely) or overshoot · {session.name}",
            [{"kind": name, **row} for name, row in counts.items()],
        )
    ]
    for name, rows in best.items():
        plural = "MLPs" if kind is EraserKind.mlp else f"{kind.value}s"
        does, order = _LISTS[name]
        title = f"the {len(rows)} {plural} that {does}, {order}" if rows else f"{plural} that {does}: none"
        shown.append(Table(title, rows, _ERASER))
    shown += [
        f"a component erases where its coefficient is {threshold:g} to {2 - threshold:g}: unconditionally on "
        f"{question.always:.0%} of tokens or more, conditionally on {question.seldom:.0%} or more, rarely on fewer; "
        f"above, it overshoots, and counts as doing so on {question.seldom:.0%} or more, if it erases on fewer",
        f"for heads and MLPs, mean and spread are those of coefficients clipped to ±{question.tail:g}",
        f"{record.stamp['tokens']} tokens of {session.run.text}",
    ]
    return Answer(record, [row for rows in best.values() for row in rows], {"counts": counts}, shown)


@running_verb("text", "repeated", tokens=2048)
def persistence(
    session: Session,
    writer: Annotated[
        str | None, typer.Option("--writer", metavar="NAME", help="follow one writer, e.g. L5H3, L2.mlp or embed")
    ] = None,
    centred: Annotated[
        bool, typer.Option("--centred", help="leave out what a writer writes equally at every token")
    ] = False,
    top: o.Top = 20,
) -> Answer:
    """Measure how long a component's output persists in the stream, and which later components remove it."""
    writer = None if writer is None else session.stream.groups.writer(writer)
    questions = [vw.PersistenceSummary(centred), vw.Persistence(centred), vw.ErasedBy(centred)]
    summary, projection, shares = session.survey.answers(questions)
    if writer is not None:
        rows = list(summary.select("writer", [writer]).rows())
        along = list(projection.select("writer", [writer]).rows())
        removed = sorted(_shares(shares, writer), key=lambda row: -abs(row["share"]))[:top]
        shown: list[Table | str] = [
            Table(f"persistence of what {writer} wrote · {session.name}", rows, _WRITER),
            Table("projection of the stream on what it wrote", along, ("state", "projection")),
        ]
        more = [Answer(projection, along)]
    else:
        rows = sorted(summary.rows(), key=lambda row: abs(float(row["final"] or 0)))[:top]
        removed = [s for row in rows for s in _shares(shares, str(row["writer"]))[:_ERASERS] if s["share"] < 0]
        shown = [Table(f"the {len(rows)} writers of which least is left at the end · {session.name}", rows, _WRITER)]
        more = []
    heads = {"writer": "writer", "eraser": "later writer", "share": "share"}
    shown.append(Table("later writers that remove it (negative share) or add to it", removed, heads))
    stamp = summary.stamp
    shown.append(f"mean over {stamp['tokens']} tokens of {session.run.text}, weighted by {stamp['weight']}")
    figures = {"writers": len(list(summary.rows())), "tokens": stamp["tokens"]}
    return Answer(summary, rows, figures, shown, [*more, Answer(shares, removed)])


@running_verb("text", "repeated", tokens=512, batch=2)
def frontier(session: Session, top: o.Top = 10) -> Answer:
    """Compare what the model erases with what would be best to erase, for every price of interference."""
    batch = session.options["batch"]
    prices, policy = session.survey.answers([vw.Frontier(batch=batch), vw.ErasurePolicy(batch=batch)])
    writers = list(policy.rows())
    most = [row for row in policy.top(top, "excess").rows() if _excess(row) > 0]
    least = sorted((row for row in writers if _excess(row) < 0), key=_excess)[:top]
    shown: list[Table | str] = [
        Table(f"value of erasing in nats, mean over units, by policy · {session.name}", list(prices.rows()), _PRICES)
    ]
    for word, rows in (("more", most), ("less", least)):
        shown.append(
            Table(
                f"writers of which the model erases {word} than the optimal policy at the median price", rows, _POLICY
            )
        )
    units, above = prices.stamp["units"], sum(_above(row) for row in prices.rows())
    shown.insert(
        1, f"the model agrees with the optimal policy above chance at {above} of {len(list(prices.rows()))} prices"
    )
    shown.append(f"{units} units, each what one writer wrote at one token, on {session.run.text}")
    return Answer(prices, None, {"units": units, "above_chance": above}, shown, [Answer(policy, writers)])


def _excess(row: Mapping[str, Any]) -> float:
    """How much more of a writer the model erases than the policy."""
    return float(row["excess"] or 0)


def _above(row: Mapping[str, Any]) -> bool:
    """Whether the model's erasers agree with the policy better than chance."""
    return row["agreement"] is not None and row["chance"] is not None and row["agreement"] > row["chance"]


def _counts(record: vw.Record) -> dict[str, dict[str, int]]:
    """How many erasers of each kind have each verdict."""
    counts: dict[str, dict[str, int]] = {kind.value: dict.fromkeys(_VERDICTS, 0) for kind in EraserKind}
    for row in record.rows():
        counts[str(row["kind"])][str(row["verdict"] or "never")] += 1
    return counts


def _most(record: vw.Record, kind: EraserKind, verdict: str, top: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [r for r in record.rows() if (r["kind"], r["verdict"]) == (kind.value, verdict)]
    if verdict == "unconditional":
        rows.sort(key=lambda row: (-row["erased"], abs(row["mean"] - 1)))
    elif verdict == "overshoots":
        rows.sort(key=lambda row: -row["overshot"])
    else:
        rows.sort(key=lambda row: -(row["bimodality"] or 0))
    return rows[:top]


def _shares(record: vw.Record, writer: str) -> list[dict[str, Any]]:
    """What every later writer adds, most negative first."""
    rows: list[dict[str, Any]] = list(record.select("writer", [writer]).rows())
    return sorted(rows, key=lambda row: row["share"])
