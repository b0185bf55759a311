"""Composition scores: TransformerLens's and ours as whole processes, on the same weights, in one run.

    python benchmarks/composition.py --peer-python PATH --markdown results.md

Every figure is measured in this run. ``process`` is wall time of the whole process, imports and loading included;
``compute`` is timed inside: the peer's ``all_composition_scores`` on a loaded model, our ``Composition`` on weights
that are in memory too; ``kernel`` is our all-pairs product alone, best of three.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
COMMAND = [sys.executable, "-m", "virtual_weights.cli"]


def gpt2_shape(folder: Path) -> None:
    """GPT-2 small's shape (12 layers of 12 heads, d 768) with random weights and a vocabulary of 1,000."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=1000, bos_token_id=0, eos_token_id=0)).save_pretrained(folder)


def smollm2(folder: Path) -> None:
    """The built-in SmolLM2-135M, dequantised to float32 by transformers' own GGUF reader."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from virtual_weights.checkpoint import locate

    path = locate("smollm2-135m")
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    del read.config.quantization_config  # dequantised by now, but transformers would refuse to save it
    plain = AutoModelForCausalLM.from_config(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name).save_pretrained(folder)  # the peer insists on one


MODELS = {"gpt2-shape": gpt2_shape, "smollm2": smollm2}


def process(command: list[str], limit: float) -> dict[str, Any]:
    """Run a process; wall seconds, peak memory in MB, exit code, and what it printed on its last line."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(command, stdout=out, stderr=err)
        while True:
            pid, status, usage = os.wait4(child.pid, os.WNOHANG)
            if pid:
                break
            if time.perf_counter() - began > limit:
                child.kill()
            time.sleep(0.005)
        child.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        lines, complaint = out.read().decode().strip().splitlines(), err.read().decode()[-2000:]
    figures = {"process": wall, "peak_mb": usage.ru_maxrss / 1024, "code": child.returncode}
    if child.returncode == 0:
        return figures | {k: v for k, v in json.loads(lines[-1]).items() if k != "edges"}
    return figures | {"complaint": complaint}


def matrix_rate(dtype: torch.dtype, size: int = 2048) -> float:
    """The machine's own rate of a square matrix product, flops a second, median of seven."""
    a, b = torch.randn(size, size, dtype=dtype), torch.randn(size, size, dtype=dtype)
    times = []
    for _ in range(8):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * size**3 / statistics.median(times[1:])


def compare(name: str, folder: Path, port: str, options: argparse.Namespace) -> dict[str, Any]:
    """One model and port: both sides, their ratios, and how far the results are apart."""
    with tempfile.TemporaryDirectory() as scratch:
        mine, peers = Path(scratch) / "ours.pt", Path(scratch) / "peer.pt"
        whole = ["composition", str(folder), "--port", port, "--no-fold", "--json"]
        command_line = [process(COMMAND + whole, options.limit) for _ in range(options.runs)]
        ours = process([sys.executable, str(HERE / "ours.py"), str(folder), port, str(mine)], options.limit)
        peer = process([options.peer_python, str(HERE / "peer.py"), str(folder), port, str(peers)], options.limit)
        row: dict[str, Any] = {"model": name, "port": port, "ours": ours, "peer": peer}
        row["command_line"] = {
            key: statistics.median(run[key] for run in command_line) for key in ("process", "peak_mb", "code")
        }
        if ours["code"] == 0 and peer["code"] == 0:
            a, b = torch.load(mine), torch.load(peers).double()
            reach = ~torch.isnan(a)
            row["largest_difference"] = float((a - b)[reach].abs().max())
            row["compute_ratio"] = peer["compute"] / ours["compute"]
            row["process_ratio"] = peer["process"] / row["command_line"]["process"]
            row["memory_ratio"] = peer["peak_mb"] / row["command_line"]["peak_mb"]
        if ours["code"] == 0:
            row["times_the_matrix_rate"] = ours["kernel"] / (ours["flops"] / options.rate)
        print(json.dumps(row), flush=True)
        return row


def markdown(rows: list[dict[str, Any]], rates: dict[str, float]) -> str:
    """The results as the section of the documentation page."""

    def figure(value: float | None, digits: int = 2) -> str:
        return "–" if value is None else f"{value:,.{digits}f}"

    cpu = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    text = [
        f"Measured {datetime.date.today()} on {cpu}, {os.cpu_count()} cores, {total:.0f} GiB, Python "
        f"{platform.python_version()}, torch {torch.__version__}. The machine is shared: read ratios, not seconds. Its "
        f"own matrix product runs at {rates['float32'] / 1e9:.0f} GF/s in float32 and "
        f"{rates['float64'] / 1e9:.0f} GF/s in float64.",
        "",
        "| model | port | peer compute s | ours s | ratio | peer process s | ours s | ratio | peer MB | ours MB "
        "| ratio | kernel s | × matrix rate | largest difference |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        ours, peer, line = row["ours"], row["peer"], row["command_line"]
        died = f"died ({peer['code']}) after {peer['process']:.0f} s" if peer["code"] else None
        cells = [
            died or figure(peer["compute"]),
            figure(ours.get("compute")),
            figure(row.get("compute_ratio"), 0),
            died or figure(peer["process"], 1),
            figure(line["process"], 1),
            figure(row.get("process_ratio"), 1),
            figure(peer["peak_mb"], 0),
            figure(line["peak_mb"], 0),
            figure(row.get("memory_ratio"), 1),
            figure(ours.get("kernel")),
            figure(row.get("times_the_matrix_rate")),
            f"{row['largest_difference']:.1e}" if "largest_difference" in row else "–",
        ]
        text.append(f"| {row['model']} | {row['port']} | " + " | ".join(cells) + " |")
    return "\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[*MODELS, "all"], default="all")
    parser.add_argument("--ports", default="Q,K,V")
    parser.add_argument("--peer-python", default=sys.executable, help="an interpreter that has transformer-lens")
    parser.add_argument("--runs", type=int, default=3, help="runs of our command line; the median counts")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which a process is ended")
    parser.add_argument("--markdown", type=Path, help="write the results as a table here")
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help="only write the model there")
    options = parser.parse_args()
    if options.make:
        MODELS[options.make[0]](Path(options.make[1]))
        return
    rates = {name: matrix_rate(getattr(torch, name)) for name in ("float32", "float64")}
    options.rate = rates["float32"]
    print(json.dumps({"matrix_rate": rates}), flush=True)
    rows = []
    for name in MODELS if options.model == "all" else [options.model]:
        with tempfile.TemporaryDirectory() as folder:
            # in a process of its own: a child's peak memory counts its parent's at the moment of the fork
            subprocess.run([sys.executable, __file__, "--make", name, folder], check=True)
            rows += [compare(name, Path(folder), port, options) for port in options.ports.split(",")]
    if options.markdown:
        options.markdown.write_text(markdown(rows, rates))


if __name__ == "__main__":
    main()
