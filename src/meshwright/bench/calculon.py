"""Calculon's own validation, side by side: eight published steps, what Calculon says of them and what we say.

The steps are Megatron-LM's on A100 (Korthikanti et al. 2205.05198, table 5); Calculon (caa4b11) ships them as its
`llm-validation`, and its errors are what that prints. `python -m meshwright.bench.calculon` prints the table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import estimate
from meshwright.engine import load_engine
from meshwright.io.models import load_model
from meshwright.strategy import legal_strategy, parse_shorthand
from meshwright.workload import Workload

ENGINE, PRECISION, SEQ_LEN = "megatron-lm", "float16", 2048


@dataclass(frozen=True)
class PublishedStep:
    """A measured step on nodes of eight A100, and Calculon's error: predicted over measured, less 1."""

    model: str
    num_nodes: int
    shorthand: str
    global_batch: int
    measured_s: float
    calculon_error: float


_22B = ("megatron-22b", 1, "tp=8,mbs=4")
_175B = ("gpt3-175b", 8, "tp=8,pp=8,vpp=3,schedule=Interleaved1F1B")
_530B = ("mt-nlg-530b", 35, "tp=8,pp=35,vpp=3,schedule=Interleaved1F1B")
_1T = ("megatron-1t", 64, "tp=8,pp=64")


def _step(
    setup: tuple[str, int, str], recompute: str, global_batch: int, measured_s: float, error: float
) -> PublishedStep:
    model, num_nodes, degrees = setup
    return PublishedStep(model, num_nodes, f"{degrees},{recompute}", global_batch, measured_s, error)


FULL, SELECTIVE = "recompute=full", "recompute=selective,sp=1"

PUBLISHED = (
    _step(_22B, FULL, 4, 1.42, -0.0172),
    _step(_22B, SELECTIVE, 4, 1.10, 0.0333),
    _step(_175B, FULL, 64, 18.13, -0.0056),
    _step(_175B, SELECTIVE, 64, 13.75, -0.0081),
    _step(_530B, FULL, 280, 49.05, 0.0172),
    _step(_530B, SELECTIVE, 280, 37.83, -0.0887),
    _step(_1T, FULL, 512, 94.42, -0.0460),
    _step(_1T, SELECTIVE, 512, 71.49, -0.0762),
)


@dataclass(frozen=True)
class SideBySide:
    """A published step and our prediction of it."""

    published: PublishedStep
    predicted_s: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_s / self.published.measured_s - 1


def side_by_side() -> tuple[SideBySide, ...]:
    """Our prediction of each step, as `estimate --engine megatron-lm --precision float16` makes it."""
    return tuple(SideBySide(step, predicted_s(step)) for step in PUBLISHED)


def predicted_s(step: PublishedStep) -> float:
    """Seconds that we predict."""
    graph, cluster = load_model(step.model), preset_cluster(f"dgx-a100x{step.num_nodes}")
    workload = Workload(step.global_batch, SEQ_LEN, PRECISION)
    strategy = legal_strategy(parse_shorthand(step.shorthand), graph, cluster.num_devices, workload)
    return estimate(graph, cluster, strategy, workload, load_engine(ENGINE)).step_time_s


def mean_and_most(errors: Iterable[float]) -> tuple[float, float]:
    """The mean and the largest magnitude.

    >>> mean_and_most([0.25, -0.75])
    (0.5, 0.75)
    """
    sizes = [abs(error) for error in errors]
    return sum(sizes) / len(sizes), max(sizes)


def table(rows: Sequence[SideBySide]) -> str:
    """The comparison as Markdown."""
    lines = ["| model | GPUs | strategy | measured | Calculon | Meshwright |", "|---|---|---|---|---|---|"]
    for row in rows:
        step = row.published
        calculon_s = step.measured_s * (1 + step.calculon_error)
        lines.append(
            f"| {step.model} | {8 * step.num_nodes} | {step.shorthand} | {step.measured_s:.2f} s "
            f"| {calculon_s:.2f} s ({step.calculon_error:+.1%}) | {row.predicted_s:.2f} s ({row.error:+.1%}) |"
        )
    theirs = mean_and_most(row.published.calculon_error for row in rows)
    ours = mean_and_most(row.error for row in rows)
    errors = " | ".join(f"{mean:.2%}, {most:.2%}" for mean, most in (theirs, ours))
    return "\n".join([*lines, f"| error: mean, largest | | | | {errors} |"])


if __name__ == "__main__":
    print(table(side_by_side()))
