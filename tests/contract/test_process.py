"""The command as a process: interrupted, cut off by its reader, in any encoding, with names that steer a terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from tiny_models import tiny

from virtual_weights.cli.app import run
from virtual_weights.cli.show import Table, line, put_json
from virtual_weights.errors import UsageError, printable

STEERING = (
    "\x1b[2J",
    "\x07",
    "\x9b31m",
    "\u202e",
    "\u2066",
    "\u2028",
    "\x7f",
    "\x00",
    "\r",
    "\x08",
    "\u200b",
    "\ufeff",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    tiny("llama-grouped-untied").save_pretrained(path)
    return path


def command(
    code: str, *arguments: object, output: int = subprocess.PIPE, **environment: str
) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some lines of Python."""
    script = f"import os, sys, signal\n{code}\nfrom virtual_weights.cli import main\nmain()"
    line, variables = [sys.executable, "-c", script, *map(str, arguments)], {**os.environ, **environment}
    encoding = environment.get("PYTHONIOENCODING", "utf-8").partition(":")[0]
    return subprocess.run(
        line, stdout=output, stderr=subprocess.PIPE, encoding=encoding, timeout=120, check=False, env=variables
    )


AT_IMPORT = """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {name!r}:
            sys.meta_path.remove(self)
            try:
                os.kill(os.getpid(), signal.SIGINT)
                while True: pass
            except BaseException:
                {then}
sys.meta_path.insert(0, Finder())
"""


@pytest.mark.parametrize("name", ["virtual_weights.cli.app", "typer", "rich.table", "torch"])
def test_an_interruption_while_something_is_imported_is_130(model: Path, tmp_path: Path, name: str) -> None:
    code = AT_IMPORT.format(name=name, then="raise")
    done = command(code, "map", model, "-o", tmp_path / "atlas", "--only", "bandwidth")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


SWALLOWED = """
def swallow(_):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        while True: pass
    except BaseException:
        raise RuntimeError("something else")
from virtual_weights import cli
cli.run = swallow
"""


@pytest.mark.parametrize(
    "code", [SWALLOWED, AT_IMPORT.format(name="typer", then="raise ImportError('cannot import typer')")]
)
def test_an_interruption_that_is_turned_into_something_else_is_130(code: str) -> None:
    done = command(code, "--help")
    assert (done.returncode, done.stderr) == (130, "")


def test_an_interruption_in_a_finaliser_ends_the_process() -> None:
    code = "class A:\n def __del__(self): os.kill(os.getpid(), signal.SIGINT); [0 for i in range(10**6)]\n"
    code += "from virtual_weights import cli\ncli.run = lambda _: [A() and None, print('went on')]"
    done = command(code)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_who_wants_no_interruption_has_none() -> None:
    code = "signal.signal(signal.SIGINT, signal.SIG_IGN)\nfrom virtual_weights import cli\n"
    code += "cli.run = lambda _: os.kill(os.getpid(), signal.SIGINT) or 0"
    assert command(code).returncode == 0


PRINTS = "from virtual_weights.cli import app\napp.app = lambda **_: {what}\n"  # in place of a verb, which loads torch


@pytest.mark.parametrize("what", ["print('x' * 10**6)", "app.app_(**_)", "print('x')"])
def test_a_reader_who_has_gone_is_no_error(what: str) -> None:
    read, write = os.pipe()
    os.close(read)
    code = "from virtual_weights.cli import app\napp.app_ = app.app\n" + PRINTS.format(what=what)
    done = command(code, "map", "--help", output=write)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_complaint_that_nobody_reads_keeps_its_exit_code() -> None:
    read, write = os.pipe()
    os.close(read)
    line = [sys.executable, "-m", "virtual_weights.cli", "nothing"]
    assert subprocess.run(line, stdout=write, stderr=write, timeout=120, check=False).returncode == 2
    os.close(write)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
@pytest.mark.parametrize("what", ["print('x' * 10**6)", "print('x')"])
def test_an_output_without_room_is_5(what: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = command(PRINTS.format(what=what), output=full.fileno())
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    assert "cannot be written" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252", "utf-16", "ascii:strict"])
def test_any_encoding_takes_the_answer(encoding: str) -> None:
    code = "from virtual_weights.cli import show\n"
    code += PRINTS.format(what="show.Table('a · b', [{'token': 'é ─ 中', 'n': 1.5}]).show()")
    done = command(code, PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1.5" in done.stdout


def test_closed_streams_are_no_error() -> None:
    for verb, code in (("--help", 0), ("nothing", 2)):
        script = f'exec "{sys.executable}" -m virtual_weights.cli {verb} >&- 2>&-'
        assert subprocess.run(["sh", "-c", script], timeout=120, check=False).returncode == code


# -- what steers a terminal


@pytest.mark.parametrize("steering", STEERING, ids=ascii)
def test_what_steers_a_terminal_is_escaped(steering: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = f"a{steering}b"
    Table(text, [{"token": text, "n": 1, text: [text, 1.5]}]).show(Console(width=300))
    line(text)
    put_json({"model": text, "rows": [{text: text}]})
    out = capsys.readouterr().out
    assert all(c.isprintable() or c == "\n" for c in out)
    assert json.loads(out.splitlines()[-1])["model"] == text
    error = UsageError(text, expected=text, do=text)
    assert all(c.isprintable() or c == "\n" for c in str(error) + error.what)
    assert printable(text) == f"a{steering.encode('unicode_escape').decode()}b"


def test_what_steers_nothing_stays(capsys: pytest.CaptureFixture[str]) -> None:
    line("é 中文 🙂 ‖x‖ · ─")
    assert capsys.readouterr().out == "é 中文 🙂 ‖x‖ · ─\n"
    assert str(UsageError("one\ntwo", expected="x", do="y")).startswith("one\ntwo\n")


@pytest.mark.parametrize(
    "arguments", [["no\x1b[2J"], ["composition", "no\x1b[2J"], ["edges", "no\u202e"], ["bandwidth", "m", "--x\x1b[2J"]]
)
def test_messages_about_what_was_typed_are_escaped(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(arguments) in (2, 3)
    said = capsys.readouterr().err
    assert all(c.isprintable() or c == "\n" for c in said)
    assert "no" in said or "--x" in said


# -- places


@pytest.mark.parametrize("place", ["/dev/null", "/dev/null/x", "{long}", "pipe"])
def test_where_nothing_can_be_written_is_said_before_the_work(
    model: Path, tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    monkeypatch.setattr("virtual_weights.cli.verb.Session.stream", property(lambda _: pytest.fail("opened")))
    path = place.format(long="x" * 300)
    for arguments in (["map", model, "-o", path], ["composition", model, "--save", path]):
        assert run([str(a) for a in arguments]) == 2
        assert Path(path).name[:20] in capsys.readouterr().err


@pytest.mark.parametrize("device", ["cuda:99", "mps:7", "nonsense", "meta", "", "cuda:-1", "xla"])
def test_a_device_that_is_not_there_is_named(model: Path, device: str, capsys: pytest.CaptureFixture[str]) -> None:
    for verb in (["composition", str(model), "--port", "K"], ["map", str(model)], ["observe", str(model), "-o", "x"]):
        assert run([*verb, "--device", device]) == 2
        assert repr(device) in capsys.readouterr().err


def test_a_refusal_of_the_system_that_nobody_foresaw_is_3(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise PermissionError(13, "Permission denied", "the file")

    monkeypatch.setattr("virtual_weights.cli.verb.Session.stream", property(refuse))
    assert run(["bandwidth", str(model)]) == 3
    assert "the file" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
