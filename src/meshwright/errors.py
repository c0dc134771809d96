"""What goes wrong, said once: a `Problem` names the value, the rule and the nearest fix; errors carry all of them.

Bad input raises `InputError` (exit status 2). A question whose answer is "no" is not an error: results carry reasons.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One rule that an input breaks.

    `where` is the file and key path, the option or the shorthand key; `value` is what stood there, as text; `rule`
    says what is allowed; `nearest` is the nearest thing that would be accepted, where one is known.
    """

    where: str
    value: str
    rule: str
    nearest: str | None = None

    def __str__(self) -> str:
        text = f"{self.where} = {self.value}: {self.rule}" if self.value else f"{self.where}: {self.rule}"
        return f"{text} (nearest: {self.nearest})" if self.nearest else text


class MeshwrightError(Exception):
    """Base of everything that Meshwright raises on purpose."""


class InputError(MeshwrightError):
    """An input breaks one or more rules; `problems` holds all of them.

    >>> raise InputError([Problem("tp", "3", "must divide 64 heads", "tp=2 or tp=4")])
    Traceback (most recent call last):
    meshwright.errors.InputError: tp = 3: must divide 64 heads (nearest: tp=2 or tp=4)
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in self.problems))


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None where none is close.

    >>> nearest_name("dgx-h10", ["dgx-h100", "tpu-v4"])
    'dgx-h100'
    """
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return matches[0] if matches else None


def is_interrupt(error: BaseException | None) -> bool:
    """Whether an error is Ctrl-C: compiled loops that it meets return a `SystemError` that it caused.

    >>> is_interrupt(KeyboardInterrupt()), is_interrupt(SystemError())
    (True, False)
    """
    return error is not None and (
        isinstance(error, KeyboardInterrupt) or is_interrupt(error.__cause__) or is_interrupt(error.__context__)
    )
