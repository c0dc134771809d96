"""HiGHS without its banner (standard output belongs to the command's result), to be left at any time."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event, Thread

import highspy
import numpy as np

from meshwright.choice import Array
from meshwright.search.choose.solver import Deadline

#: Between two looks at the clock, and at Ctrl-C.
LOOK_EVERY_S = 0.05


class QuietHighs(highspy.Highs):  # type: ignore[misc]
    """The solver of linear and integer programs, on one thread, which prints nothing.

    HiGHS (Huangfu and Hall 2018, Mathematical Programming Computation 10) is a dependency of those who solve with it:
    this module is imported where it is used.
    """

    def enableCallbacks(self) -> None:
        """Called first by the constructor: the banner is printed here unless output is off by then."""
        self.silent()
        self.setOptionValue("threads", 1)
        super().enableCallbacks()

    def solve_until(self, deadline: Deadline, found: Callable[[Array], None] | None = None) -> None:
        """Solve, until the deadline at most; `found` is told the columns of better integer solutions, at the next look.
        Ctrl-C stops the solver before it goes on to the caller."""
        news: list[Array] = []
        stopped = Event()
        self.setOptionValue("time_limit", self.getRunTime() + min(deadline.left_s, 1e9))
        if found is not None:
            self.cbMipImprovingSolution += lambda event: news.append(np.array(event.data_out.mip_solution))
        for callback in (self.cbMipInterrupt, self.cbIpmInterrupt):
            callback.subscribe(lambda event: event.interrupt(stopped.is_set()))
        # Not `startSolve`: its locks belong to the class, so that two programs could not be solved at once.
        thread = Thread(target=self.run, daemon=True)
        thread.start()
        try:
            while thread.is_alive():
                thread.join(LOOK_EVERY_S)
                if found is not None and news:
                    found(news.pop())
                if deadline.passed:
                    stopped.set()
        except BaseException:
            stopped.set()
            thread.join()
            raise
        finally:
            self.clearCallbacks()
