"""A case spelled out: the program of each pipeline rank, from the priced blocks and the strategy's table of actions.

Nothing is assumed of stages (uneven, not contiguous, on unlike devices), of the number of microbatches, or of the
schedule. Assumptions: a rank comes to its work in the order of its table; a message blocks both of its ends for the
share that the engine exposes, and a rank that sends and receives does both at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from meshwright.cluster import Cluster
from meshwright.cost.analytic import Batch, Case, batch_of, prepare_batch
from meshwright.cost.compute import device_rates
from meshwright.cost.constants import constants
from meshwright.cost.layouts import Machine, machine_of
from meshwright.cost.memory import InFlight
from meshwright.cost.stages import Members, Rows, rank_table_of
from meshwright.cost.step import EndTransfer, Prepared, Turns, end_transfers, message_seconds, tied_exchanges, turns
from meshwright.errors import InputError, Problem
from meshwright.profile import Profile
from meshwright.schedule import (
    Action,
    ActionKind,
    Table,
    compute_parts,
    is_asynchronous,
    updates_each_microbatch,
    weight_versions,
)
from meshwright.sim.program import (
    COMPUTE,
    KIND_OF_ACTION,
    Blocks,
    Detail,
    Kind,
    Program,
    Task,
    Wait,
    block_tasks,
    hidden,
    number,
)
from meshwright.sim.tasks import devices_of
from meshwright.strategy import CUSTOM, Strategy, strategy_table


@dataclass(frozen=True)
class Built:
    """The programs of a case, with what its ledgers need: of each pipeline rank what is prepared on its devices and
    what a turn takes there. `rounds` steps follow one another without a flush where the schedule is asynchronous."""

    case: Case
    batch: Batch
    table: Table
    rounds: int
    programs: tuple[Program, ...]
    machines: tuple[Machine, ...]
    prepared: tuple[Prepared, ...]
    turns: tuple[Turns, ...]
    rows: Rows
    ends: tuple[dict[str, float], ...]
    sent_s: tuple[float, ...]
    kept_bytes: tuple[float, ...]


def build(
    case: Case, detail: Detail = Detail.STAGE, profile: Profile | None = None, *, shared_links: bool = False
) -> Built:
    """Spell out what each pipeline rank of a case does. Where links will be shared, transfers take what they take
    alone: contention is simulated, not assumed."""
    if case.strategy.is_placed:
        rule = "places single operators, which are not simulated: `estimate` and `explain` sum what they take"
        raise InputError([Problem("strategy", "mesh axes x, y, z", rule)])
    strategy, m = case.strategy, case.strategy.num_microbatches(case.workload)
    rounds = 2 if is_asynchronous(strategy.schedule) else 1
    table = strategy_table(strategy, rounds * m)
    names = [block.name for block in case.graph.blocks]
    staged = [(case.graph.sequence, strategy.stages)]
    batch = replace(batch_of([case]), tables=rank_table_of(names, staged, fold=False))
    machines = rank_machines(replace(case, cluster=_uncontended(case.cluster)) if shared_links else case, profile)
    prepared = _each_once(machines, lambda machine: prepare_batch(batch, machine))
    rows = Rows(batch.tables, batch.members)
    kept_S = _kept_bytes(case, batch.members, prepared[0])
    held = _in_flight(table, strategy, kept_S, m)
    turned = _each_once(prepared, lambda one: turns(one, rows, batch.members, held))
    tasks = _each_once(prepared, lambda one: block_tasks(one.priced, one.states[0][1], strategy.recompute, detail))
    writer = _Writer(case, table, rows, m, detail)
    programs, ends, sent = zip(
        *(writer.program(rank, *found) for rank, found in enumerate(zip(prepared, turned, tasks, strict=True))),
        strict=True,
    )
    writer.join(programs)
    return Built(case, batch, table, rounds, programs, machines, prepared, turned, rows, ends, sent, tuple(kept_S))


def rank_machines(case: Case, profile: Profile | None) -> tuple[Machine, ...]:
    """What each pipeline rank runs on: the slowest of its own devices, on the links of all."""
    known = constants()
    whole = machine_of(case.cluster, case.engine, case.workload, known, profile)
    if len(case.cluster.groups) == 1:
        return (whole,) * case.strategy.pipeline_size
    made: dict[tuple[int, ...], Machine] = {}
    found = []
    for rank in range(case.strategy.pipeline_size):
        own = rank_cluster(case.cluster, case.strategy, rank)
        groups = tuple(map(id, own.groups))  # names of devices need not differ where their numbers do
        if groups not in made:
            device = own.slowest_device
            rates = device_rates(device, case.workload, known)
            made[groups] = replace(whole, rates=rates, memory_bytes=device.memory_bytes.value)
        found.append(made[groups])
    return tuple(found)


def _uncontended(cluster: Cluster) -> Cluster:
    return replace(cluster, levels=tuple(replace(level, oversubscription=1.0) for level in cluster.levels))


def rank_cluster(cluster: Cluster, strategy: Strategy, rank: int) -> Cluster:
    """A cluster with the groups alone that hold devices of a pipeline rank."""
    devices = devices_of(strategy.mesh, rank)
    bounds = np.cumsum([0, *(group.count for group in cluster.groups)])
    held = np.unique(np.searchsorted(bounds, devices, side="right") - 1)
    return replace(cluster, groups=tuple(cluster.groups[index] for index in held))


def _each_once(keys: Sequence[Any], make: Any) -> tuple[Any, ...]:
    """`make` of each key, equal ones (by identity) once."""
    made: dict[int, Any] = {}
    for key in keys:
        if id(key) not in made:
            made[id(key)] = make(key)
    return tuple(made[id(key)] for key in keys)


def _kept_bytes(case: Case, members: Members, prepared: Prepared) -> Any:
    """Bytes that each stage keeps of a microbatch."""
    stages = [replace(stage, pipeline_rank=index) for index, stage in enumerate(case.strategy.stages)]
    names = [block.name for block in case.graph.blocks]
    rows = Rows(rank_table_of(names, [(case.graph.sequence, stages)], fold=False), members)
    return np.broadcast_to(rows.add(prepared.memory.kept), (len(stages), 1, 1, 1)).ravel()


#: A stage that keeps nothing counts for so many bytes, so that a rank of such stages has a share too.
LEAST = 1e-300


def _in_flight(table: Table, strategy: Strategy, kept_S: Any, num_microbatches: int) -> InFlight:
    """What a table holds at most on each rank, each stage weighed by what it keeps; the head's by its gradients."""
    last, p = len(strategy.stages) - 1, strategy.pipeline_size
    shares, head = [], 0
    for row in table:
        now, most, pending = 0.0, 0.0, 0
        own = {part.stage for action in row for part in compute_parts(action)}
        for action in row:
            for part in compute_parts(action):
                weight = kept_S[part.stage] or LEAST
                now += weight * {ActionKind.F: 1, ActionKind.B: -1, ActionKind.W: -1}.get(part.kind, 0)
                pending += (part.stage == last) * {ActionKind.F: 1, ActionKind.B: -1, ActionKind.I: -1}.get(
                    part.kind, 0
                )
                most, head = max(most, now), max(head, pending)
        shares.append(most / sum(kept_S[stage] or LEAST for stage in own))
    versions = (
        1 if strategy.schedule == CUSTOM else weight_versions(strategy.schedule, p, 1, num_microbatches, np.arange(p))
    )
    return InFlight(np.array(shares)[:, None], head, np.broadcast_to(versions, p)[:, None])


