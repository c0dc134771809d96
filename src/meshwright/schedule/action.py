"""Actions: what a rank can do in its turn, and how PyTorch writes it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from meshwright.errors import InputError, Problem, nearest_name


class ActionKind(StrEnum):
    """What an action does; the words are PyTorch's."""

    F = "F"  # forward
    I = "I"  # noqa: E741  gradient of the stage's input: all that the stage before waits for
    W = "W"  # gradient of the weights: nobody waits for it
    B = "B"  # full backward: I and W in one
    UNSHARD = "UNSHARD"  # gather the whole weights of a stage
    RESHARD = "RESHARD"  # give them back
    REDUCE_GRAD = "REDUCE_GRAD"  # sum a stage's gradients over data-parallel ranks
    SEND_F = "SEND_F"  # send this stage's output on
    RECV_F = "RECV_F"  # receive this stage's input
    SEND_B = "SEND_B"  # send the gradient of this stage's input back
    RECV_B = "RECV_B"  # receive the gradient of this stage's output
    OVERLAP_F_B = "OVERLAP_F_B"  # several computations at once, one's messages hidden behind another's work


COMPUTE = (ActionKind.F, ActionKind.I, ActionKind.W, ActionKind.B)
MESSAGES = (ActionKind.SEND_F, ActionKind.RECV_F, ActionKind.SEND_B, ActionKind.RECV_B)
STATE = (ActionKind.UNSHARD, ActionKind.RESHARD, ActionKind.REDUCE_GRAD)  # of a stage, not of a microbatch


@dataclass(frozen=True, slots=True)
class Action:
    """One stage's work on one microbatch.

    Actions on the state of a stage have no microbatch. An OVERLAP_F_B has its computations in `parts`, and of its own
    neither stage (-1, as in PyTorch) nor microbatch.

    >>> print(Action(stage=1, kind=ActionKind.B, microbatch=5))
    1B5
    """

    stage: int
    kind: ActionKind
    microbatch: int | None = None
    parts: tuple[Action, ...] = ()

    def __str__(self) -> str:
        if self.kind is ActionKind.OVERLAP_F_B:
            return f"({';'.join(map(str, self.parts))}){self.kind}"
        return f"{self.stage}{self.kind}{'' if self.microbatch is None else self.microbatch}"


Table = tuple[tuple[Action, ...], ...]  # [rank][position]


def compute_parts(action: Action) -> tuple[Action, ...]:
    """The computations (F, I, W, B) in an action: itself, the parts of an overlap, nothing for messages and state.

    >>> [str(part) for part in compute_parts(parse_action("(2F1;1B0)OVERLAP_F_B"))]
    ['2F1', '1B0']
    >>> compute_parts(parse_action("2SEND_F1"))
    ()
    """
    if action.kind is ActionKind.OVERLAP_F_B:
        return action.parts
    return (action,) if action.kind in COMPUTE else ()


# At most eight digits, so that stage, microbatch and kind together fit one 64-bit key.
_ACTION = re.compile(r"([0-9]{1,8})([A-Za-z]\w*?)([0-9]{0,8})", re.ASCII)
_OVERLAP = re.compile(r"\((.+)\)(\w+)", re.ASCII)


def parse_action(text: str) -> Action:
    """The action that `text` writes in PyTorch's notation; raises `InputError` for any other text.

    >>> parse_action("0F3")
    Action(stage=0, kind=<ActionKind.F: 'F'>, microbatch=3, parts=())
    >>> [str(parse_action(text)) for text in ("3UNSHARD", "1RECV_B2", "(2F0;1B0)OVERLAP_F_B")]
    ['3UNSHARD', '1RECV_B2', '(2F0;1B0)OVERLAP_F_B']
    """
    text = text.strip()
    if overlap := _OVERLAP.fullmatch(text):
        return _overlap(text, overlap[1], overlap[2])
    match = _ACTION.fullmatch(text)
    if match is None:
        raise _refused(text, "must be stage, kind, microbatch, or computations in brackets", "0F3")
    stage, kind_text, digits = match.groups()
    if kind_text not in ActionKind.__members__:
        near = nearest_name(kind_text.upper(), ActionKind.__members__)
        nearest = f"{stage}{near}{digits}" if near else None
        raise _refused(text, f"{kind_text} is no kind of action; known: {', '.join(ActionKind)}", nearest)
    kind = ActionKind(kind_text)
    if kind is ActionKind.OVERLAP_F_B:
        raise _refused(text, f"{kind} names its computations in brackets", "(2F0;1B0)OVERLAP_F_B")
    if kind in STATE and digits:
        raise _refused(text, f"{kind} is of a stage, not of a microbatch", f"{stage}{kind}")
    if kind not in STATE and not digits:
        raise _refused(text, f"{kind} is of one microbatch", f"{text}0")
    return Action(int(stage), kind, int(digits) if digits else None)


def _overlap(text: str, inside: str, kind_text: str) -> Action:
    if kind_text != ActionKind.OVERLAP_F_B:
        raise _refused(text, f"computations in brackets are an {ActionKind.OVERLAP_F_B}", f"({inside})OVERLAP_F_B")
    parts = tuple(parse_action(part) for part in inside.split(";"))
    for part in parts:
        if part.kind not in COMPUTE:
            raise _refused(text, f"{part} is no computation (one of {', '.join(COMPUTE)})", None)
    return Action(-1, ActionKind.OVERLAP_F_B, None, parts)


def _refused(text: str, rule: str, nearest: str | None) -> InputError:
    return InputError([Problem("action", repr(text), rule, nearest)])


def stage_of(rank: int, virtual_index: int, num_ranks: int) -> int:
    """The stage that is chunk `virtual_index` of `rank` in loop placement: stages are dealt to ranks like cards.

    >>> [stage_of(rank=1, virtual_index=k, num_ranks=4) for k in range(3)]
    [1, 5, 9]
    """
    return virtual_index * num_ranks + rank


def rank_of(stage: int, num_ranks: int) -> int:
    """The rank that holds `stage` in loop placement.

    >>> rank_of(stage=9, num_ranks=4)
    1
    """
    return stage % num_ranks
