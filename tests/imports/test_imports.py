"""Importing the package does nothing and costs little."""

from __future__ import annotations

import subprocess
import sys

HEAVY = (
    "transformers",
    "transformer_lens",
    "duckdb",
    "gguf",
    "huggingface_hub",
    "tokenizers",
    "starlette",
    "dask",
    "typer",
    "matplotlib",
)


def loaded_after(statement: str) -> set[str]:
    """Top-level modules that a fresh interpreter holds after a statement."""
    script = f"import sys\n{statement}\nprint(*{{name.partition('.')[0] for name in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(process.stdout.splitlines()[-1].split())


def test_import_loads_nothing_that_only_some_uses_need():
    assert loaded_after("import virtual_weights").isdisjoint({"torch", *HEAVY})
    loaded = loaded_after("import virtual_weights as vw; [getattr(vw, name) for name in vw.__all__]")
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_help_and_version_load_no_torch():
    for arguments in (["--help"], ["--version"], ["map", "--help"], ["ablate", "--help"], ["model", "--help"]):
        loaded = loaded_after(f"from virtual_weights.cli import run; assert run({arguments}) == 0")
        assert "typer" in loaded
        assert loaded.isdisjoint({"torch", "numpy", *HEAVY} - {"typer"}), arguments


def test_the_store_loads_its_database_only_when_asked():
    assert "duckdb" not in loaded_after("import virtual_weights.atlas, virtual_weights.record.table")
    assert "duckdb" in loaded_after("import virtual_weights, duckdb")


def test_import_writes_nothing():
    process = subprocess.run(
        [sys.executable, "-W", "error", "-c", "import virtual_weights"], capture_output=True, check=True
    )
    assert process.stdout == process.stderr == b""


def test_the_version_is_said_once():
    import virtual_weights
    from virtual_weights.version import VERSION

    assert virtual_weights.__version__ == VERSION


def test_the_contents_list_every_question() -> None:
    import virtual_weights as vw
    from virtual_weights.stream import Question

    assert all(callable(getattr(vw, name)) for name in dir(vw))
    classes, rest = set[type](), [Question]
    while rest:
        rest += (below := set(rest.pop().__subclasses__()) - classes)
        classes |= below
    ours = {
        kind.__name__
        for kind in classes
        if kind.__module__.startswith("virtual_weights") and kind.__dict__.get("question")
    }
    assert len(ours) > 35
    assert ours <= set(dir(vw)), "a question that tab completion does not find"
    assert {"open", "map", "edges", "Atlas", "Run", "Survey", "Plan", "Record"} <= set(dir(vw))
