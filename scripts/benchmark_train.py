"""`scripts/benchmark train`: throughput and start-up against peers, in alternating runs, as a table and as JSON."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = {
    "ours": "ray_mnist, 2 workers",
    "bare_ddp": "bare DistributedDataParallel, 2 workers",
    "lightning_ddp": "Lightning's own DDPStrategy, 2 workers",
    "ray_pattern": "Ray Train with Lightning as documented, 2 workers",
    "ours_alone": "ray_mnist, one process",
    "lightning_alone": "Lightning's Trainer, one process",
}
PEERS = {"bare_ddp": "ours", "lightning_ddp": "ours", "ray_pattern": "ours", "lightning_alone": "ours_alone"}
Run = dict[str, float]
LIMIT_S = 3600  # for one contender; five epochs of MNIST take a minute


def options_of(arguments: Sequence[str]) -> argparse.Namespace:
    """What is measured; `--quick` only shows that it can be."""
    parser = argparse.ArgumentParser(prog="scripts/benchmark train")
    parser.add_argument("--quick", action="store_true", help="everything once, on 1,797 digits: to see that it runs")
    parser.add_argument("--dataset", default="mnist")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[256, 64])
    options = parser.parse_args(arguments)
    if options.quick:
        options.dataset, options.epochs, options.runs, options.batch_sizes = "digits", 2, 1, [256]
    return options


def measure(name: str, batch_size: int, options: argparse.Namespace, workers: int = 2) -> Run:
    """One run of a contender, from its command to its exit."""
    with tempfile.TemporaryDirectory(prefix="ray_mnist-") as folder:
        job = {
            "dataset": options.dataset,
            "data_dir": str(Path(options.data_dir).absolute()),
            "epochs": options.epochs,
            "workers": workers,
            "batch_size": batch_size,
            "folder": folder,
            "file": f"{folder}/clock.json",
        }
        launcher = (
            ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"] if name.endswith("_ddp") else []
        )
        started, clock = time.time(), time.monotonic()
        done = subprocess.run(
            [sys.executable, *launcher, str(HERE / "benchmark_contenders.py"), name, json.dumps(job)],
            # One thread for each process, as a worker of ours has.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        total = time.monotonic() - clock
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stdout}\n{done.stderr}")
        seen = json.loads(Path(job["file"]).read_text())
    # The first epoch warms up.
    return {
        "samples_per_second": statistics.median(seen["rates"][1:]),
        "first_step": seen["first_step"] - started,
        "total": total,
    }


def spread(values: Sequence[float], digits: int = 0) -> str:
    """The median, and from where to where the values go."""
    low, middle, high = (f"{value:,.{digits}f}" for value in (min(values), statistics.median(values), max(values)))
    return middle if len(values) == 1 else f"{middle} ({low} to {high})"


def table(found: dict[str, list[Run]]) -> str:
    """In Markdown; a ratio compares runs that followed each other."""
    lines = [
        "| batch | | samples/s | ours / this | first step, s | total, s |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for key, runs in found.items():
        batch_size, name = key.split(" ")
        columns = {measured: [run[measured] for run in runs] for measured in runs[0]}
        ratio = ""
        if name in PEERS:
            mine = found[f"{batch_size} {PEERS[name]}"]
            pairs = zip(mine, runs, strict=True)
            ratio = spread([one["samples_per_second"] / other["samples_per_second"] for one, other in pairs], 2)
        cells = [batch_size, NAMES[name], spread(columns["samples_per_second"]), ratio]
        lines.append("| " + " | ".join([*cells, spread(columns["first_step"], 1), spread(columns["total"], 1)]) + " |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """Where and with what it was measured."""
    packages = ("torch", "pytorch-lightning", "ray")
    about = Path("/proc/cpuinfo")
    models = [line.partition(": ")[2] for line in about.read_text().splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cpus": os.cpu_count(),
        "system": platform.platform(terse=True),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def train(arguments: Sequence[str]) -> None:
    """Measures, and prints the table and the JSON."""
    options = options_of(arguments)
    found: dict[str, list[Run]] = {f"{size} {name}": [] for size in options.batch_sizes for name in NAMES}
    for _ in range(options.runs):
        for key, runs in found.items():
            size, name = key.split(" ")
            runs.append(measure(name, int(size), options))
            print(f"{key}: {runs[-1]['samples_per_second']:,.0f} samples/s", file=sys.stderr)
    where = machine()
    versions = ", ".join(f"{name} {number}" for name, number in where["versions"].items())
    print(f"{options.dataset}, {options.epochs} epochs, median of {options.runs} (least to most).", end=" ")
    print(f"{where['date']}: {where['cpus']} CPUs ({where['cpu']}), {where['system']}; {versions}.\n")
    print(table(found))
    print("\n" + json.dumps({"machine": where, "options": vars(options), "runs": found}))
