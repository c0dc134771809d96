"""Every schedule that ends a step is run: as one device trains, and in the order that its table says.

Loss and gradients of the named schedules on four processes, their mixes with tensor parallelism, sharded state and
recomputation on two to four, and tables that no schedule has. All runs of this file come out of one worker.
"""

from __future__ import annotations

import doctest
from dataclasses import replace
from functools import cache
from itertools import pairwise

import pytest

torch = pytest.importorskip("torch")

from meshwright.errors import InputError  # noqa: E402
from meshwright.graph import Operator  # noqa: E402
from meshwright.results import Measurement, Ran  # noqa: E402
from meshwright.runtime import pipeline, record  # noqa: E402
from meshwright.runtime.later import Landing, Later, can_wait, multiply_later  # noqa: E402
from meshwright.runtime.launch import run_many  # noqa: E402
from meshwright.runtime.refuse import SCHEDULES_RUN, run_problems  # noqa: E402
from meshwright.runtime.train import Job, Rank  # noqa: E402
from meshwright.runtime.weights import parameter_instances  # noqa: E402
from meshwright.schedule import parse_action  # noqa: E402
from meshwright.strategy import BlockRange, Stage, strategy_table  # noqa: E402
from runtime_strategies import WORKLOAD, job, model  # noqa: E402

#: ZB-H1 and ZB-H2 with enough microbatches to reach their steady state; DualPipeV asks for two per rank.
ON_FOUR = (
    "pp=4,mbs=2,schedule=GPipe",
    "pp=4,mbs=2,schedule=1F1B",
    "pp=4,vpp=2,mbs=2,schedule=Interleaved1F1B",
    "pp=4,vpp=2,mbs=2,schedule=LoopedBFS",
    "pp=4,mbs=1,schedule=ZB-H1",
    "pp=4,mbs=1,schedule=ZB-H2",
    "pp=4,vpp=2,mbs=2,schedule=InterleavedZeroBubble",
    "pp=4,vpp=2,mbs=2,schedule=ZBVZeroBubble",
    "pp=4,vpp=2,mbs=1,schedule=DualPipeV",
)

MIXED = (
    "pp=2,dp=2,mbs=2,zero=3,recompute=full,schedule=ZB-H1",  # gathered and recomputed for I, reduced by W
    "pp=2,tp=2,sp=1,mbs=2,recompute=selective,schedule=ZB-H2",
    "pp=2,vpp=2,dp=2,mbs=1,zero=2,recompute=full,schedule=ZBVZeroBubble",  # both copies of the tied tensor on one rank
    "pp=2,vpp=2,tp=2,mbs=1,recompute=full,schedule=DualPipeV",
    "pp=2,vpp=2,dp=2,mbs=2,zero=3,schedule=InterleavedZeroBubble",
    "pp=2,vpp=4,mbs=4,zero=0,schedule=LoopedBFS",
    "vpp=2,mbs=2,schedule=DualPipeV",  # one device
)


def by_hand() -> dict[str, Job]:
    """Tables that no schedule has; on the first the last stage takes microbatches out of order, and a rank's backwards
    are whole and split; on the second neighbouring stages lie on one rank, which waits for nobody between them."""
    plain = job("deep", "pp=2,mbs=4", steps=2)
    backwards = ("0F1,0F0,0B0,0I1,0W1", "1F1,1F0,1I0,1W0,1B1")
    halves = [(0, 0, 2), (0, 2, 3), (1, 3, 6), (1, 6, 8)]
    stages = tuple(Stage(rank, (BlockRange(start, stop),)) for rank, start, stop in halves)
    beside = ("0F0,1F0,0F1,1F1,1I0,0I0,1W0,0W0,1B1,0B1", "2F0,3F0,3B0,2B0,2F1,3F1,3I1,2I1,2W1,3W1")
    return {
        "out of order": _recorded(_with_table(plain, backwards)),
        "side by side": _recorded(_with_table(plain, beside, stages)),
    }


