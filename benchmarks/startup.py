"""How long help takes beside importing torch: ``python benchmarks/startup.py``. Both in turn, each in a new process."""

import statistics
import subprocess
import sys
import time

COMMANDS = {
    "import torch": ["-c", "import torch"],
    "vweights --version": ["-m", "virtual_weights.cli", "--version"],
    "vweights --help": ["-m", "virtual_weights.cli", "--help"],
    "vweights map --help": ["-m", "virtual_weights.cli", "map", "--help"],
}


def seconds(arguments: list[str]) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
    return time.perf_counter() - began


rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 10
times = {name: [] for name in COMMANDS}
for name in [*COMMANDS, *list(COMMANDS) * rounds]:
    times[name].append(seconds(COMMANDS[name]))
median = {name: statistics.median(values[1:]) for name, values in times.items()}
for name, values in times.items():
    spread = f"{min(values[1:]):.3f} to {max(values[1:]):.3f}"
    print(f"{name:20} {median[name]:.3f} s ({spread}), {median[name] / median['import torch']:.2f} of import torch")