class _Writer:
    """Writes programs rank by rank, and joins them at the end: what waits for what on other ranks."""

    def __init__(self, case: Case, table: Table, rows: Rows, num_microbatches: int, detail: Detail) -> None:
        self.case, self.table, self.rows, self.m, self.detail = case, table, rows, num_microbatches, detail
        self.rank_of = [stage.pipeline_rank for stage in case.strategy.stages]
        self.done: dict[Action, tuple[int, int, int]] = {}  # what others wait for: rank, its end, where it is sent
        self.needed: list[tuple[int, int, Action, bool]] = []  # rank, position, what is waited for, whether to be sent
        self.tied: dict[tuple[str, str], list[tuple[int, int, int]]] = {}
        self.pieces: dict[tuple[int, int, ActionKind], tuple[Task, ...]] = {}

    def program(
        self, rank: int, prepared: Prepared, turn: Turns, blocks: Blocks
    ) -> tuple[Program, dict[str, float], float]:
        """What a rank does; what its step's end takes by cause, and its messages."""
        program, v = Program(), self.case.strategy.virtual_stages
        moves = list(end_transfers(prepared, self.rows, turn.forward_K, turn.backward_K))
        row = [part for action in self.table[rank] for part in compute_parts(action)]
        backwards = [index for index, part in enumerate(row) if part.kind in (ActionKind.B, ActionKind.I)]
        last_turn = backwards[-v] if len(backwards) >= v else -1
        ends, sent_s, seen = {}, 0.0, 0
        schedule = self.case.strategy.schedule
        update_after = v * (1 if updates_each_microbatch(schedule) else self.m) if is_asynchronous(schedule) else 0
        program.add(None, _hidden(moves, rank, is_gradient=False))
        for index, part in enumerate(row):
            if index == last_turn:
                program.add(None, _hidden(moves, rank, is_gradient=True))
            tasks = self._piece(rank, part, turn, prepared, blocks)
            position = program.add(part, tasks)
            sent_s += sum(task.seconds for task in tasks if task.chained and task.stream.startswith("pp"))
            self._note(rank, part, position, tasks)
            seen += part.kind in (ActionKind.B, ActionKind.I)
            if update_after and part.kind is ActionKind.B and seen % update_after == 0:
                ends = self._end(rank, program, prepared, moves, tied=False)
                program.marks.append(program.length - 1)
        if not update_after and backwards:
            ends = self._end(rank, program, prepared, moves, tied=True)
        updates = max(self.m * v // update_after, 1) if update_after else 1
        return program, {cause: updates * seconds for cause, seconds in ends.items()}, sent_s

    def _piece(self, rank: int, part: Action, turn: Turns, prepared: Prepared, blocks: Blocks) -> tuple[Task, ...]:
        key = (rank, part.stage, part.kind)
        if key not in self.pieces:
            self.pieces[key] = tuple(self._tasks(rank, part, turn, prepared, blocks))
        return self.pieces[key]

    def _tasks(self, rank: int, part: Action, turn: Turns, prepared: Prepared, blocks: Blocks) -> list[Task]:
        """One action of a stage: its blocks, what the engine's faults add, and the message that follows."""
        graph, strategy = self.case.graph, self.case.strategy
        own = [name for held in strategy.stages[part.stage].blocks for name in graph.sequence[held.start : held.stop]]
        in_order_ = own if part.kind is ActionKind.F else list(reversed(own))
        tasks = [task for name in in_order_ for task in blocks[name][part.kind]]
        if self.detail is Detail.STAGE:
            tasks = _merged(tasks, KIND_OF_ACTION[part.kind])
        if part.kind is ActionKind.W:
            return tasks or [Task(COMPUTE, 0.0, "nothing", Kind.WEIGHT_GRADIENT)]
        fault_s = (number(turn.stall_K[rank]) if np.ndim(turn.stall_K) else turn.stall_K) + number(turn.retry_K[rank])
        if fault_s > 0:
            tasks.append(Task(COMPUTE, fault_s / strategy.virtual_stages, "stall", KIND_OF_ACTION[part.kind]))
        if next((task for task in tasks if task.chained), None) is None or _first_chained(tasks).root:
            tasks.insert(0, Task(COMPUTE, 0.0, "receive", Kind.COMMUNICATION))
        step = 1 if part.kind is ActionKind.F else -1
        source, target = self._elsewhere(rank, part.stage - step), self._elsewhere(rank, part.stage + step)
        if target is not None:
            tasks += self._messages(prepared, f"pp to {target}", f"send to {target}")
        elif source is not None:
            # Both ends of a message are busy with it. A rank that sends and receives does both at once.
            tasks[:0] = self._messages(prepared, f"pp from {source}", f"receive from {source}")[:1]
        return tasks

    def _elsewhere(self, rank: int, stage: int) -> int | None:
        """The rank that a stage is on, where that is another one."""
        return self.rank_of[stage] if 0 <= stage < len(self.rank_of) and self.rank_of[stage] != rank else None

    def _messages(self, prepared: Prepared, stream: str, name: str) -> list[Task]:
        """A message: the share that blocks a rank, then the rest."""
        whole_s = number(message_seconds(prepared.priced))
        share = number(prepared.priced.machine.exposed.get("pp", 1.0))
        blocking = Task(stream, share * whole_s, name, Kind.COMMUNICATION)
        rest = Task(stream, (1 - share) * whole_s, name, Kind.COMMUNICATION, chained=False)
        return [blocking, *([rest] if share < 1 else [])]

    def _note(self, rank: int, part: Action, position: int, tasks: Sequence[Task]) -> None:
        """What others wait for is the last task: the message, or what was computed; they wait at their first, where
        that is a receive for the message to be sent."""
        chained = [position + index for index, task in enumerate(tasks) if task.chained]
        sends = sum(task.stream.startswith("pp to") for task in tasks)
        last, sent = position + len(tasks) - 1, position + len(tasks) - 1 - sends
        receives = tasks[chained[0] - position].stream.startswith("pp from")
        if part.kind is ActionKind.F:
            self.done[part] = (rank, last, sent)
            need = Action(part.stage - 1, ActionKind.F, part.microbatch) if part.stage > 0 else None
        elif part.kind is ActionKind.W:
            return
        else:
            self.done[Action(part.stage, ActionKind.B, part.microbatch)] = (rank, last, sent)
            is_last = part.stage == len(self.rank_of) - 1
            need = None if is_last else Action(part.stage + 1, ActionKind.B, part.microbatch)
        if need is not None and self.rank_of[need.stage] != rank:
            self.needed.append((rank, chained[1 if receives else 0], need, False))
            if receives:
                self.needed.append((rank, chained[0], need, True))

    def _end(
        self, rank: int, program: Program, prepared: Prepared, moves: Sequence[EndTransfer], *, tied: bool
    ) -> dict[str, float]:
        """Reduction of gradients, exchange of tied ones, update, gathering of parameters; seconds by cause."""
        ends: dict[str, float] = {}

        def add(cause: str, task: Task) -> None:
            if task.seconds > 0:
                program.add(None, [task])
                ends[cause] = ends.get(cause, 0.0) + task.seconds

        for move in moves:
            if move.is_gradient:
                seconds = rank_number(move.exposed_K, rank)
                name = f"{move.root} reduce gradients"
                add(f"exposed_{move.root}", Task(move.root, seconds, name, Kind.COMMUNICATION, root=move.root))
        for owners, apart_K, took in tied_exchanges(prepared, self.rows) if tied else ():
            if rank_number(apart_K, rank) and number(took) > 0:
                self.tied.setdefault(owners, []).append((rank, program.length, program.last_chained))
                add("exposed_pp", Task("pp tied", number(took), "tied gradients", Kind.COMMUNICATION))
        update_s = rank_number(self.rows.add(prepared.update_s), rank)
        add("optimizer", Task(COMPUTE, update_s, "update", Kind.OPTIMIZER))
        for move in moves:
            if not move.is_gradient:
                seconds = rank_number(move.exposed_K, rank)
                name = f"{move.root} gather parameters"
                add(f"exposed_{move.root}", Task(move.root, seconds, name, Kind.COMMUNICATION, root=move.root))
        return ends

    def join(self, programs: Sequence[Program]) -> None:
        """What each rank waits for on others."""
        for rank, position, need, is_receive in self.needed:
            of_rank, last, sent = self.done[need]
            programs[rank].waits.append(Wait(position, of_rank, sent if is_receive else last))
        for ends in self.tied.values():
            for rank, position, _ in ends:
                others = [(of, before) for of, _, before in ends if of != rank]
                programs[rank].waits += [Wait(position, of, before) for of, before in others]


def _first_chained(tasks: Sequence[Task]) -> Task:
    return next(task for task in tasks if task.chained)


def _merged(tasks: Sequence[Task], kind: Kind) -> list[Task]:
    """Tasks of a stage as one a stream: first what lies beside, then computation, then what is exposed."""
    beside: dict[str, float] = {}
    chained: dict[str, float] = {COMPUTE: 0.0}
    for task in tasks:
        into = chained if task.chained else beside
        stream = task.stream if task.chained else task.root
        into[stream] = into.get(stream, 0.0) + task.seconds
    made = [hidden(root, min(seconds, chained[COMPUTE]), root) for root, seconds in sorted(beside.items())]
    made.append(Task(COMPUTE, chained.pop(COMPUTE), str(kind), kind))
    return made + [Task(root, s, root, Kind.COMMUNICATION, root=root) for root, s in sorted(chained.items()) if s > 0]


def _hidden(moves: Sequence[EndTransfer], rank: int, *, is_gradient: bool) -> list[Task]:
    """What computation hides of the transfers of gradients or of parameters."""
    what = "reduce gradients" if is_gradient else "gather parameters"
    return [
        hidden(move.root, seconds, f"{move.root} {what}")
        for move in moves
        if move.is_gradient == is_gradient and (seconds := rank_number(move.hidden_K, rank)) > 0
    ]


def rank_number(values_K: Any, rank: int) -> float:
    """Of values by pipeline rank (K x 1 x 1 x 1, or one for all) that of one."""
    flat = np.ravel(values_K)
    return float(flat[rank if len(flat) > 1 else 0])