def _with_table(plain: Job, table: tuple[str, ...], stages: tuple[Stage, ...] | None = None) -> Job:
    strategy = replace(plain.strategy, schedule="custom", table=table, stages=stages or plain.strategy.stages)
    return replace(plain, strategy=strategy)


def _recorded(one: Job) -> Job:
    return replace(one, record=True)


FEW, MANY = "8 microbatches", "24 microbatches"


def unrecorded() -> dict[str, Job]:
    """1F1B with few and with many microbatches."""
    workloads = {FEW: replace(WORKLOAD, seq_len=64), MANY: replace(WORKLOAD, global_batch=24, seq_len=64)}
    return {name: replace(job("deep", "pp=2", of, steps=1), check=False) for name, of in workloads.items()}


@cache
def jobs() -> dict[str, Job]:
    named = {text: _recorded(job("deep", text, steps=2)) for text in (*ON_FOUR, *MIXED)}
    return named | by_hand() | unrecorded()


@cache
def runs() -> dict[str, Measurement]:
    return dict(zip(jobs(), run_many(list(jobs().values())), strict=True))


CASES = (*ON_FOUR, *MIXED, "out of order", "side by side")


def test_every_schedule_that_runs_is_here() -> None:
    assert {jobs()[case].strategy.schedule for case in CASES} == set(SCHEDULES_RUN)


@pytest.mark.parametrize("case", CASES)
def test_trains_as_one_device_does(case: str) -> None:
    check = runs()[case].check
    assert check is not None
    assert check.tolerance == 1e-10
    assert check.passed, check
    assert check.num_gradients == len({instance.name for instance in parameter_instances(model("deep"))})


@pytest.mark.parametrize("case", CASES)
def test_runs_in_the_order_of_its_table(case: str) -> None:
    one = jobs()[case]
    table = strategy_table(one.strategy, one.strategy.num_microbatches(one.workload))
    assert [[ran.action for ran in row] for row in runs()[case].timeline] == [list(map(str, row)) for row in table]


@pytest.mark.parametrize("case", ON_FOUR)
def test_times_of_all_processes_are_of_one_clock(case: str) -> None:
    timeline = runs()[case].timeline
    assert min(row[0].start_s for row in timeline) == 0.0
    for row in timeline:
        for before, after in pairwise(row):
            assert before.start_s < before.end_s <= after.start_s
    spans = {ran.action: ran for row in timeline for ran in row}
    # A forward starts after that of the stage before, which is another process, has ended.
    pairs = [(ran, spans.get(_next_forward(ran.action))) for ran in spans.values() if "F" in ran.action]
    waited = [after.start_s - before.end_s for before, after in pairs if after is not None]
    assert len(waited) >= 10
    assert min(waited) > 0


def _next_forward(action: str) -> str:
    one = parse_action(action)
    return "" if one.microbatch is None else f"{one.stage + 1}F{one.microbatch}"


def test_what_is_not_recorded_has_no_timeline() -> None:
    assert runs()[FEW].timeline == ()
    assert runs()[FEW].bubble_fraction is None


def test_bubble_is_the_idle_share_of_the_longest_span() -> None:
    # Rank 0 is busy 1 + 2 of its span of 6, rank 1 is busy 3 of 3: (2 x 6 - 6) / (2 x 6) = 1/2.
    timeline = ((Ran("0F0", 0.0, 1.0), Ran("0B0", 4.0, 6.0)), (Ran("1F0", 1.0, 2.0), Ran("1B0", 2.0, 4.0)))
    assert Measurement((), 1.0, (), 0.0, timeline=timeline).bubble_fraction == 0.5


def test_a_step_holds_no_message_longer_than_needed() -> None:
    """1F1B holds as many microbatches however many there are: 16 more are their tokens, labels and losses, and a buffer
    each for what a rank receives, which the library keeps, but nothing for what it sends."""
    few, many = (runs()[case].rank_memory_bytes for case in (FEW, MANY))
    boundary_bytes, token_bytes = 64 * 16 * 8, 2 * 64 * 8  # seq x hidden x float64; tokens and labels of 8 bytes
    for before, after in zip(few, many, strict=True):
        assert after - before == pytest.approx(16 * (boundary_bytes + token_bytes), rel=0.05)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["PipeDream", "PipeDream-2BW"])
