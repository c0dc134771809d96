"""`solve`: the choice problem itself, from a file of the ASPLOS/EuroSys 2025 contest."""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from meshwright.cli.common import AsJson, app, print_json

if TYPE_CHECKING:
    from meshwright.search.choose.apart import Word

_IMPORTED_AT_S = time.monotonic()

#: What is kept back of the time limit, in seconds and as a share of it, on a machine that may be busy: after the
#: solver's deadline for its last word, and after that, whether it came or not, for the answer and the end of processes.
TELLING_S, TELLING_SHARE = 0.6, 0.03
ENDING_S, ENDING_SHARE = 0.3, 0.015

#: A command is run within so many seconds of the import of this module; a call later is from a program, whose age is
#: none of the limit's business.
CALLED_WITHIN_S = 5.0


SIGNALS = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM"}


class Ended(BaseException):
    """A signal that asks to end."""


def seconds(text: str | float) -> float:
    """A number of seconds, not below 0."""
    try:
        value = float(text)
    except ValueError:
        raise typer.BadParameter(f"{str(text)[:60]!r} is no number of seconds.") from None
    if not 0.0 <= value < math.inf:
        raise typer.BadParameter(f"{value:g} is no time limit; seconds from 0 on are.")
    return value


@app.command()
def solve(
    instance: Annotated[str, typer.Argument(metavar="INSTANCE", help="Contest file: .json, .json.gz, or - for stdin.")],
    time_limit: Annotated[
        float,
        typer.Option("--time-limit", metavar="SECONDS", parser=seconds, help="Of the whole command, loading included."),
    ] = 60.0,
    solver: Annotated[str, typer.Option(help="portfolio, or one of its parts.")] = "portfolio",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 1, help="Of everything random.")] = 0,
    out: Annotated[str, typer.Option(metavar="FILE", help="Write the solution there too; - is stdout.")] = "",
    as_json: AsJson = False,
) -> None:
    """Choose one strategy for each node at the least cost within the memory limit; print it with a lower bound."""
    from meshwright.io.contest import content_of
    from meshwright.search.choose.apart import Broken, Request, Word, listen, solving
    from meshwright.search.choose.solver import Deadline

    began_s = _began_s()
    ends_at_s = began_s + time_limit
    word, shown_at_s, ended_by = Word(), 0.0, "the time limit"
    with _signals():
        try:
            content = content_of("-") if instance == "-" else None
            deadline = Deadline(ends_at_s - min(TELLING_S + TELLING_SHARE * time_limit, 0.6 * time_limit))
            with solving(Request(instance, content, solver, seed, deadline)) as pipe:
                until_s = ends_at_s - min(ENDING_S + ENDING_SHARE * time_limit, 0.3 * time_limit)
                for word in listen(pipe, until_s):
                    if sys.stderr.isatty() and time.monotonic() > shown_at_s + 1.0:
                        shown_at_s = time.monotonic()
                        cost = "none yet" if word.cost is None else f"{_plain(word.cost):,}"
                        sys.stderr.write(
                            f"{time.monotonic() - began_s:7.1f} s  cost {cost}, lower bound {word.lower_bound:,.0f}\n"
                        )
        except Ended as signalled:
            ended_by = str(signalled)
        except Broken as broken:
            if word.cost is None:
                raise
            word = replace(word, reasons=(*word.reasons, f"the best so far: {broken}"))
        _ignore(SIGNALS)
        _answer(word, ended_by, out, as_json, began_s, {"solver": solver, "seed": seed, "time_limit_s": time_limit})


def _answer(word: Word, ended_by: str, out: str, as_json: bool, began_s: float, asked: dict[str, Any]) -> None:
    """Say it, and write the solution to its file whatever becomes of what is said."""
    try:
        _say(word, ended_by, as_json, began_s, asked)
    finally:
        if out and word.cost is not None:
            from meshwright.io.native import write_text

            write_text(f"{list(word.solution)}\n", out)
    if word.cost is None:
        raise typer.Exit(1)


def _say(word: Word, ended_by: str, as_json: bool, began_s: float, asked: dict[str, Any]) -> None:
    solution, reasons = list(word.solution), list(word.reasons)
    if word.cost is None and not word.infeasible:
        reasons = [f"no solution yet: ended by {ended_by}", *reasons]
    cost = None if word.cost is None else _plain(word.cost)
    bound = _plain(word.lower_bound) if math.isfinite(word.lower_bound) else None
    gap = None if cost is None or bound is None else max(0.0, float(cost - bound)) / max(abs(cost), 1e-300)
    if as_json:
        values = {
            "cost": cost,
            "lower_bound": bound,
            "gap": gap,
            "proven_optimal": gap == 0.0,
            "infeasible": word.infeasible,
            "reasons": reasons,
            "peak_usage": None if word.peak is None else _plain(word.peak),
            "usage_limit": _plain(word.limit) if math.isfinite(word.limit) else None,
            **asked,
            "finished": word.final,
            "elapsed_s": round(time.monotonic() - began_s, 3),
            "solution": solution,
        }
        print_json("solve-result/1", values)
    else:
        sys.stderr.write("".join(f"{reason}\n" for reason in reasons if word.cost is not None))
        told = "".join(f"{reason}\n" for reason in reasons) if word.cost is None else _told(word, bound, gap, began_s)
        sys.stdout.write(f"{told}{solution}\n" if word.cost is not None else told)
    sys.stdout.flush()


def _told(word: Word, bound: Any, gap: float | None, began_s: float) -> str:
    limit = f"{_plain(word.limit):,}" if math.isfinite(word.limit) else "any"
    proof = "no lower bound" if gap is None else "proven optimal" if gap == 0.0 else f"gap {100 * gap:.4g} %"
    return (
        f"cost         {_plain(word.cost):,}\n"
        f"lower bound  {'none' if bound is None else f'{bound:,}'} ({proof})\n"
        f"peak usage   {_plain(word.peak):,} of {limit}\n"
        f"time         {time.monotonic() - began_s:.1f} s\n"
    )


def _plain(value: Any) -> Any:
    """A whole number where it is one."""
    return int(value) if value == int(value) else float(value)


# --- time -----------------------------------------------------------------------------------------------------------


def _began_s() -> float:
    """When the command began, by `time.monotonic`: with its process, whose start Linux tells."""
    now_s = time.monotonic()
    if now_s - _IMPORTED_AT_S > CALLED_WITHIN_S:
        return now_s
    try:
        ticks = float(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        up_s = float(Path("/proc/uptime").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return _IMPORTED_AT_S
    import os

    return now_s - (up_s - ticks / os.sysconf("SC_CLK_TCK"))


@contextmanager
def _signals() -> Iterator[None]:
    """Within it SIGINT and SIGTERM raise `Ended`, once."""

    def end(number: int, frame: FrameType | None) -> None:
        _ignore(SIGNALS)
        raise Ended(SIGNALS[signal.Signals(number)])

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ignore(signals: Iterable[signal.Signals]) -> None:
    """Once the answer is on its way nothing cuts it off."""
    for number in signals:
        signal.signal(number, signal.SIG_IGN)
