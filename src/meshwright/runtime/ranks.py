"""Do something on several ranks: start the processes, wait for them, give back what each returned or say who died.

All ranks are children of one worker process in a session of its own, so that whatever happens here - an error, Ctrl-C,
a timeout - ends them all. Processes talk over the loopback interface alone; the rendezvous is a file in a fresh folder.
"""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meshwright.errors import MeshwrightError


class RunError(MeshwrightError):
    """A run died: which rank, and its last words."""


@dataclass(frozen=True)
class Order:
    """`work(rank, size)` on `size` ranks of one process group; a rank waits `timeout_s` for another. Must pickle."""

    work: Callable[[int, int], Any]
    size: int
    timeout_s: float = 120.0


def on_ranks(size: int, work: Callable[[int, int], Any], timeout_s: float = 120.0) -> list[Any]:
    """What `work(rank, size)` returned on each of `size` ranks. Raises `RunError` where one died."""
    with tempfile.TemporaryDirectory(prefix="meshwright-") as folder:
        return carry_out_orders([Order(work, size, timeout_s)], Path(folder))[0]


def carry_out_orders(orders: Sequence[Order], folder: Path) -> list[list[Any]]:
    """Results of all orders, by rank, carried out one after the other; `folder` is scratch for them, fresh and ours."""
    (folder / "orders.pickle").write_bytes(pickle.dumps(list(orders)))
    _work(folder, orders)
    return [
        [pickle.loads((folder / str(index) / f"{rank}.pickle").read_bytes()) for rank in range(order.size)]
        for index, order in enumerate(orders)
    ]


def _work(folder: Path, orders: Sequence[Order]) -> None:
    paths = os.pathsep.join(path for path in sys.path if path)
    loopback = "lo" if sys.platform == "linux" else "lo0"
    # Threads that wait for one another must not spin: on a machine with other work a step took 40 times as long.
    environment = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": loopback, "OMP_WAIT_POLICY": "PASSIVE"}
    with (folder / "worker.log").open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "meshwright.runtime.worker", str(folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = worker.wait()
        finally:
            _end(worker)
    if code == 0:
        return
    failure = folder / "failure.json"
    if not failure.exists():
        lines = (folder / "worker.log").read_text(errors="replace").strip().splitlines() or ["no word"]
        raise RunError(f"the run's worker process ended with status {code}: {lines[-1]}")
    found = json.loads(failure.read_text())
    raise RunError(f"rank {found['rank']} of {orders[found['order']].size} died: {found['cause']}")


def _end(worker: subprocess.Popen[bytes]) -> None:
    """Kill the worker's session, ranks included; after a run that ended well there is nobody left to kill."""
    try:
        os.killpg(worker.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    finally:
        worker.wait()
