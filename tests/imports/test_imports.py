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
    return set(process.stdout.split())


def test_import_loads_nothing_that_only_some_uses_need():
    assert loaded_after("import virtual_weights").isdisjoint({"torch", *HEAVY})
    loaded = loaded_after("import virtual_weights as vw; [getattr(vw, name) for name in vw.__all__]")
    assert "torch" in loaded
    assert loaded.isdisjoint(HEAVY), sorted(loaded.intersection(HEAVY))


def test_the_store_loads_its_database_only_when_asked():
    assert "duckdb" not in loaded_after("import virtual_weights.atlas, virtual_weights.record.parquet")
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
