"""Every named broken or hostile checkpoint gives its typed error in three parts, at once and unharmed."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from contract.hostile import CASES, Case, gguf_bytes, info, safetensors_bytes, sharded, single, text

from virtual_weights.checkpoint import open_source
from virtual_weights.errors import UnsafeCheckpointError, VirtualWeightsError


def open_and_read(case: Case) -> None:
    source = open_source(case.reference, offline=True)
    assert case.read is not None, "opening should have failed"
    source.read(case.read)


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name](tmp_path)
    begin = time.perf_counter()
    with pytest.raises(VirtualWeightsError) as caught:
        open_and_read(case)
    duration = time.perf_counter() - begin

    error = caught.value
    assert type(error) is case.error
    assert error.exit_code == (4 if case.error is UnsafeCheckpointError else 3)
    assert case.says in error.what
    assert error.expected
    assert error.do
    message = str(error)
    assert message.count("\n  expected: ") == message.count("\n  to do: ") == 1
    assert all(line.isprintable() for line in message.split("\n")), "the message could steer a terminal"
    assert len(message) < 3000
    assert duration < 2
    assert not (tmp_path / "code-was-run").exists()


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 30


def test_the_makers_make_sound_checkpoints_where_nothing_is_broken(tmp_path: Path) -> None:
    """Else the cases above might be refused for another reason than the one they are named after."""
    header = {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    one, several = tmp_path / "one", tmp_path / "several"
    one.mkdir()
    several.mkdir()
    assert open_source(single(one, safetensors_bytes(header, bytes(8)))).read("w").tolist() == [0.0, 0.0]
    whole = open_source(sharded(several, {"w": "a.safetensors", "v": "b.safetensors"}, a=["w"], b=["v"]))
    assert set(whole.tensors) == {"w", "v"}
    (tmp_path / "m.gguf").write_bytes(
        gguf_bytes((info("w"), info("v", offset=32)), (text("a") + b"\4\0\0\0" + bytes(4),), 64)
    )
    source = open_source(tmp_path / "m.gguf")
    assert source.config == {"a": 0}
    assert source.read("v").tolist() == [0.0] * 4


def test_non_finite_values_pass_when_allowed(tmp_path: Path) -> None:
    for name in ("value-nan", "value-infinite", "value-nan-float8", "gguf-value-infinite"):
        (tmp_path / name).mkdir()
        case = CASES[name](tmp_path / name)
        assert not open_source(case.reference, allow_non_finite=True).read("w").float().isfinite().all()


def test_no_pickle_can_be_opened_by_any_code_path() -> None:
    """torch.load, pickle and the library loaders that wrap them occur nowhere in the package's checkpoint folder."""
    folder = Path(sys.modules["virtual_weights.checkpoint"].__file__ or "").parent
    code = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    assert not [
        word
        for word in ("import pickle", "torch.load", "np.load(", "numpy.load(", "joblib", "from_pretrained(")
        if word in code
    ]


def test_importing_the_folder_loads_nothing_heavy() -> None:
    code = "import sys, virtual_weights.checkpoint; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "virtual_weights.checkpoint" in loaded
    assert not {"gguf", "huggingface_hub", "tokenizers", "transformers", "safetensors"} & set(loaded)
