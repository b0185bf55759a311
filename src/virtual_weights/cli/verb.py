"""What all verbs share: options of opening a model and of running it, one refusal each, and how an answer is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, final

import typer

import virtual_weights as vw
from virtual_weights.cli import options as o
from virtual_weights.cli.show import Answer, steps
from virtual_weights.errors import UsageError
from virtual_weights.progress import Progress, Step

if TYPE_CHECKING:
    from virtual_weights.stream import Question

_OPENING: dict[str, tuple[Any, Any]] = {
    "no_fold": (o.NoFold, False),
    "partial": (o.Partial, False),
    "offline": (o.Offline, False),
    "allow_non_finite": (o.AllowNonFinite, False),
    "ignore_config": (o.IgnoreConfig, None),
    "table": (o.OwnTable, None),
    "attach": (o.Attach, None),
}
_RUNNING: dict[str, tuple[Any, Any]] = {
    "text": (o.Text, None),
    "repeated": (o.Repeated, False),
    "prompt": (o.Prompt, None),
    "prompt_ids": (o.PromptIds, None),
    "tokens": (o.Tokens, 4096),
    "length": (o.Length, 256),
    "batch": (o.Batch, 4),
    "seed": (o.Seed, 0),
    "dtype": (o.RunDtype, o.StoredDtype.float32),
    "device": (o.Device, "cpu"),
    "bos": (o.Bos, None),
}
_GIVEN: dict[str, tuple[Any, Any]] = {"json": (o.AsJson, False), "progress": (o.Progress, o.ProgressMode.auto)}
_BY_NAME = inspect.Parameter.KEYWORD_ONLY
_KINDS_OF_TEXT = {"text": "--text", "repeated": "--repeated", "prompt": "--prompt", "prompt_ids": "--prompt-ids"}


@final
@dataclass(frozen=True, eq=False)
class Session:
    """One command line: the model that it names, opened when first touched, and the run that it describes.

    Attributes:
        name: the model, as it was named.
        step: begins a step of the progress.
        options: values of the shared options.
    """

    name: str
    step: Step
    options: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @cached_property
    def stream(self) -> vw.Stream:
        """The model's stream."""
        from virtual_weights.architecture import without_keys
        from virtual_weights.checkpoint import open_source
        from virtual_weights.stream import open_stream
        from virtual_weights.stream.build import read_tables

        progress: Progress = self.step("open")
        offline, non_finite = (bool(self.options.get(name)) for name in ("offline", "allow_non_finite"))
        source = open_source(self.name, offline=offline, allow_non_finite=non_finite, progress=progress)
        table = self.options.get("table")
        tables = None if table is None else read_tables(table)
        config = without_keys(source.config, source.dialect, self.options.get("ignore_config") or (), tables)
        fold, partial = not self.options.get("no_fold"), bool(self.options.get("partial"))
        attach = self.options.get("attach") or ()
        return open_stream(source, fold=fold, partial=partial, config=config, table=table, attach=attach)

    @property
    def runs(self) -> bool:
        """Whether one of --text, --repeated, --prompt and --prompt-ids is given."""
        return any(self.options.get(name) not in (None, False) for name in _KINDS_OF_TEXT)

    @property
    def how(self) -> dict[str, Any]:
        """How the model runs: batch, dtype and device, as ``Run`` takes them."""
        options = self.options
        return {"batch": options["batch"], "dtype": options["dtype"].torch, "device": options["device"]}

    @cached_property
    def run(self) -> vw.Run:
        """The model on the text that the options name; on the default text where they name none."""
        options, bos, how = self.options, self.options["bos"], self.how
        if options["prompt"] is not None or options["prompt_ids"] is not None:
            prompt = options["prompt"]
            return vw.Run.on_prompt(
                self.stream, whole_numbers(options["prompt_ids"]) if prompt is None else prompt, bos, **how
            )
        size = options["tokens"], options["length"]
        if options["repeated"]:
            return vw.Run.on_repeats(self.stream, *size, options["seed"], **how)
        return vw.Run.on_text(self.stream, options["text"], *size, bos, **how)

    @cached_property
    def survey(self) -> vw.Survey:
        """What answers questions about the model, and about the run where the verb has one."""
        return vw.Survey(self.stream, None, self.run if "tokens" in self.options else None, self.step)

    def ask(self, question: Question[Any]) -> vw.Record:
        """The answer to a question."""
        return self.survey.ask(question)

    def token(self, name: str) -> int:
        """One token by its id, or by its text: ``" Paris"`` with the space before it.

        Raises:
            UsageError: the vocabulary has no such token.
        """
        if name.isdecimal():
            return int(vw.Run.on_prompt(self.stream, [int(name)]).chunks[0])  # refuses an id that is not there
        texts = self.stream.source.token_texts()
        if texts is None or name not in texts:
            raise UsageError(
                f"no token {name!r}" if texts else f"the checkpoint has no tokenizer to look {name!r} up in",
                expected="one token's text, its space included, or its id",
                do=f"try {' ' + name!r}" if texts and f" {name}" in texts else "pass a token id",
            )
        return texts.index(name)

    def named(self, token: int) -> str:
        """A token's text with its id, or the id alone where it has no text."""
        from virtual_weights.checkpoint import text_of

        text = text_of(self.stream.source.token_texts(), token)
        return str(token) if text is None else f"{text!r} (id {token})"


