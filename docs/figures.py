"""Draw the pictures of `simulator.md` and `operators.md` as pages and, where Chromium is, as PNG files beside this one.

python docs/figures.py [FOLDER]      (the pages go to FOLDER, else to a temporary one)
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import meshwright.search.pipelines
import meshwright.search.placing  # noqa: F401  (methods register themselves)
from meshwright.cost.layouts import machine_of
from meshwright.cost.placed import moved
from meshwright.io.inputs import make_workload, read_cluster, read_engine
from meshwright.io.torch_graph import traced_function
from meshwright.report.panels import panels_of
from meshwright.report.placement import placement_figure
from meshwright.report.simulation import schedule_panel
from meshwright.report.timeline import timeline_figure
from meshwright.schedule import actions, replay
from meshwright.schedule.times import parse_times
from meshwright.search.choose.solver import within
from meshwright.search.graph_method import GRAPH_METHODS, GraphQuestion

STRAGGLERS = (
    "simulate llama-3-70b dgx-h100x8 tp=8,pp=4,dp=2,zero=1,sp=1 --global-batch 64 --seq-len 8192 --detail stage "
    "--stragglers"
)


def draw_schedules(path: Path) -> None:
    """1F1B above ZB-V: four ranks, eight microbatches, work of one forward of a rank = 2."""
    panels = []
    for name, num_virtual, times in (("1F1B", 1, "F=2,I=2,W=2"), ("ZBVZeroBubble", 2, "")):
        num_stages = 4 * num_virtual
        table = actions(name, 4, num_virtual, 8)
        panels.append(schedule_panel(name, replay(table, parse_times(times).of(num_stages), num_stages)))
    timeline_figure(panels, path, unit="", command="python docs/figures.py")


#: Six methods for one block, by what they are called here, and what GSPMD's user says: where activations lie, and how
#: two products are split.
SIX = ("operators", "tensoropt", "flexflow", "double_recursive", "gspmd", "fsdp")
ANNOTATIONS = {
    "model/layers.0.norm1.rms_norm.out": {"x": "batch"},
    "model/layers.0.attention.q.linear": {"x": "batch", "y": "kv_heads"},
    "model/layers.0.gate.linear": {"x": "batch", "y": "d28672"},
}


def draw_placements(path: Path) -> None:
    """One block of Llama-3-70B, 32 sequences of 8,192 tokens on 32 nodes of 8 H100, placed by six methods."""
    sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "models"))
    graph = traced_function("architectures:llama70b_block").graph
    cluster, workload = read_cluster("dgx-h100x32"), make_workload(32, 1, "bfloat16")
    engine = read_engine(None, cluster)
    machine = machine_of(cluster, engine, workload)
    panels = []
    for name in SIX:
        annotations = ANNOTATIONS if name == "gspmd" else {}
        question = GraphQuestion(graph, cluster, engine, workload, annotations=annotations, deadline=within(60))
        answer = GRAPH_METHODS[name](question)
        best = answer.found[0]
        print(f"{name}: {best.estimate.step_time_s * 1e3:.3f} ms, {answer.cpu_s:.2f} CPU-s, gap {answer.gap:.2%}")
        step = moved(graph, best.strategy, machine, workload)
        panels += panels_of(graph, best.strategy, workload, title=name, step=step)
    title = "One block of Llama-3-70B on 32 x 8 H100, placed by six methods"
    placement_figure(panels, path, title=title, command="python docs/figures.py")


def main() -> None:
    """Draw all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    draw_schedules(folder / "1f1b-zbv.html")
    placements = folder / "placements.html"
    draw_placements(placements)
    stragglers, growth = folder / "stragglers.html", folder / "growth.html"
    subprocess.run([sys.executable, "-m", "meshwright", *shlex.split(STRAGGLERS), str(stragglers)], check=True)
    benchmark = Path(__file__).parent.parent / "benchmarks" / "simulator.py"
    subprocess.run([sys.executable, str(benchmark), "--figure", str(growth)], check=True)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    for page, size in (
        (folder / "1f1b-zbv.html", "1200,520"),
        (placements, "1600,1150"),
        (stragglers, "1200,520"),
        (growth, "1200,520"),
    ):
        if browser:
            picture = Path(__file__).with_name(f"{page.stem}.png")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--window-size={size}"]
            subprocess.run([browser, *flags, f"--screenshot={picture}", str(page)], check=True, capture_output=True)
        print(page)


if __name__ == "__main__":
    main()
