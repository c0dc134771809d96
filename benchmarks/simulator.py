"""How fast the simulator is from 10^4 to 10^7 tasks: CPU seconds of building the task graph and of running it, memory.

`python benchmarks/simulator.py` prints a line a size, each in a process of its own, with seconds over those of the
reference of `run.py`: machines differ. `--figure FILE.html` draws the cost of a task over their number.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

from run import reference

#: Llama-3-70B operator by operator, all devices unfolded: (nodes of 8 H100, degrees, sequences of a step).
SIZES = {
    "10^4": (1, "pp=8", 4),
    "10^5": (1, "pp=8", 16),
    "10^6": (8, "tp=8,pp=8,sp=1,zero=1", 32),
    "10^7": (128, "tp=8,pp=8,dp=16,sp=1,zero=1", 512),
}
REPEATS = 3


def measure(size: str) -> dict[str, float]:
    """CPU seconds of the parts of one simulation, the best of some repeats, once the engine is compiled."""
    from meshwright import sweep
    from meshwright.cluster import preset_cluster
    from meshwright.cost.analytic import Case
    from meshwright.engine import load_engine
    from meshwright.io.models import load_model
    from meshwright.sim.build import build
    from meshwright.sim.program import Detail
    from meshwright.sim.step import graph_of, run
    from meshwright.strategy import legal_strategy, parse_shorthand
    from meshwright.workload import Workload

    sweep.COMPILE_FROM = 0  # small graphs go through the same code uncompiled, which would hide what a task costs
    nodes, text, batch = SIZES[size]
    graph, cluster, workload = load_model("llama-3-70b"), preset_cluster(f"dgx-h100x{nodes}"), Workload(batch, 8192)
    strategy = legal_strategy(parse_shorthand(text), graph, cluster.num_devices, workload)
    case = Case(graph, cluster, strategy, workload, load_engine("megatron-core"))
    found: dict[str, list[float]] = {"build_s": [], "graph_s": [], "run_s": []}
    for repeat in range(REPEATS + 1):
        marks = [time.process_time()]
        built = build(case, Detail.OPERATOR)
        marks.append(time.process_time())
        tasks = graph_of(built, unfold=True)
        marks.append(time.process_time())
        run(built, tasks)
        marks.append(time.process_time())
        if repeat:  # the first compiles, or loads what was compiled
            for name, start, stop in zip(found, marks, marks[1:], strict=False):
                found[name].append(stop - start)
    times = {name: min(values) for name, values in found.items()}
    return {
        "num_devices": cluster.num_devices,
        "num_tasks": tasks.num_tasks,
        **times,
        "tasks_per_s": tasks.num_tasks / sum(times.values()),
        "engine_tasks_per_s": tasks.num_tasks / times["run_s"],
        "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def draw(rows: list[dict[str, float]], path: str) -> None:
    """Nanoseconds of a task over the number of tasks."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for name, keys in (("graph and run", ("build_s", "graph_s", "run_s")), ("run alone", ("run_s",))):
        figure.add_trace(
            go.Scatter(
                x=[row["num_tasks"] for row in rows],
                y=[1e9 * sum(row[key] for key in keys) / row["num_tasks"] for row in rows],
                name=name,
                mode="lines+markers",
            )
        )
    figure.update_layout(
        title="Cost of a simulated task (operators of Llama-3-70B, all devices unfolded, one core)",
        xaxis={"type": "log", "title": "tasks", "gridcolor": "#e5e5e5"},
        yaxis={"title": "CPU nanoseconds a task", "rangemode": "tozero", "gridcolor": "#e5e5e5"},
        template="simple_white",
        height=460,
    )
    figure.write_html(path, include_plotlyjs=True, default_height="460px")


def main() -> None:
    """Print a line a size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--figure", metavar="FILE.html", default="")
    parser.add_argument("--size", choices=SIZES, help="measure one size and print JSON")
    asked = parser.parse_args()
    if asked.size:
        print(json.dumps(measure(asked.size)))
        return
    started = time.process_time()
    reference()
    unit = time.process_time() - started
    print(f"{'tasks':>12}{'devices':>9}{'build s':>9}{'graph s':>9}{'run s':>8}{'all/ref':>9}{'tasks/s':>13}"
          f"{'run tasks/s':>14}{'GiB':>7}")  # fmt: skip
    rows = []
    for size in SIZES:
        command = [sys.executable, __file__, "--size", size]
        row = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        rows.append(row)
        spent = row["build_s"] + row["graph_s"] + row["run_s"]
        print(
            f"{row['num_tasks']:12,.0f}{row['num_devices']:9,.0f}{row['build_s']:9.3f}{row['graph_s']:9.3f}"
            f"{row['run_s']:8.3f}{spent / unit:9.2f}{row['tasks_per_s']:13,.0f}{row['engine_tasks_per_s']:14,.0f}"
            f"{row['max_rss_bytes'] / 2**30:7.2f}",
            flush=True,
        )
    if asked.figure:
        draw(rows, asked.figure)


if __name__ == "__main__":
    main()
