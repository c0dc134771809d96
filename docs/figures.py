"""Draw the pictures of `docs/simulator.md` as pages and, where Chromium is there, as PNG files beside this one.

python docs/figures.py [FOLDER]      (the pages go to FOLDER, else to a temporary one)
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from meshwright.report.simulation import schedule_panel
from meshwright.report.timeline import timeline_figure
from meshwright.schedule import actions, replay
from meshwright.schedule.times import parse_times

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


def main() -> None:
    """Draw all."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp())
    draw_schedules(folder / "1f1b-zbv.html")
    stragglers, growth = folder / "stragglers.html", folder / "growth.html"
    subprocess.run([sys.executable, "-m", "meshwright", *shlex.split(STRAGGLERS), str(stragglers)], check=True)
    benchmark = Path(__file__).parent.parent / "benchmarks" / "simulator.py"
    subprocess.run([sys.executable, str(benchmark), "--figure", str(growth)], check=True)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    for page in (folder / "1f1b-zbv.html", stragglers, growth):
        if browser:
            picture = Path(__file__).with_name(f"{page.stem}.png")
            flags = ["--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,520"]
            subprocess.run([browser, *flags, f"--screenshot={picture}", str(page)], check=True, capture_output=True)
        print(page)


if __name__ == "__main__":
    main()
