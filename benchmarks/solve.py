"""The contest's instances within the contest's time, beside the best of its teams.

`python benchmarks/solve.py [--repeats 3] [--only AB] [--folder ../shared/data/iopddl]`: each run is a command of its
own with a seed of its own. Cost and bound are over the best team's cost (8 cores; here the machine's). On a machine
that is busy with other things, compare the CPU seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

#: Seconds allowed and the best team's cost [spec: the results of the ASPLOS/EuroSys 2025 contest].
INSTANCES = {
    "A": (60, 6548641531),
    "B": (60, 532843),
    "G": (120, 217039),
    "M": (180, 49928460991),
    "S": (240, 1534613444),
}
FOLDER = Path(__file__).resolve().parents[2] / "shared" / "data" / "iopddl"


def measure(path: Path, limit_s: float, seed: int) -> dict[str, float]:
    """One run of the command: its JSON with wall and CPU seconds and its peak memory."""
    words = ["solve", str(path), "--time-limit", str(limit_s), "--seed", str(seed), "--json"]
    started = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "meshwright", *words], stdout=subprocess.PIPE)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    wall_s = time.monotonic() - started
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"{path.name}: exit status {os.waitstatus_to_exitcode(status)}: {out.decode()[:500]}")
    found: dict[str, float] = json.loads(out)
    return {**found, "wall_s": wall_s, "cpu_s": used.ru_utime + used.ru_stime, "peak_bytes": used.ru_maxrss * 1024}


def main() -> None:
    """Print a line a run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--only", default="".join(INSTANCES), help="letters of instances")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    parser.add_argument("--share", type=float, default=1.0, help="of the contest's time")
    asked = parser.parse_args()
    print(
        f"{'':2}{'seed':>5}{'cost':>14}{'/ best team':>13}{'lower bound':>14}{'gap %':>9}{'wall s':>8}{'limit':>7}"
        f"{'CPU s':>8}{'GiB':>6}"
    )
    for name in asked.only:
        limit_s, best = INSTANCES[name]
        for seed in range(asked.repeats):
            row = measure(asked.folder / f"{name}.json.gz", limit_s * asked.share, seed)
            print(
                f"{name:2}{seed:5}{row['cost']:14}{row['cost'] / best:13.7f}{row['lower_bound']:14.0f}"
                f"{100 * row['gap']:9.4f}{row['wall_s']:8.1f}{limit_s * asked.share:7.0f}{row['cpu_s']:8.1f}"
                f"{row['peak_bytes'] / 2**30:6.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
