"""The Python of the pages runs as it stands and prints what they show; the exit codes are those of the command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import checks_of, run_blocks

ROOT = Path(__file__).parents[2]
PAGES = (
    "conventions.md",
    "python.md",
    "composition.md",
    "channels.md",
    "neurons.md",
    "bandwidth.md",
    "superposition.md",
    "memory.md",
    "flow.md",
    "persistence.md",
    "frontier.md",
    "erased.md",
    "basis.md",
    "linear.md",
    "ablation.md",
    "checkpoints.md",
    "interoperate.md",
    "graphs.md",
    "dictionaries.md",
    "add-an-architecture.md",
)


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_shows_is_so(name: str) -> None:
    assert run_blocks(ROOT / "docs" / name) >= 2


@pytest.mark.parametrize("page", sorted((ROOT / "docs").rglob("*.md")), ids=lambda page: page.stem)
def test_a_page_shows_what_its_code_prints(page: Path) -> None:
    """Every block of a page is followed by its output; assertions and what the tests import stay in the tests."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$(\n\n```text\n)?", text, re.MULTILINE | re.DOTALL)
    ours = {path.stem for path in (ROOT / "tests").glob("*.py")}
    for code, output in blocks:
        assert output, code
        assert "assert" not in code
        assert not ours.intersection(re.findall(r"^(?:from|import) (\w+)", code, re.MULTILINE))


@pytest.mark.real
def test_what_the_readme_shows_is_so() -> None:
    assert run_blocks(ROOT / "README.md") >= 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ('sequence["L1H4"] == (2, 3)', 'sequence["L1H4"] == (2, 2)'),
        ('side["L1H3"] == side["L1.mlp"] == (1, 2)', 'side["L1H3"] == side["L1.mlp"] == (2, 3)'),
        ("turn[0, 2], -one", "turn[0, 2], one"),
        ("stream.rotation(3).T @ head.k", "stream.rotation(3) @ head.k"),
        ('bare["L1H4.K"].dense() * bare.weight("norm", "L1.attn")', 'bare["L1H4.K"].dense()'),
        ("P @ unfolded.write(name)", "unfolded.write(name)"),
        ("gained - gained.mean(0)", "gained"),
        ("score[6:12, :6].isfinite()", "score[:6, 6:12].isfinite()"),
        ("svd.U @ svd.S.diag() @ svd.V.T", "svd.V @ svd.S.diag() @ svd.U.T"),
    ],
)
def test_a_wrong_convention_would_be_noticed(right: str, wrong: str) -> None:
    page, checks = ROOT / "docs" / "conventions.md", checks_of("conventions")
    text = checks.read_text(encoding="utf-8")
    assert text.count(right) == 1
    with pytest.raises(AssertionError) as failure:
        run_blocks(page, checks=text.replace(right, wrong))
    line = [entry.lineno for entry in failure.traceback if Path(str(entry.path)) == checks][-1]
    assert right in text.splitlines()[line], "another statement failed first"


def test_a_wrong_output_would_be_noticed() -> None:
    page = ROOT / "docs" / "bandwidth.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("[24, 48, 72]\n```") == 1
    with pytest.raises(AssertionError, match="what block 1 of bandwidth"):
        run_blocks(page, text.replace("[24, 48, 72]\n```", "[24, 48, 73]\n```"))


def test_the_command_ends_with_the_exit_codes_of_the_page(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from virtual_weights.cli import run

    page = (ROOT / "docs" / "conventions.md").read_text(encoding="utf-8")
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", page, re.MULTILINE)}
    assert codes == {0, 1, 2, 3, 4, 5, 130}
    pickled = tmp_path / "model.bin"
    pickled.write_bytes(b"\x80\x04.")
    cases: list[tuple[list[str], int]] = [
        (["--version"], 0),
        (["composition"], 2),
        (["composition", "nowhere", "--port", "Z"], 2),
        (["composition", "nowhere", "--no-such-option"], 2),
        (["composition", "nowhere", "--save", "matrix.csv"], 2),
        (["model", "fetch", "nothing-by-this-name", "--offline"], 2),
        (["channel", str(tmp_path / "nowhere"), "L0H0", "L1H0.K"], 3),
        (["composition", str(pickled)], 4),
    ]
    for arguments, code in cases:
        assert run(arguments) == code, arguments
        out, err = capfd.readouterr()
        assert (not out and bool(err)) or code == 0, arguments