def test_asynchronous_schedules_are_predicted_only(name: str) -> None:
    with pytest.raises(InputError) as error:
        run_many([job("deep", f"pp=4,schedule={name}")])
    assert f"schedule = {name}: is predicted only; schedules that can be run: GPipe, 1F1B, " in str(error.value)
    assert "(nearest: 1F1B)" in str(error.value)


def test_forwards_alone_are_no_step() -> None:
    with pytest.raises(InputError, match="schedule = ForwardOnly"):
        run_many([job("deep", "pp=4,schedule=ForwardOnly")])


def test_tables_with_messages_are_refused() -> None:
    rows = ("0F0,0SEND_F0,0RECV_B0,0B0,0REDUCE_GRAD", "1RECV_F0,1F0,1B0,1SEND_B0")
    one = _with_table(job("deep", "pp=2,mbs=8"), rows)
    (problem,) = run_problems(one.graph, one.strategy, one.workload)
    assert problem.where == "table"
    assert problem.value == "0SEND_F0, 0RECV_B0, 0REDUCE_GRAD, 1RECV_F0"
    assert problem.rule == "is not run from a table: messages and state follow from the computations"


# --- a backward in two ----------------------------------------------------------------------------------------------


def product(*inputs: str, output: str) -> Operator:
    """A product of tensors whose dims have names of one letter."""
    spec = f"{', '.join(map(' '.join, inputs))} -> {' '.join(output)}"
    return Operator("product", "einsum", spec, tuple(f"x{index}" for index, _ in enumerate(inputs)), ("y",))


@pytest.mark.parametrize("weight", [0, 1])
def test_the_gradient_of_a_weight_waits(weight: int) -> None:
    sides = ("bsh", "hnk") if weight else ("hnk", "bsh")
    operator = product(*sides, output="bsnk")
    generator = torch.Generator().manual_seed(7)
    sizes = {"b": 2, "s": 3, "h": 4, "n": 5, "k": 6}
    shapes = [[sizes[dim] for dim in side] for side in sides]
    operands = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]
    plain = torch.einsum(f"{','.join(sides)}->bsnk", *operands)
    expected = torch.autograd.grad(plain.square().sum(), operands)
    landing = Landing(Later())
    made = multiply_later(operator, (landing, 0), weight, *operands)
    assert torch.equal(made, plain)
    made.square().sum().backward()
    assert operands[weight].grad is None
    torch.testing.assert_close(operands[1 - weight].grad, expected[1 - weight], rtol=1e-12, atol=1e-12)
    ((position, late),) = landing.products
    assert position == 0
    torch.testing.assert_close(late(), expected[weight], rtol=1e-12, atol=1e-12)


def test_what_is_summed_in_one_operand_alone_cannot_wait() -> None:
    assert can_wait(product("bsh", "hf", output="bsf"))
    assert not can_wait(product("bsh", "hf", output="bs"))  # f is summed in the weight alone
    assert not can_wait(product("bsh", "bsh", "hf", output="f"))


def test_no_leaf_has_a_gradient_before_w() -> None:
    rank = Rank(job("deep", "schedule=ZB-H1", steps=1), 0)
    (stage,) = rank.stages.values()
    inputs = {name: x[:1] for name, x in rank.data.inputs(0).items()}
    stage(inputs.pop("tokens"), **inputs).sum().backward()
    assert all(group.leaf.grad is None for group in rank.state.groups)
    assert stage.later is not None
    stage.later.take()()
    assert all(group.leaf.grad.abs().max() > 0 for group in rank.state.groups)
    assert stage.later.works == []


@pytest.mark.parametrize("module", [pipeline, record])
def test_examples_in_the_runtime_run(module: object) -> None:
    found = doctest.testmod(module)  # type: ignore[arg-type]
    assert found.attempted > 0
    assert found.failed == 0
