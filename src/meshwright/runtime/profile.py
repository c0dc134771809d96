"""Single operators of this machine, measured: the kernels that runs execute, at local sizes, forward and backward.

As many processes as a strategy has measure at once, each the same operator, since they share caches, memory and clock
in a run too. What is found goes into a file as it comes, so that nothing is measured twice, whatever happens.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from meshwright.errors import InputError, Problem
from meshwright.graph import Role
from meshwright.io.native import read, write
from meshwright.profile import Host, MeasuredOperator, OperatorKey, Profile
from meshwright.runtime.kernels import ACTIVATIONS, KERNELS, ROTARY_SCALINGS, Local, run_kernel
from meshwright.runtime.mesh import Mesh
from meshwright.runtime.ranks import on_ranks
from meshwright.runtime.refuse import MAX_PROCESSES
from meshwright.runtime.train import DTYPES
from meshwright.strategy import MeshAxis
from meshwright.units import MiB

T = TypeVar("T")

#: An operator is repeated for so long, and so often at least; of the seconds seen the median counts.
ENOUGH_S = 0.4
MIN_REPEATS = 5

#: What a run touches between two uses of a weight; more than caches hold.
OTHERS_BYTES = 64 * MiB

CALL_REPEATS = 200

#: What has been measured is handed over every so many seconds.
KEEP_EVERY_S = 2.0

#: Types of the operands that can be made here.
_TYPES = {**DTYPES, "int64": torch.int64}

Keep = Callable[[Profile], None]


def load_or_measure(
    path: str | Path, keys: Sequence[OperatorKey], num_processes: int, *, seed: int = 0, enough_s: float = ENOUGH_S
) -> Profile:
    """The profile in the file at `path`, with `keys` in it: what it lacks is measured and written there.

    The file is made where there is none, and rewritten whole every few seconds: what was measured before Ctrl-C stays.
    Keys without a kernel here are left out (see `measuring_problems`). Raises `InputError` where the file is of another
    machine, software or number of processes, or cannot be written; `RunError` where a process dies.
    """
    where = str(path)
    if where == "-":
        raise InputError([Problem("--profile", where, "is read and written: a file is expected", "profile.json")])
    here = Profile(host_here(num_processes), num_processes)
    known: Profile = read(path, "profile") if Path(path).exists() else here
    problems = _other_machine(where, known, here)
    if problems:
        raise InputError(problems)
    missing = [key for key in keys if key not in known.by_key and not measuring_problems(key)]
    if not missing:
        return known
    write(known, path)  # what cannot be written is said before minutes are spent
    return profile_operators(
        missing,
        num_processes=num_processes,
        seed=seed,
        known=known,
        enough_s=enough_s,
        keep=lambda profile: write(profile, path),
    )


def _other_machine(where: str, known: Profile, here: Profile) -> list[Problem]:
    """How a profile is not of this machine and this number of processes."""
    fix = "another file, or delete this one and measure again"
    problems = [
        Problem(f"{where}: host.{name}", str(was), f"here it is {now}: times of one say nothing of the other", fix)
        for name in (item.name for item in fields(Host) if item.name != "threads")
        for was, now in [(getattr(known.host, name), getattr(here.host, name))]
        if was != now
    ]
    if known.num_processes != here.num_processes:
        rule = f"{here.num_processes} processes run at once; a profile is of one number of them"
        problems.append(Problem(f"{where}: num_processes", str(known.num_processes), rule, fix))
    elif known.host.threads != here.host.threads and not problems:
        rule = f"here each process has {here.host.threads}"
        problems.append(Problem(f"{where}: host.threads", str(known.host.threads), rule, fix))
    return problems


def host_here(num_processes: int) -> Host:
    """This machine and software, shared by a number of processes."""
    cores = len(os.sched_getaffinity(0))
    return Host(
        cpu=_cpu_model(),
        cores=cores,
        threads=max(1, cores // num_processes),
        platform=f"{platform.system()} {platform.machine()}",
        torch=str(torch.__version__),
    )


def _cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measuring_problems(key: OperatorKey) -> list[Problem]:
    """Why an operator cannot be measured here; nothing where it can."""
    problems = []
    attributes = key.operator.attributes
    scaling, function = str(attributes.get("scaling", "")), str(attributes.get("function", "silu"))
    if key.kind not in KERNELS:
        problems.append(Problem("profile", str(key), f"operators that can be run: {', '.join(KERNELS)}"))
    if function not in ACTIVATIONS:
        problems.append(Problem("profile", str(key), f"activations that can be run: {', '.join(ACTIVATIONS)}"))
    if scaling and json.loads(scaling)["rope_type"] not in ROTARY_SCALINGS:
        problems.append(Problem("profile", str(key), f"rotary scalings that can be run: {', '.join(ROTARY_SCALINGS)}"))
    for dtype in dict.fromkeys(key.dtypes):
        if dtype not in _TYPES:
            problems.append(Problem("profile", f"{dtype} in {key}", f"types that can be run: {', '.join(_TYPES)}"))
    return problems


def profile_operators(
    keys: Sequence[OperatorKey],
    *,
    num_processes: int = 1,
    seed: int = 0,
    known: Profile | None = None,
    enough_s: float = ENOUGH_S,
    keep: Keep | None = None,
) -> Profile:
    """`known` and the operators that it lacks of `keys`, each measured once by `num_processes` at once.

    Seconds are the median of at least 5 repeats after one to warm up, over `enough_s` in all, of the slowest process.
    `keep` is called every few seconds with what is known so far, and once more however this ends. Raises `InputError`
    for operators that cannot be measured here, `RunError` where a process dies.
    """
    known = known or Profile(host_here(num_processes), num_processes)
    missing = tuple(key for key in dict.fromkeys(keys) if key not in known.by_key)
    problems = [problem for key in missing for problem in measuring_problems(key)]
    if not 1 <= num_processes <= MAX_PROCESSES:
        nearest = str(min(max(num_processes, 1), MAX_PROCESSES))
        problems.append(Problem("num_processes", str(num_processes), f"must be 1 to {MAX_PROCESSES}", nearest))
    if problems:
        raise InputError(problems)
    if not missing:
        return known
    with tempfile.TemporaryDirectory(prefix="meshwright-profile-") as folder:
        bench = Bench(missing, seed, enough_s, Path(folder))

        def so_far() -> Profile:
            return replace(known, operators=(*known.operators, *_seen(bench, num_processes)))

        with _kept(so_far, keep):
            on_ranks(num_processes, bench)
        return so_far()


@contextmanager
def _kept(so_far: Callable[[], Profile], keep: Keep | None) -> Iterator[None]:
    """Within: hand over what there is, every few seconds and at the end, also where an exception or Ctrl-C ends it."""
    if keep is None:
        yield
        return
    done = threading.Event()

    def watch() -> None:
        while not done.wait(KEEP_EVERY_S):
            try:
                keep(so_far())
            except InputError:
                return  # the last call, below, meets the same and is heard

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
        keep(so_far())


def _seen(bench: Bench, num_processes: int) -> Iterator[MeasuredOperator]:
    """What all processes have measured, of each operator the seconds of the slowest."""
    found: dict[int, list[list[float]]] = {}
    for rank in range(num_processes):
        path = bench.lines(rank)
        text = path.read_text() if path.exists() else ""
        for line in text[: text.rfind("\n") + 1].splitlines():  # the last line may be half written
            index, *seconds = json.loads(line)
            found.setdefault(index, []).append(seconds)
    for index, of_ranks in sorted(found.items()):
        if len(of_ranks) == num_processes:
            yield MeasuredOperator(bench.keys[index], *(max(seconds) for seconds in zip(*of_ranks, strict=True)))


# --- in the processes -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """What each process does: measure all operators in turn, and write the seconds of each to a file of its own."""

    keys: tuple[OperatorKey, ...]
    seed: int
    enough_s: float
    folder: Path

    def lines(self, rank: int) -> Path:
        """The file of a process: a line `[index, forward, input gradient, weight gradient]` for each operator."""
        return self.folder / f"{rank}.jsonl"

    def __call__(self, rank: int, size: int) -> None:
        call_s = _call_seconds()
        with self.lines(rank).open("w") as file:
            for index, key in enumerate(self.keys):
                operands = draw_operands(key, torch.Generator().manual_seed(self.seed))
                seconds = measure_operator(key, operands, enough_s=self.enough_s, call_s=call_s)
                file.write(json.dumps([index, *seconds]) + "\n")
                file.flush()


def draw_operands(key: OperatorKey, generator: torch.Generator) -> list[Tensor]:
    """Operands of an operator; numbers from 0 to 1: no logarithm of a negative one, nothing subnormal."""
    whole = local_of(key).sizes
    operands = []
    for dims, dtype, role in zip(key.operator.input_dims, key.dtypes, key.roles, strict=True):
        shape = [size for dim in dims for name, size in key.sizes if name == dim]
        if dtype == "int64":  # an index into the dim that is looked up
            high = min((whole[dim] for dim in key.operator.contracted), default=1)
            operands.append(torch.randint(0, high, shape, generator=generator))
        else:
            drawn = torch.rand(shape, generator=generator).to(_TYPES[dtype])
            operands.append(drawn.requires_grad_(role is not Role.INPUT))
    return operands


def local_of(key: OperatorKey) -> Local:
    """The operator as the kernels see it, alone; of a dim that is cut this is the first of two pieces."""
    mesh = Mesh(tuple(MeshAxis(f"cut_{dim}", 2) for dim in key.cut), rank=0)
    sizes = {dim: size * (2 if dim in key.cut else 1) for dim, size in key.sizes}
    return Local(key.operator, {f"cut_{dim}": dim for dim in key.cut}, sizes, mesh)


def measure_operator(
    key: OperatorKey, operands: Sequence[Tensor], *, enough_s: float, call_s: float = 0.0
) -> tuple[float, float, float]:
    """Seconds of the forward, of the gradients of activations and of those of parameters: medians over `enough_s`.

    Each starts with caches as a run leaves them: what was just made (activations, the gradient of the result) is in
    them, as far as it fits, and weights, saved tensors and free memory are not. Repeated in warm caches a norm takes
    half of what it takes in a run. A call of autograd takes `call_s` beside what it computes; a run pays it once a
    microbatch and not once an operator, so it is taken off.
    """
    local = local_of(key)
    by_role = [
        [operand for operand, own in zip(operands, key.roles, strict=True) if own is role]
        for role in (Role.ACTIVATION, Role.PARAMETER)
    ]
    made = [operand for operand, role in zip(operands, key.roles, strict=True) if role is not Role.PARAMETER]
    others = torch.ones(OTHERS_BYTES, dtype=torch.uint8)
    times_s: list[list[float]] = []
    begin_s = time.perf_counter()
    while _all_go_on(len(times_s) < MIN_REPEATS + 1 or time.perf_counter() - begin_s < enough_s):
        _make_again(others, made)
        results, forward_s = _timed(lambda: _results(local, operands))
        row = [forward_s]
        for inputs in by_role:
            if not inputs or not results:
                row.append(0.0)
                continue
            _make_again(others, [])
            gradients = [torch.ones_like(result) for result in results]
            _, gradient_s = _timed(partial(_gradients, results, inputs, gradients))
            row.append(gradient_s - call_s)
        times_s.append(row)
        del results
    forward_s, input_s, weight_s = (max(0.0, _median(column)) for column in zip(*times_s[1:], strict=True))
    return forward_s, input_s, weight_s


def _results(local: Local, operands: Sequence[Tensor]) -> list[Tensor]:
    return [result for result in run_kernel(local, *operands) if result is not None and result.requires_grad]


def _gradients(results: Sequence[Tensor], inputs: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    torch.autograd.grad(results, inputs, gradients, retain_graph=True, allow_unused=True)


def _make_again(others: Tensor, made: Sequence[Tensor]) -> None:
    """Leave `made` in the caches as if it had just been computed, and nothing that was there before."""
    others.add_(1)
    with torch.no_grad():
        for operand in made:
            operand.mul_(1)


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What `work` gives and the seconds it takes, begun by all processes together."""
    _all_go_on(True)
    start_s = time.perf_counter()
    result = work()
    return result, time.perf_counter() - start_s


def _all_go_on(wants: bool) -> bool:
    """Whether any process wants to go on; all of them wait for the last to say."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return wants
    word = torch.tensor(float(wants))
    dist.all_reduce(word, dist.ReduceOp.MAX)
    return bool(word)


def _call_seconds() -> float:
    """What a call of autograd takes that computes nothing: the gradient of a view."""
    one = torch.ones(1, requires_grad=True)
    view, gradient = one.view_as(one), torch.ones(1)
    return _median([_timed(lambda: _gradients([view], [one], [gradient]))[1] for _ in range(CALL_REPEATS)])


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]