def verb(*opening: str) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """Make a command from a function of a session and of its own options, with the shared options and the output.

    Args:
        opening: which of the options for opening a model it has: ``no_fold``, ``partial``, ``offline``,
            ``allow_non_finite``.
    """
    return _command({name: _OPENING[name] for name in (*opening, "ignore_config", "table", "attach")})


def running_verb(
    *kinds: str, always: bool = True, opening: Sequence[str] = (), **defaults: Any
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    """The same for a verb that runs the model, with the options that say on which tokens.

    Args:
        kinds: which kinds of text it takes: ``text``, ``repeated``, ``prompt``; by default all. It has no options that
            mean nothing for the only kind that it takes.
        always: whether it always runs the model, or only where a text is named.
        opening: which of the options for opening a model it has beside ``offline`` and ``ignore_config``.
        defaults: of its options, such as ``tokens=16384``.
    """
    wanted = kinds or ("text", "repeated", "prompt")
    fixed: dict[str, Any] = dict.fromkeys(n for n in _KINDS_OF_TEXT if n.partition("_")[0] not in wanted)
    if wanted == ("repeated",):
        fixed |= {"repeated": True, "bos": None}
    if wanted == ("prompt",):  # one chunk, with nothing random in it
        fixed |= {name: _RUNNING[name][1] for name in ("tokens", "length", "batch", "seed")}
    shared = {name: (kind, defaults.get(name, value)) for name, (kind, value) in _RUNNING.items() if name not in fixed}
    return _command(
        {**shared, **{name: _OPENING[name] for name in (*opening, "offline", "ignore_config", "table", "attach")}},
        fixed,
        always,
    )


def need_runtime(session: Session) -> None:
    """Refuse to begin what will run a model where the packages for it are not installed.

    Raises:
        UsageError: tokenizers is missing, or transformers, where the model is not one that runs without it.
    """
    missing = [name for name in ("transformers", "tokenizers") if find_spec(name) is None]
    if missing == ["transformers"] and session.stream.model.hf.values["runs"] == "here":
        return
    if missing:
        raise UsageError(
            f"this runs the model, and {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed",
            expected="the packages of the extra 'runtime'",
            do="pip install -c constraints.txt '.[runtime]' in a clone of this project",
        )


def figure(value: float | None, digits: int) -> str:
    """A figure within a sentence; a ratio to what is zero is undefined."""
    return "undefined" if value is None else f"{value:.{digits}g}"


def whole_numbers(text: str) -> list[int]:
    """``"3,17,5"`` as numbers.

    Raises:
        UsageError: it is something else.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise UsageError(f"token ids {text}", expected="whole numbers such as 3,17,5", do="correct them") from None


def _command(
    shared: Mapping[str, tuple[Any, Any]], fixed: Mapping[str, Any] | None = None, runs: bool = False
) -> Callable[[Callable[..., Answer]], Callable[..., None]]:
    def decorate(function: Callable[..., Answer]) -> Callable[..., None]:
        own = list(inspect.signature(function, eval_str=True).parameters.values())[1:]
        takes_context = any(parameter.name == "context" for parameter in own)
        fixed_first = {"context": typer.Context, "model": o.Model}
        parameters = [inspect.Parameter(n, _BY_NAME, annotation=kind) for n, kind in fixed_first.items()]
        parameters += [parameter.replace(kind=_BY_NAME) for parameter in own if parameter.name != "context"]
        parameters += [
            inspect.Parameter(name, _BY_NAME, annotation=annotation, default=default)
            for name, (annotation, default) in {**shared, **_GIVEN}.items()
        ]

        def command(context: typer.Context, model: str, json: bool, progress: o.ProgressMode, **values: Any) -> None:
            options = {**(fixed or {}), **{name: values.pop(name) for name in shared}}
            _check_text(context, options, runs)
            if takes_context:
                values["context"] = context
            with steps(progress) as step:
                session = Session(model, step, options)
                if runs or session.runs:
                    need_runtime(session)
                answer = function(session, **values)
                if json:
                    session.stream.source.identify(step("fingerprint"))
            answer.give(model, json)

        command.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        command.__name__, command.__doc__ = function.__name__, function.__doc__
        return command

    return decorate


def _check_text(context: typer.Context, options: Mapping[str, Any], always: bool) -> None:
    """Refuse more than one kind of text, options of a text where there is none, and a run without its packages."""
    kinds = [flag for name, flag in _KINDS_OF_TEXT.items() if options.get(name) not in (None, False)]
    if len(kinds) > 1:
        raise UsageError(
            f"more than one kind of text: {' and '.join(kinds)}",
            expected="one of --text, --repeated, --prompt and --prompt-ids",
            do="choose one of them",
        )
    if not (always or kinds) and "tokens" in options:
        o.refuse_unused(context, "without a text to run on", "tokens", "length", "batch", "dtype", "bos")
    if kinds and kinds[0].startswith("--prompt"):
        o.refuse_unused(context, f"with {kinds[0]}", "tokens", "length")
    if kinds in (["--repeated"], ["--prompt-ids"]):
        o.refuse_unused(context, f"with {kinds[0]}", "bos")
