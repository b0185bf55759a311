"""``vweights trace``: one prompt taken apart, writer by writer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import prompt_tokens, token_named
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.flow.route import route
from virtual_weights.runtime.flow.trace import Passage, lens, passage, trace

_Pair = tuple[int | None, int | None]
Token = Annotated[
    str | None, typer.Option("--token", metavar="TOKEN", help="whose logit, ' Paris' or an id; the likeliest's")
]
Against = Annotated[str | None, typer.Option("--against", metavar="TOKEN", help="less the logit of this one")]
Through = Annotated[
    str | None,
    typer.Option("--through", metavar="PART", help="what L17H3, L17.mlp or L17N5 tells the logit, and from whom"),
]
Position = Annotated[int, typer.Option("--position", help="at which token of the prompt; -1 is the last")]


def trace_prompt(
    model: o.ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="the text; or --ids")] = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="IDS", help="token ids instead, e.g. 3,17,5")] = None,
    reader: Annotated[
        str, typer.Option("--reader", metavar="NAME", help="e.g. L17H3.K, L5N7.up; unembed is a token's logit")
    ] = "unembed",
    token: Token = None,
    against: Against = None,
    through: Through = None,
    position: Position = -1,
    show_lens: Annotated[bool, typer.Option("--lens", help="what every state of the stream would say instead")] = False,
    top: o.Top = 20,
    dtype: Annotated[o.StoredDtype, typer.Option("--dtype", help="of the run")] = o.StoredDtype.float32,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """What each writer puts on a reader or a logit at one token of a prompt, or tells through one part; the lens."""
    if (prompt is None) == (ids is None):
        raise UsageError("no prompt, or two", expected="PROMPT or --ids", do="give one of both")
    if (through is not None and show_lens) or (reader != "unembed" and (through or token or against)):
        raise UsageError(
            "--lens with --through, or a token of a reader that is not the unembedding",
            expected="--token, --against and --through with --reader unembed alone",
            do="leave one out",
        )
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        step("run")
        tokens = prompt_tokens(stream, prompt, ids)
        if not -len(tokens) <= position < len(tokens):
            raise UsageError(
                f"no token {position}", expected=f"a place in {len(tokens)} tokens", do="correct --position"
            )
        at, other = position % len(tokens), None if against is None else token_named(stream, against)
        own = None if token is None else token_named(stream, token)
        runs = load(stream, dtype=dtype.torch, device=device)
        run = passage(stream, tokens, runs, patterns=through is not None)
        own = int(run.logits[at].argmax()) if own is None and reader == "unembed" and not show_lens else own
        record = lens(run, min(top, 5), at) if show_lens else _taken_apart(run, reader, through, (own, other), at)
    texts = stream.source.token_texts()
    names = [_named(i, texts) for i in tokens.tolist()]
    rows = _lens_rows(record, texts) if show_lens else _rows(record, top, names)
    told: dict[str, Any] = {"model": model, "tokens": names, "token": at, "reader": None if show_lens else reader}
    told |= {"rows": rows, "parameters": record.parameters, "error": record.stamp.get("error")}
    told |= {"direct": record.stamp["direct"]} if through else {}
    if as_json:
        put_json(told)
        return
    logit = reader if own is None else f"the logit of {_named(own, texts)}"
    logit += "" if other is None else f" less that of {_named(other, texts)}"
    what = "logit lens" if show_lens else f"what {through} tells {logit}" if through else logit
    heads = list(rows[0])
    table(f"{what} at token {at} ({names[at]}) · {model}", heads, [[row[name] for name in heads] for row in rows])
    if through:
        line(f"{through} adds {record.stamp['direct']:.4g}; all paths together miss it by {record.stamp['error']:.1g}")
    elif not show_lens:
        line(f"all writers together miss what the model computes by {record.stamp['error']:.1g} of it")


def _taken_apart(run: Passage, reader: str, through: str | None, tokens: _Pair, at: int) -> Record:
    if through is not None and tokens[0] is not None:
        return route(run, through, tokens[0], tokens[1], at)
    return trace(run, reader, *tokens).select("token", [str(at)])


def _rows(record: Record, top: int, names: list[str]) -> list[dict[str, Any]]:
    """The writers with the largest share, either way; of paths those of the largest contribution, with their token."""
    if record.question == "route":
        best = sorted(record.rows(), key=lambda row: -abs(float(row["logit"] or 0.0)))[:top]
        return [{**row, "text": names[int(str(row["token"]))]} for row in best]
    rows = [{name: value for name, value in row.items() if name != "token"} for row in record.rows()]
    return sorted(rows, key=lambda row: -abs(row["share"] or 0.0))[:top]  # type: ignore[arg-type, operator]


def _lens_rows(record: Record, texts: tuple[str, ...] | None) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name != "row"} for row in record.rows()]
    return [{**row, "text": texts[int(str(row["token"]))] if texts else None} for row in rows]


def _named(token: int, texts: tuple[str, ...] | None) -> str:
    return f"{token} {texts[token]!r}" if texts else str(token)
