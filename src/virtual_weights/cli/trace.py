"""``vweights trace``: one prompt taken apart, writer by writer."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from virtual_weights.cli import options as o
from virtual_weights.cli.opening import open_model
from virtual_weights.cli.progress import steps
from virtual_weights.cli.show import line, put_json, table
from virtual_weights.cli.tokens import prompt_tokens
from virtual_weights.errors import UsageError
from virtual_weights.record import Record
from virtual_weights.runtime import load
from virtual_weights.runtime.trace import lens, passage, trace


def trace_prompt(
    model: o.ModelArgument,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT", help="the text; or --ids")] = None,
    ids: Annotated[str | None, typer.Option("--ids", metavar="IDS", help="token ids instead, e.g. 3,17,5")] = None,
    reader: Annotated[
        str, typer.Option("--reader", metavar="NAME", help="e.g. L17H3.K, L5N7.up; unembed is the likeliest logit")
    ] = "unembed",
    token: Annotated[int, typer.Option("--token", help="which token of the prompt; -1 is the last")] = -1,
    logit: Annotated[int | None, typer.Option("--logit", metavar="ID", help="whose logit; the likeliest")] = None,
    against: Annotated[int | None, typer.Option("--against", metavar="ID", help="less the logit of this one")] = None,
    show_lens: Annotated[bool, typer.Option("--lens", help="what every state of the stream would say instead")] = False,
    top: o.Top = 20,
    dtype: Annotated[o.StoredDtype, typer.Option("--dtype", help="of the run")] = o.StoredDtype.float32,
    device: o.Device = "cpu",
    offline: o.Offline = False,
    as_json: o.AsJson = False,
    progress: o.ProgressOption = o.ProgressMode.auto,
) -> None:
    """What each writer puts on a reader, or on a logit, at one token of a prompt; or the logit lens."""
    if (prompt is None) == (ids is None):
        raise UsageError("no prompt, or two", expected="PROMPT or --ids", do="give one of both")
    with steps(progress) as step:
        stream = open_model(model, step("open"), offline=offline)
        step("run")
        tokens = prompt_tokens(stream, prompt, ids)
        if not -len(tokens) <= token < len(tokens):
            raise UsageError(f"no token {token}", expected=f"a place in {len(tokens)} tokens", do="correct --token")
        run = passage(stream, tokens, load(stream, dtype=dtype.torch, device=device))
        at = token % len(tokens)
        if show_lens:
            record = lens(run, min(top, 5), at)
        else:
            if reader == "unembed" and logit is None:
                logit = int(run.logits[at].argmax())
            record = trace(run, reader, logit, against)
            record = record.select("token", [str(at)])
    texts = stream.source.token_texts()
    names = [f"{i} {texts[i]!r}" if texts else str(i) for i in tokens.tolist()]
    rows = _lens_rows(record, texts) if show_lens else _rows(record, top)
    told: dict[str, Any] = {"model": model, "tokens": names, "token": at, "reader": None if show_lens else reader}
    told |= {"rows": rows, "parameters": record.parameters, "error": record.stamp.get("error")}
    if as_json:
        put_json(told)
        return
    what = "logit lens" if show_lens else reader if logit is None else f"the logit of {_named(logit, texts)}"
    heads = list(rows[0])
    table(f"{what} at token {at} ({names[at]}) · {model}", heads, [[row[name] for name in heads] for row in rows])
    if not show_lens:
        line(f"all writers together miss what the model computes by {record.stamp['error']:.1g} of it")


def _rows(record: Record, top: int) -> list[dict[str, Any]]:
    """The writers with the largest share, either way."""
    rows = [{name: value for name, value in row.items() if name != "token"} for row in record.rows()]
    return sorted(rows, key=lambda row: -abs(row["share"] or 0.0))[:top]  # type: ignore[arg-type, operator]


def _lens_rows(record: Record, texts: tuple[str, ...] | None) -> list[dict[str, Any]]:
    rows = [{name: value for name, value in row.items() if name != "row"} for row in record.rows()]
    return [{**row, "text": texts[int(str(row["token"]))] if texts else None} for row in rows]


def _named(token: int, texts: tuple[str, ...] | None) -> str:
    return f"{token} {texts[token]!r}" if texts else str(token)
