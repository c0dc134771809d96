"""How fast Meshwright is, beside the committed baseline.

Machines differ and are shared, so each figure is CPU seconds (user and system, children included) over those of a
reference of fixed work in the same run: compare ratios. `python benchmarks/run.py --update` writes the baseline.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

BASELINE = Path(__file__).with_name("baseline.json")
REPEATS = 3

PLAN_405B = ["plan", "llama-3.1-405b", "dgx-h100x2048", "--global-batch", "2048", "--seq-len", "8192", "--json"]
ESTIMATE = ["estimate", "llama-3-70b", "dgx-h100x8", "tp=8,pp=2,dp=4,zero=1,sp=1", "--global-batch", "256",
            "--seq-len", "8192", "--json"]  # fmt: skip
PLAN_CALCULON = ["plan", "gpt3-175b", "dgx-a100x128", "--space", "calculon", "--global-batch", "1536",
                 "--seq-len", "2048", "--json"]  # fmt: skip
SIMULATE_405B = ["simulate", "llama-3.1-405b", "dgx-h100x2048", "tp=8,pp=16,dp=128,zero=1,sp=1", "--global-batch",
                 "16384", "--seq-len", "8192", "--json"]  # fmt: skip
SIMULATE_70B = ["simulate", "llama-3-70b", "dgx-h100x128", "tp=8,pp=8,dp=16,zero=1,sp=1", "--global-batch", "512",
                "--seq-len", "8192", "--detail", "operator", "--unfold", "--json"]  # fmt: skip
ROOT = Path(__file__).parent.parent
VALIDATE = ["validate", str(ROOT / "data" / "measured_runs.csv"), "--json"]
PLACE_BLOCK = ["plan", "architectures:llama70b_block", "dgx-h100x32", "--global-batch", "32", "--json"]
PLACE_70B = ["plan", "architectures:llama70b", "dgx-h100x32", "--global-batch", "64", "--json"]
LAYERWISE = ["plan", "llama-2-7b", "dgx-a100x1", "--global-batch", "64", "--seq-len", "4096", "--method", "layerwise",
             "--json"]  # fmt: skip
COMMANDS = {
    "help": ["--help"],
    "estimate": ESTIMATE,
    "plan 405B on 16,384 GPUs": PLAN_405B,
    "plan 175B, Calculon's space": PLAN_CALCULON,
    "simulate 405B, 16,384 GPUs folded": SIMULATE_405B,
    "simulate 70B, 1,024 GPUs unfolded": SIMULATE_70B,
    "validate 2,637 runs": VALIDATE,
    "place a 70B block, traced, 32 x 8": PLACE_BLOCK,
    "place 80 layers of 70B, traced": PLACE_70B,
    "place 7B layer by layer, 8 GPUs": LAYERWISE,
}


def reference() -> None:
    """Work like ours: a loop of Python over small NumPy columns, then a sort."""
    rng = np.random.default_rng(0)
    column = rng.random(20_000)
    for step in range(2_000):
        column = np.maximum(column * 1.0001, column.mean() + step % 7 * 1e-9)
    np.sort(rng.random(2_000_000))


def cpu_seconds(command: list[str]) -> tuple[float, float, str]:
    """CPU seconds, wall seconds and output of a process."""
    before, started = os.times(), time.perf_counter()
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "examples" / "models")}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    wall, after = time.perf_counter() - started, os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return cpu, wall, done.stdout


def measure() -> dict[str, dict[str, float]]:
    """Median figures of every command."""
    references = []
    figures: dict[str, dict[str, float]] = {}
    for _ in range(REPEATS):
        started = time.process_time()
        reference()
        references.append(time.process_time() - started)
    unit = statistics.median(references)
    for name, arguments in COMMANDS.items():
        runs = [cpu_seconds([sys.executable, "-m", "meshwright", *arguments]) for _ in range(REPEATS)]
        figures[name] = {
            "cpu_s": statistics.median(run[0] for run in runs),
            "wall_s": statistics.median(run[1] for run in runs),
            "cpu_over_reference": statistics.median(run[0] for run in runs) / unit,
        }
        if name.startswith("simulate"):
            results = [json.loads(run[2]) for run in runs]
            figures[name]["num_tasks"] = results[0]["num_tasks"]
            figures[name]["tasks_per_cpu_s"] = statistics.median(found["tasks_per_s"] for found in results)
        if name.startswith("place"):
            results = [json.loads(run[2]) for run in runs]
            figures[name]["method_cpu_s"] = statistics.median(found["cpu_s"] for found in results)
            figures[name]["gap"] = results[0]["certificate"]["gap"]
        if name.startswith("plan"):
            results = [json.loads(run[2]) for run in runs]
            figures[name]["num_strategies"] = results[0]["space"]["num_strategies"]
            figures[name]["strategies_per_cpu_s"] = statistics.median(found["strategies_per_s"] for found in results)
    return figures


def main() -> None:
    """Print the figures beside the baseline's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the baseline")
    update = parser.parse_args().update
    figures = measure()
    baseline = json.loads(BASELINE.read_text()) if BASELINE.exists() else {}
    print(f"{'':36}{'CPU s':>8}{'wall s':>8}{'CPU / reference':>17}{'baseline':>10}")
    for name, found in figures.items():
        before = baseline.get(name, {}).get("cpu_over_reference", float("nan"))
        print(f"{name:36}{found['cpu_s']:8.2f}{found['wall_s']:8.2f}{found['cpu_over_reference']:17.2f}{before:10.2f}")
        if "tasks_per_cpu_s" in found:
            print(f"{'':4}{found['num_tasks']:,.0f} tasks, {found['tasks_per_cpu_s']:,.0f} a CPU-second of simulating")
        if "method_cpu_s" in found:
            print(f"{'':4}{found['method_cpu_s']:.2f} CPU-s from the graph to the answer, gap {found['gap']:.1e}")
        if "strategies_per_cpu_s" in found:
            rate = found["strategies_per_cpu_s"]
            print(
                f"{'':4}{found['num_strategies']:,.0f} strategies, {rate:,.0f} a CPU-second of deriving and composing"
            )
    if update:
        BASELINE.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
