"""A contest file solved in a process of its own, which tells how far it is.

Compiling, reading a file and solvers outside Python are deaf to signals and clocks while they work. The process that
was asked keeps its hands free: it can answer with the last word of the other at any moment, and end it.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, MeshwrightError, Problem
from meshwright.search.choose.solver import SOLVERS, Deadline, Solved

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

    from meshwright.io.contest import Contest

#: Of the time since the process began, at most this share is spent on checking choices that better ones will replace.
CHECKING_SHARE = 0.05

#: Between two looks at whether what was put off may be checked by now.
LOOK_EVERY_S = 0.5

#: Whole numbers up to here, and their sums, are exact in floats; a bound above may be off by this share of itself.
EXACT_UP_TO, ROUNDING = 2**53, 1e-12


@dataclass(frozen=True)
class Word:
    """What is known so far. Cost and peak are those of `solution`, which has passed the independent check (None: there
    is none yet); `final` says that nothing better will come."""

    cost: float | None = None
    peak: float | None = None
    solution: tuple[int, ...] = ()
    lower_bound: float = -math.inf
    limit: float = math.inf
    reasons: tuple[str, ...] = ()
    final: bool = False

    @property
    def infeasible(self) -> bool:
        """Whether it is proven that there is no solution."""
        return self.lower_bound == math.inf


class Broken(MeshwrightError):
    """The other process ended before it was done: by a fault of ours, or killed."""


@dataclass(frozen=True)
class Request:
    """A file (its content, where that came from stdin, which a process started here does not have), a solver by name,
    and the moment (of `time.monotonic`) at which it has to be done."""

    path: str
    content: bytes | None
    solver: str
    seed: int
    deadline: Deadline


@contextmanager
def solving(request: Request) -> Iterator[Connection]:
    """The other process while it works: what it says comes through the pipe, `Word`s or `InputError`s as problems."""
    import multiprocessing

    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_work, args=(request, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        process.kill()
        process.join()
        ours.close()


def listen(pipe: Connection, until_s: float) -> Iterator[Word]:
    """Each word as it comes, until the last or until a moment of `time.monotonic`. Raises what ended the other."""
    while pipe.poll(max(0.0, until_s - time.monotonic())):
        try:
            said = pipe.recv()
        except EOFError:
            raise Broken("the solving process ended without a word; was it killed for its memory?") from None
        if isinstance(said, Word):
            yield said
            if said.final:
                return
        elif isinstance(said, ModuleNotFoundError):
            raise said
        elif isinstance(said, tuple):
            raise InputError(said)
        else:
            raise Broken(f"the solving process failed:\n{said}")


def _work(request: Request, pipe: Connection) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C and `timeout` reach both, and the other one answers
        signal.signal(number, signal.SIG_IGN)
    try:
        from meshwright.io.contest import read_contest

        method = _method(request.solver)
        contest = read_contest(request.path, request.content)
        teller = _Teller(contest, pipe)
        found = method(contest.instance, request.deadline, seed=request.seed, report=teller.tell)
        teller.tell(found, final=True)
    except InputError as error:
        pipe.send(error.problems)
    except ModuleNotFoundError as error:
        pipe.send(ModuleNotFoundError(str(error), name=error.name))
    except BrokenPipeError:
        return  # nobody listens any more
    except Exception:
        pipe.send(traceback.format_exc())


class _Teller:
    """Checks and tells what is better than before; the first choice at once, others when checking them is cheap."""

    def __init__(self, contest: Contest, pipe: Connection) -> None:
        self.contest, self.pipe = contest, pipe
        limit = contest.problem.get("usage_limit")  # as it is in the file
        self.word = Word(limit=math.inf if limit is None else limit)
        self.began_s, self.checking_s = time.monotonic(), 0.0
        self.put_off: Solved | None = None
        self.lock = threading.Lock()
        threading.Thread(target=self._catch_up, daemon=True).start()

    def tell(self, found: Solved, final: bool = False) -> None:
        with self.lock:
            self.put_off = found
            if final or self.word.cost is None or self._is_cheap():
                self._say(found, final)

    def _catch_up(self) -> None:
        """Tell what was put off, which may be the last for long."""
        while not self.word.final:
            time.sleep(LOOK_EVERY_S)
            with self.lock:
                if self.put_off is not None and self._is_cheap() and not self.word.final:
                    try:
                        self._say(self.put_off, final=False)
                    except OSError:  # nobody listens any more
                        return

    def _is_cheap(self) -> bool:
        return self.checking_s < CHECKING_SHARE * (time.monotonic() - self.began_s)

    def _say(self, found: Solved, final: bool) -> None:
        now_s = time.monotonic()
        word = replace(self.word, reasons=found.reasons, final=final)
        if found.choice_N is not None and (word.cost is None or found.cost < word.cost):
            word = replace(word, **self._checked(found))
        self.word = replace(word, lower_bound=_below(found.lower_bound, word.cost))
        self.put_off = None
        self.pipe.send(self.word)
        self.checking_s += time.monotonic() - now_s

    def _checked(self, found: Solved) -> dict[str, Any]:
        from meshwright.io.contest_check import check_solution

        assert found.choice_N is not None
        solution = tuple(found.choice_N.tolist())
        checked = check_solution(self.contest.problem, solution)
        if not checked.is_legal:  # a fault of ours: what passed before stands, and the fault is told
            return {"reasons": (*found.reasons, f"a choice did not pass the check: {checked.faults[0]}")}
        return {"cost": checked.cost, "peak": checked.peak, "solution": solution}


def _below(bound: float, cost: Any) -> float:
    """A bound in floats that is not above one in whole numbers: lowered where floats are not exact, and never above the
    exact cost of a solution."""
    if math.isfinite(bound) and bound > EXACT_UP_TO:
        bound *= 1 - ROUNDING
    return bound if cost is None or bound <= cost else cost if type(cost) is int else float(cost)


def _method(name: str) -> Any:
    """A solver by its name, which most have from their file; a miss names all."""
    from meshwright.search import choose

    files = [module.name for module in pkgutil.iter_modules(choose.__path__)]
    for file in sorted(files, key=lambda file: file != name):
        if name not in SOLVERS:
            importlib.import_module(f"{choose.__name__}.{file}")
    try:
        return SOLVERS[name]
    except InputError as error:
        found = error.problems[0]
        raise InputError([Problem("--solver", name, found.rule, found.nearest)]) from None
