"""What zero-bubble schedules gain over 1F1B in the settings of their paper: `python -m meshwright.bench.zero_bubble`.

Qi et al. 2023 (arXiv:2401.10241, section 5.1) train four GPT-like models on A100s, 8 a node, pipelines alone: 22, 30,
46 and 62 layers (2 fewer than a multiple of the ranks, for the embedding and the head), sequences of 1,024. Beside
each simulated gain stands that of the paper's formulas with F = I = W: a bubble of (p - 1)/(m + p - 1) of a 1F1B step,
of which ZB-H1 leaves a third and ZB-H2 and ZB-V none.
"""

from __future__ import annotations

from dataclasses import dataclass

from meshwright.cluster import preset_cluster
from meshwright.cost.analytic import Case
from meshwright.engine import load_engine
from meshwright.io.models import graph_from_config
from meshwright.sim.evaluators import evaluate
from meshwright.strategy import legal_strategy, parse_shorthand
from meshwright.workload import Workload

SEQ_LEN = 1024


@dataclass(frozen=True)
class Setting:
    """A model of the paper, its pipeline and its microbatch in sequences."""

    name: str
    layers: int
    heads: int
    hidden: int
    ranks: int
    microbatch: int
    num_microbatches: tuple[int, ...]


SETTINGS = (
    Setting("1.5B", 22, 24, 2304, 8, 6, (24, 32, 64)),
    Setting("6.2B", 30, 32, 4096, 8, 3, (24, 32, 64)),
    Setting("14.6B", 46, 40, 5120, 16, 1, (48, 64, 128)),
    Setting("28.3B", 62, 48, 6144, 32, 1, (96, 128, 256)),
)

#: Schedules that are compared, and the share of a 1F1B step's bubble that their formulas leave.
LEFT = {"ZB-H1": 1 / 3, "ZB-H2": 0.0, "ZBVZeroBubble": 0.0}


@dataclass(frozen=True)
class Gain:
    """How many times as fast as 1F1B a schedule is: simulated, and by the paper's formulas."""

    setting: str
    ranks: int
    num_microbatches: int
    schedule: str
    simulated: float
    formula: float


def gains_of(setting: Setting, num_microbatches: int) -> list[Gain]:
    """The gain of each schedule in one setting."""
    config = {
        "model_type": "gpt2",
        "n_layer": setting.layers,
        "n_embd": setting.hidden,
        "n_head": setting.heads,
        "vocab_size": 51200,
        "n_positions": SEQ_LEN,
    }
    graph = graph_from_config(config, name=f"gpt-{setting.name}")
    cluster = preset_cluster(f"dgx-a100x{setting.ranks // 8}")
    workload = Workload(setting.microbatch * num_microbatches, SEQ_LEN)
    engine = load_engine("megatron-core")

    def step_s(schedule: str) -> float:
        vpp = 2 if schedule == "ZBVZeroBubble" else 1
        text = f"pp={setting.ranks},mbs={setting.microbatch},vpp={vpp},schedule={schedule}"
        strategy = legal_strategy(parse_shorthand(text), graph, setting.ranks, workload)
        return evaluate(Case(graph, cluster, strategy, workload, engine), "simulated").step_time_s

    m, p = num_microbatches, setting.ranks
    base_s = step_s("1F1B")
    return [
        Gain(setting.name, p, m, name, base_s / step_s(name), (m + p - 1) / (m + left * (p - 1)))
        for name, left in LEFT.items()
    ]


def main() -> None:
    """Print all gains."""
    print(f"{'model':8}{'ranks':>6}{'m':>5}  {'schedule':16}{'simulated':>10}{'formula':>9}")
    for setting in SETTINGS:
        for m in setting.num_microbatches:
            for gain in gains_of(setting, m):
                place = f"{gain.setting:8}{gain.ranks:6}{gain.num_microbatches:5}"
                told = f"{gain.schedule:16}{gain.simulated - 1:+10.1%}{gain.formula - 1:+9.1%}"
                print(f"{place}  {told}", flush=True)


if __name__ == "__main__":
    main()
