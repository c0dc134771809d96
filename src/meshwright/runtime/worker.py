"""The process that holds the ranks: `python -m meshwright.runtime.worker FOLDER`, started by `ranks`.

It imports PyTorch once, then forks the ranks of one order after the other, each order with a rendezvous of its own, and
watches them. A rank that dies ends the others and is named in `failure.json`. Whoever waits for this process can kill
its whole process group; should that one vanish, the system ends this process and its ranks.
"""

from __future__ import annotations

import ctypes
import json
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from meshwright.runtime.ranks import Order

#: Seconds that the other ranks get to say why they died before the first guess is believed.
GRACE_S = 2.0


def main(folder: Path) -> int:
    """Carry out the orders that lie pickled in `folder`; results and logs go to a folder per order."""
    _die_with_parent()
    orders: list[Order] = pickle.loads((folder / "orders.pickle").read_bytes())
    for index, order in enumerate(orders):
        place = folder / str(index)
        place.mkdir()
        failure = run_ranks(order, place)
        if failure is not None:
            (folder / "failure.json").write_text(json.dumps({"order": index, **failure}))
            return 1
    return 0


def run_ranks(order: Order, place: Path) -> dict[str, object] | None:
    """Fork all ranks of an order and wait for them; what went wrong, or None."""
    threads = max(1, len(os.sched_getaffinity(0)) // order.size)

    def rank_main(rank: int) -> None:
        torch.set_num_threads(threads)
        store = dist.FileStore(str(place / "rendezvous"), order.size)
        timeout = timedelta(seconds=order.timeout_s)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=order.size, timeout=timeout)
        result = order.work(rank, order.size)
        (place / f"{rank}.pickle").write_bytes(pickle.dumps(result))
        dist.barrier()  # without it some ranks abort: peers are still reading when the first closes its connections
        dist.destroy_process_group()

    ranks = {_fork(partial(rank_main, rank), place / f"{rank}.log"): rank for rank in range(order.size)}
    return _watch(ranks, place)


def _fork(work: Callable[[], None], log: Path) -> int:
    """A child that does `work`, writes what it prints to `log`, and never returns here."""
    parent = os.getpid()
    if child := os.fork():
        return child
    status = 1
    try:
        _die_with_parent()
        if os.getppid() == parent:
            handle = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
            os.dup2(handle, 1)
            os.dup2(handle, 2)
            work()
            status = 0
    except BaseException:  # a forked child must not unwind into its parent's code: say what happened and go
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(ranks: dict[int, int], place: Path) -> dict[str, object] | None:
    """Wait until all ranks have ended; after the first death the others get a moment, then a signal."""
    running, ends = dict(ranks), {}
    deadline_s = float("inf")
    while running:
        child, status = os.waitpid(-1, os.WNOHANG if deadline_s < float("inf") else 0)
        if child in running:
            ends[running.pop(child)] = os.waitstatus_to_exitcode(status)
            if any(ends.values()) and deadline_s == float("inf"):
                deadline_s = time.monotonic() + GRACE_S
        elif time.monotonic() > deadline_s:
            for other in running:
                os.kill(other, signal.SIGKILL)
                os.waitpid(other, 0)
            running.clear()
        else:
            time.sleep(0.02)
    dead = [(rank, code, _last_line(place / f"{rank}.log")) for rank, code in ends.items() if code]
    if not dead:
        return None
    # The first to die is the cause, but for those that only saw a peer vanish.
    rank, code, line = min(dead, key=lambda one: _is_bystander(one[1], one[2]))
    cause = f"ended by signal {signal.Signals(-code).name}" if code < 0 else line
    return {"rank": rank, "cause": cause}


def _is_bystander(code: int, line: str) -> bool:
    return code > 0 and ("onnection" in line or "gloo" in line)


def _last_line(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.exists() else []
    return lines[-1].strip() if lines else "ended without a word"


def _die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends; elsewhere ranks end at their next collective."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
