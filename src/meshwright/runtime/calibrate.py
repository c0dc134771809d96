"""This machine as a cluster: what its processes compute, move and say to one another, measured in seconds.

Each of the processes gets its share of the cores and measures while the others do the same, as in a run. What is
measured is what software gets, not what a data sheet says, so no efficiency has to be taken off.
"""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F

from meshwright.cluster import Cluster, Device, DeviceGroup, Level, LinkKind, Quantity
from meshwright.errors import InputError, Problem
from meshwright.runtime.ranks import on_ranks
from meshwright.runtime.refuse import MAX_PROCESSES

MATMUL_SIZE = 768
COPY_BYTES = 64 * 2**20
REDUCE_BYTES = 8 * 2**20
ENOUGH_S = 0.25


def calibrate_local(num_processes: int = 2) -> Cluster:
    """A cluster of `num_processes` ranks on this machine, every number measured, in under 20 seconds.

    Matrix products of 768 x 768 per type, copies of 64 MiB, all-reduces of 8 MiB (bandwidth) and of one number
    (latency; one message is half of an all-reduce between two). Raises `InputError` for a number of processes that
    cannot run.
    """
    if not 1 <= num_processes <= MAX_PROCESSES:
        nearest = str(min(max(num_processes, 1), MAX_PROCESSES))
        raise InputError([Problem("--nproc", str(num_processes), f"must be 1 to {MAX_PROCESSES}", nearest)])
    found = on_ranks(num_processes, measure)
    cores = len(os.sched_getaffinity(0))
    threads = max(1, cores // num_processes)
    here = f"{platform.machine()}, {num_processes} ranks x {threads} threads, {cores} cores, torch {torch.__version__}"

    def slowest(name: str, what: str) -> Quantity:
        return Quantity(min(rank[name] for rank in found), f"[measured] {what}; {here}")

    flops = {
        dtype: slowest(dtype, f"{dtype} matrix product of {MATMUL_SIZE}, median")
        for dtype in ("float64", "float32", "bfloat16")
    }
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / num_processes
    device = Device(
        name="local-cpu",
        peak_flops=flops,
        memory_bytes=Quantity(memory_bytes, f"[measured] this machine's memory over {num_processes}"),
        memory_bandwidth_Bps=slowest("copy_Bps", "copy of 64 MiB, bytes read and written, median"),
        host_launch_s=Quantity(max(rank["launch_s"] for rank in found), f"[measured] addition of one number; {here}"),
        efficiency={
            "matmul": Quantity(1.0, "[derived] the peaks of this file are measured products"),
            "attention": slowest("attention", "fused attention of 8 heads x 512 tokens over the float32 product"),
            "memory": Quantity(1.0, "[derived] the bandwidth of this file is a measured copy"),
        },
    )
    if num_processes > 1:
        bandwidth = slowest("link_Bps", "Gloo all-reduce of 8 MiB, bytes sent per rank")
        latency_s = max(rank["latency_s"] for rank in found)
        latency = Quantity(latency_s, f"[measured] half a Gloo all-reduce of one number; {here}")
    else:  # a cluster has at least one level; over one rank nothing is sent
        bandwidth = Quantity(device.memory_bandwidth_Bps.value, "[derived] the copy bandwidth: one rank has no link")
        latency = Quantity(0.0, "[derived] one rank has no link")
    level = Level("gloo-loopback", num_processes, bandwidth, latency, LinkKind.SHARED_MEMORY)
    return Cluster("local-cpu", (DeviceGroup(device, num_processes),), (level,))


def measure(rank: int, size: int) -> dict[str, float]:
    """What one rank gets, all ranks measuring together; FLOP/s by type, B/s and seconds."""
    found = {}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE).to(dtype)
        found[str(dtype).removeprefix("torch.")] = 2 * MATMUL_SIZE**3 / _median_s(partial(torch.matmul, a, b))
    q, k, v = torch.randn(3, 1, 8, 512, 64)
    square = 2 * 2 * 8 * 512**2 * 64  # two products with the full square, as `graph.operator_flops` counts
    attention_s = _median_s(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
    found["attention"] = min(1.0, square / attention_s / found["float32"])
    source, target = torch.ones(2, COPY_BYTES, dtype=torch.uint8)
    found["copy_Bps"] = 2 * COPY_BYTES / _median_s(lambda: target.copy_(source))
    one = torch.ones(1)
    found["launch_s"] = _median_s(lambda: one + one)
    if size > 1:
        payload, number = torch.ones(REDUCE_BYTES, dtype=torch.uint8), torch.ones(1)
        reduce_s = _median_s(lambda: dist.all_reduce(payload), together=True)
        found["link_Bps"] = 2 * (size - 1) / size * REDUCE_BYTES / reduce_s
        found["latency_s"] = _median_s(lambda: dist.all_reduce(number), together=True) / 2
    return found


def _median_s(work: Callable[[], object], together: bool = False) -> float:
    """Median seconds of `work`, repeated until enough was seen: as often as the clock says, or, where ranks must do it
    equally often, 20 times."""
    if dist.is_initialized():
        dist.barrier()
    work()
    times_s: list[float] = []
    begin_s = time.perf_counter()
    while len(times_s) < 5 or (len(times_s) < 20 if together else time.perf_counter() - begin_s < ENOUGH_S):
        start_s = time.perf_counter()
        work()
        times_s.append(time.perf_counter() - start_s)
    return sorted(times_s)[len(times_s) // 2]
