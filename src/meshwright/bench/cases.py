"""A run's `Setup` becomes a `Case`: the graph, cluster, strategy, workload and engine that an evaluator asks for.

A blank cell is the engine's documented default, and the case says so; a run that breaks a rule of ours is built all the
same, and the case names the rule.

What the columns leave out of a mixture of experts (shared experts, first dense layers, latent attention, windows) comes
from the published model of that name, if its outline is the row's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

from meshwright.bench.runs import ACCELERATORS, NotExpressible, Setup, read_precision, read_state
from meshwright.cluster import (
    Cluster,
    ClusterTemplate,
    Device,
    DeviceGroup,
    Level,
    LinkKind,
    Quantity,
    cluster_templates,
)
from meshwright.cost.analytic import Case
from meshwright.engine import Defaults, load_engine
from meshwright.graph import Graph, Segment
from meshwright.io.decoder import Decoder, Experts, Layer, Norm, Rotary, decoder_graph
from meshwright.io.inputs import check_model_takes
from meshwright.io.models import load_decoder
from meshwright.strategy import (
    BlockRange,
    Recompute,
    Shorthand,
    Stage,
    Strategy,
    blocks_per_stage,
    expand,
    nearest_divisor,
    spread_experts,
    strategy_problems,
)
from meshwright.units import GiB
from meshwright.workload import Workload

# --- a case: everything that an evaluator asks for ------------------------------------------------------------------


class _Notes:
    """Assumptions as they are made."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def add(self, text: str) -> None:
        self.lines.append(text)

    def filled(self, column: str, given: Any, default: Any, why: str) -> Any:
        """The cell's value, or the default of a blank one, noted."""
        if given not in (None, ""):
            return given
        self.add(f"{column} is blank: {default}, {why}")
        return default


def case_of(setup: Setup) -> tuple[Case, tuple[str, ...]]:
    """A run as an evaluator sees it, and in words what was assumed to get there; raises `NotExpressible` or
    `InputError` where no strategy of ours can say it.

    The strategy need not be legal: the rules that it breaks are among the assumptions.
    """
    notes = _Notes()
    engine_name = notes.filled("engine", setup.engine, "unknown", "a generic engine")
    engine = load_engine(engine_name)
    habits = engine.defaults
    precision, products = read_precision(notes.filled("precision", setup.precision, "bf16", "the usual type"))
    shorthand = _shorthand(setup, habits, engine_name, notes)
    graph = _graph(_decoder(setup, habits, shorthand.tp, notes))
    workload = Workload(setup.global_batch_size, setup.seq_len, precision, product_precision=products)
    check_model_takes(graph, workload)
    strategy = _strategy(shorthand, graph, habits)
    _note_rules(strategy, graph, workload, shorthand, setup, notes)
    cluster = _cluster(setup, notes)
    whole = _whole_batch(workload, shorthand, notes)
    return Case(graph, cluster, strategy, whole, engine), tuple(notes.lines)


@lru_cache(maxsize=256)
def _graph(decoder: Decoder) -> Graph:
    """One graph for each distinct shape; what is derived from it is kept with it."""
    return decoder_graph(decoder)


def _whole_batch(workload: Workload, shorthand: Shorthand, notes: _Notes) -> Workload:
    """A batch of whole microbatches: what is left over takes as long as a full one."""
    one = shorthand.mbs * shorthand.dp
    rounded = -(-workload.global_batch // one) * one
    if rounded != workload.global_batch:
        notes.add(f"the global batch of {workload.global_batch} is no multiple of {one}: computed as {rounded}")
    return replace(workload, global_batch=rounded)


# --- model ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """What the columns leave out of a model, known by the beginning of its name."""

    names: tuple[str, ...]
    gated: bool
    tied: bool = False
    norm: Literal["rms", "layer"] = "rms"
    biases: bool = False
    qkv_bias: bool = False
    positions: Literal["rotary", "learned", "alibi"] = "rotary"
    activation: str = "silu"
    head_dim: int = 0
    qk_norm: bool = False


_GPT = Family(("gpt", "opt", "megatron"), False, True, "layer", True, True, "learned", "gelu_tanh")
_LLAMA = Family(("llama", "mistral", "mixtral", "internlm", "yi", "baichuan", "deepseek", "kimi"), True)

#: [spec] the families' published configs; the first whose name begins the model's is meant.
FAMILIES = (
    Family(("gpt-oss",), True, qkv_bias=True, head_dim=64),
    _GPT,
    Family(("bloom",), False, True, "layer", True, True, "alibi", "gelu_tanh"),
    Family(("mpt",), False, True, "layer", positions="learned", activation="gelu"),
    Family(("falcon",), False, True, "layer", activation="gelu"),
    Family(("nemotron",), False, False, "layer", activation="relu2"),
    Family(("gemma",), True, True, activation="gelu_tanh", head_dim=256),
    Family(("qwen3",), True, head_dim=128, qk_norm=True),
    Family(("qwen",), True, qkv_bias=True),
    _LLAMA,
)

#: A family's habits stand where they give the printed number of parameters within this share.
PARAMETER_TOLERANCE = 0.02


def _decoder(setup: Setup, habits: Defaults, tp: int, notes: _Notes) -> Decoder:
    multiple = habits.vocab_multiple * tp
    fused = setup.flash_attention == "y"
    if setup.flash_attention in ("", "unknown"):
        fused = habits.fused_attention
        notes.add(f"flash_attention is not printed: {'y' if fused else 'n'}, the engine's default")
    decoder = _published(setup) if setup.experts else None
    return replace(
        decoder or _outlined(setup, habits, notes),
        name=setup.model or "model",
        vocab=-(-setup.vocab // multiple) * multiple,
        attention="fused" if fused else "unfused",
    )


#: Presets of mixtures of experts.
MIXTURES = (
    "deepseek-v3", "kimi-k2", "gpt-oss-120b", "qwen3-30b-a3b", "qwen3-235b-a22b", "qwen2-57b-a14b", "mixtral-8x22b",
    "mixtral-8x7b",
)  # fmt: skip


@lru_cache(maxsize=1)
def _mixtures() -> dict[str, Decoder]:
    return {name: load_decoder(name) for name in MIXTURES}


def _published(setup: Setup) -> Decoder | None:
    """The published model of a row's name, where it has the row's outline."""
    found = next((own for name, own in _mixtures().items() if setup.model.lower().startswith(name)), None)
    if found is None or found.experts is None:
        return None
    num_layers = sum(len(segment.blocks) * segment.repeat for segment in found.segments)
    outline = (num_layers, found.hidden, found.kv_heads * found.group, found.experts.count, found.experts.topk)
    said = (setup.layers, setup.hidden, setup.heads, setup.experts, setup.topk or found.experts.topk)
    return found if outline == said and found.ffn == (setup.ffn_hidden or found.ffn) else None


def _outlined(setup: Setup, habits: Defaults, notes: _Notes) -> Decoder:
    """The model that the columns describe, with the habits of its family."""
    family = _family(setup, notes)
    kv_heads = notes.filled("kv_heads", setup.kv_heads, setup.heads, "one for each head")
    if setup.heads % kv_heads:
        notes.add(f"{kv_heads} kv heads do not divide {setup.heads} heads: {setup.heads} of them")
        kv_heads = setup.heads
    head_dim = family.head_dim or -(-setup.hidden // setup.heads)
    if not family.head_dim and setup.hidden % setup.heads:
        notes.add(f"{setup.heads} heads do not divide hidden {setup.hidden}: head size {head_dim}")
    dropout = habits.dropout if family.names == _GPT.names else 0.0
    rotary = Rotary(10000.0, head_dim) if family.positions == "rotary" else None
    return Decoder(
        name="",
        hidden=setup.hidden,
        kv_heads=kv_heads,
        group=setup.heads // kv_heads,
        head_dim=head_dim,
        ffn=_ffn(setup, family.gated, notes),
        vocab=setup.vocab,
        layers=(Layer(rotary=rotary, sparse=setup.experts is not None),),
        segments=(Segment(("layer",), setup.layers),),
        positions=setup.seq_len if family.positions == "learned" else 0,
        tied=family.tied,
        norm=Norm(family.norm, bias=family.biases),
        alibi="plain" if family.positions == "alibi" else "none",
        qkv_bias=family.qkv_bias,
        out_bias=family.biases,
        mlp_bias=family.biases,
        qk_norm=Norm() if family.qk_norm else None,
        activation=family.activation,
        gated=family.gated,
        experts=_experts(setup, notes),
        embedding_dropout=dropout,
        attention_dropout=dropout,
        residual_dropout=dropout,
        mlp_dropout=dropout,
    )


def _experts(setup: Setup, notes: _Notes) -> Experts | None:
    if setup.experts is None:
        return None
    notes.add("a mixture of experts by its outline: no shared experts, every layer sparse, plain attention")
    return Experts(setup.experts, min(notes.filled("topk", setup.topk, 2, "the usual number"), setup.experts))


def _ffn(setup: Setup, gated: bool, notes: _Notes) -> int:
    usual = -(-8 * setup.hidden // 3) if gated else 4 * setup.hidden
    value: int = notes.filled("ffn_hidden", setup.ffn_hidden, usual, "the usual width")
    return value


def _family(setup: Setup, notes: _Notes) -> Family:
    """The family by name; its gate and its tied tables by the printed number of parameters where they disagree."""
    name = setup.model.lower()
    known = next((family for family in FAMILIES if name.startswith(family.names)), None)
    family = known or _LLAMA
    if setup.params_b is None:
        if known is None:
            notes.add(f"model {setup.model!r} is of no family that we know: taken as Llama's")
        return family
    printed = setup.params_b * 1e9
    if known and abs(num_parameters(setup, family) / printed - 1) <= PARAMETER_TOLERANCE:
        return family
    gates = (family.gated,) if known else (True, False)
    options = [replace(family, gated=gated, tied=tied) for gated in gates for tied in (family.tied, not family.tied)]
    best = min(options, key=lambda option: abs(num_parameters(setup, option) - printed))
    if known is None or best.tied != family.tied:
        tables = "tied" if best.tied else "untied"
        gate = "a gated MLP" if best.gated else "a plain MLP"
        notes.add(f"{gate} and {tables} embeddings, from params_b = {setup.params_b:g}")
    return best


def num_parameters(setup: Setup, family: Family) -> float:
    """Weights of the matrices and tables: enough to tell a gated MLP from a plain one, and tied tables from two."""
    kv_heads = setup.kv_heads or setup.heads
    head_dim = family.head_dim or setup.hidden / setup.heads
    attention = 2 * setup.hidden * head_dim * (setup.heads + kv_heads)
    ffn = setup.ffn_hidden or setup.hidden * (8 / 3 if family.gated else 4)
    mlp = (3 if family.gated else 2) * setup.hidden * ffn * (setup.experts or 1)
    tables = (1 if family.tied else 2) * setup.vocab + (setup.seq_len if family.positions == "learned" else 0)
    return setup.layers * (attention + mlp) + tables * setup.hidden


# --- strategy -------------------------------------------------------------------------------------------------------


def _shorthand(setup: Setup, habits: Defaults, engine: str, notes: _Notes) -> Shorthand:
    """The degrees of a run; what is blank and matters is noted."""
    why = f"the default of {engine}"
    mbs = setup.microbatch_size
    if mbs is None:
        if not habits.microbatch:
            raise NotExpressible(f"microbatch_size is blank, and {engine} documents no default")
        mbs = notes.filled("microbatch_size", None, habits.microbatch, why)
    tp, pp, cp = (notes.filled(name, getattr(setup, name), 1, "not used") for name in ("tp", "pp", "cp"))
    dp = notes.filled("dp", setup.dp, setup.n_devices // (tp * pp * cp), "what the other degrees leave")
    ep, etp = _expert_degrees(setup, habits, tp=tp, dp=dp, cp=cp, notes=notes)
    vpp = notes.filled("vpp", setup.vpp, 1, why) if pp > 1 else 1
    sp = setup.sequence_parallel == "y"
    if tp > 1 and not setup.sequence_parallel:
        sp = habits.sequence_parallel
        notes.add(f"sequence_parallel is blank: {'y' if sp else 'n'}, {why}")
    state = setup.zero_stage_or_fsdp or habits.zero
    if dp > 1:
        notes.filled("zero_stage_or_fsdp", setup.zero_stage_or_fsdp, habits.zero, why)
    zero, shard = read_state(state)
    return Shorthand(
        tp=tp,
        pp=pp,
        dp=dp,
        cp=cp,
        ep=ep,
        etp=etp,
        mbs=mbs,
        vpp=vpp,
        schedule=_schedule(setup, pp, vpp, notes),
        zero=zero,
        recompute=Recompute(notes.filled("recompute", setup.recompute, "none", why)),
        sp=int(sp and tp > 1),
        dp_shard=_shard_group(dp, shard, spread_experts(ep, tp=tp, cp=cp, over_tp=etp == 1).axis, notes) if zero else 0,
    )


def _expert_degrees(setup: Setup, habits: Defaults, *, tp: int, dp: int, cp: int, notes: _Notes) -> tuple[int, int]:
    """The degrees `ep` and `etp` of a run, as near to what the row says as a mesh can be."""
    wanted = setup.ep or 1
    if setup.experts is None or wanted == 1:
        if wanted > 1:
            notes.add(f"ep={wanted} of a model without experts: taken as 1")
        return 1, 0
    num_ranks = dp * cp
    over_tp = tp > 1 and wanted % tp == 0 and (habits.folds_experts or num_ranks % wanted != 0)
    most = math.gcd(num_ranks * tp if over_tp else num_ranks, setup.experts)
    ep = nearest_divisor(most, wanted)
    spread = spread_experts(ep, tp=tp, cp=cp, over_tp=over_tp)
    if dp % spread.axis or (over_tp and "tp" not in spread.over):
        ep, over_tp = nearest_divisor(math.gcd(dp, setup.experts), wanted), False
    if ep != wanted:
        notes.add(f"ep={wanted} with dp={dp}, cp={cp}, tp={tp} and {setup.experts} experts: taken as {ep}")
    elif over_tp and not habits.folds_experts:
        notes.add(f"ep={wanted} is spread over the tensor-parallel ranks too: dp*cp = {num_ranks}")
    return ep, int(over_tp)


def _shard_group(dp: int, wanted: int, axis: int, notes: _Notes) -> int:
    """Ranks over which state is sharded: a divisor of `dp`, and a multiple of the `axis` over which experts are."""
    group = axis * nearest_divisor(dp // axis, max(wanted // axis, 1)) if wanted else 0
    if group != wanted:
        notes.add(f"state sharded over {wanted} of dp={dp} ranks: taken as {group}")
    return group


#: The schedules of the paper that the words mean: with the memory of 1F1B, and with twice that.
ZERO_BUBBLE = {"zero_bubble_1p": "ZB-H1", "zero_bubble_2p": "ZB-H2"}


def _schedule(setup: Setup, pp: int, vpp: int, notes: _Notes) -> str:
    schedule = "Interleaved1F1B" if vpp > 1 and pp > 1 else "1F1B"
    words = setup.schedule
    if pp == 1:
        return schedule
    if words in ZERO_BUBBLE and vpp == 1:
        return ZERO_BUBBLE[words]
    if not words:
        notes.add(f"schedule is blank: {schedule}, by its {vpp} stages a rank")
    elif words.startswith("interleaved") != (vpp > 1) or words in ZERO_BUBBLE:
        notes.add(f"schedule {words} with {vpp} stages a rank: taken as {schedule}")
    elif words.endswith("(modified)"):
        notes.add(f"schedule {words}: taken as {schedule}, how it was modified is not printed")
    return schedule


def _strategy(shorthand: Shorthand, graph: Graph, habits: Defaults) -> Strategy:
    if shorthand.pp == 1 and shorthand.vpp > 1:
        shorthand = replace(shorthand, vpp=1)
    num_stages = shorthand.pp * shorthand.vpp
    counts = blocks_per_stage(graph, num_stages)
    if habits.stages == "cost" and num_stages > 1:
        counts = _counts_by_cost(graph, num_stages)
    # One rank's stages first: `expand` cannot spread blocks over more stages than there are.
    strategy = expand(replace(shorthand, vpp=1, schedule="1F1B"), graph)
    return replace(strategy, stages=_stages(counts, shorthand.pp), schedule=shorthand.schedule)


def _counts_by_cost(graph: Graph, num_stages: int) -> list[int]:
    """Blocks per stage as nanotron splits them: a stage ends with the layer with which the running cost reaches the
    share of all stages so far; the head is on the last.

    [spec: nanotron, models/base.py and get_block_compute_costs] a layer costs the weights of its products, the head
    vocabulary x hidden, the embedding nothing. [fit: measured_runs.csv] that the head is always on the last stage:
    step times of 16 and 32 stages say so.
    """
    dims = graph.dims
    heads = dims["kv_heads"] * dims.get("group", 1) * dims["head_dim"]
    layer = 4 * heads * dims["hidden"] + 3 * dims["ffn"] * dims["hidden"]
    total = graph.num_layers * layer + dims["vocab"] * dims["hidden"]
    counts, stage = [1] + [0] * (num_stages - 1), 0
    for number in range(1, graph.num_layers + 1):
        counts[stage] += 1
        if stage < num_stages - 1 and number * layer * num_stages >= total * (stage + 1):
            stage += 1
    counts[-1] += 1
    return counts


def _stages(counts: Sequence[int], pipeline_size: int) -> tuple[Stage, ...]:
    stages, start = [], 0
    for index, count in enumerate(counts):
        held = (BlockRange(start, start + count),) if count else ()
        stages.append(Stage(index % pipeline_size, held))
        start += count
    return tuple(stages)


def _note_rules(
    strategy: Strategy, graph: Graph, workload: Workload, shorthand: Shorthand, setup: Setup, notes: _Notes
) -> None:
    """Name every rule of ours that a run breaks; it is predicted all the same."""
    num_stages, m = len(strategy.stages), -(-workload.global_batch // (shorthand.mbs * shorthand.dp))
    if graph.num_layers % num_stages:
        notes.add(f"{graph.num_layers} layers do not divide over {num_stages} stages: some hold one more")
    if graph.num_layers < num_stages:
        notes.add(f"more stages ({num_stages}) than layers ({graph.num_layers}): some hold none")
    if m < shorthand.pp:
        notes.add(f"fewer microbatches ({m}) than stages (pp={shorthand.pp})")
    if shorthand.tp > graph.dims["kv_heads"]:
        notes.add(f"more tensor-parallel ranks ({shorthand.tp}) than kv heads ({graph.dims['kv_heads']})")
    for problem in dict.fromkeys(strategy_problems(strategy, graph, setup.n_devices, workload)):
        notes.add(f"predicted although it breaks a rule: {problem}")


# --- cluster --------------------------------------------------------------------------------------------------------

#: Networks that give less than they say.
NETWORK_SHARE = {"omni-path": 1 / 3}  # [fit: measured_runs.csv] about a third of nominal

#: Seconds of a hop on networks that are slower to answer than InfiniBand.
NETWORK_LATENCY_S = {"efa": 4.5e-5}  # [fit: measured_runs.csv] rings of 16 and 32 ranks over 2 and 4 nodes

#: What the words of a network say of its kind.
NETWORK_KINDS = {
    "infiniband": LinkKind.SWITCH,
    "omni-path": LinkKind.SWITCH,
    "efa": LinkKind.ETHERNET,
    "roce": LinkKind.ETHERNET,
    "ethernet": LinkKind.ETHERNET,
}

#: A printed memory further than this from the preset's is another variant of the card.
MEMORY_TOLERANCE = 0.07

_RATE = re.compile(
    r"(?:(?P<cards>\d+)\s*x\s*)?(?P<Gbps>\d+(?:\.\d+)?)\s*G(?:bps|b/s)(?:\s*(?:/|per\s)\s*(?P<per>node|GPU|chip|device))?",
    re.IGNORECASE,
)


@lru_cache(maxsize=1)
def _templates() -> dict[str, ClusterTemplate]:
    return cluster_templates()


def _cluster(setup: Setup, notes: _Notes) -> Cluster:
    template = _template(setup)
    device = _memory_variant(template.device, setup.accelerator_memory_gb)
    group = DeviceGroup(device, setup.n_devices)
    return Cluster(template.name, (group,), _levels(setup, template, notes))


def _template(setup: Setup) -> ClusterTemplate:
    """The preset of the accelerator, of several the one whose memory is nearest."""
    templates = [_templates()[name] for name in ACCELERATORS[setup.accelerator]]
    wanted = setup.accelerator_memory_gb
    if wanted is None:
        return templates[0]
    return min(templates, key=lambda template: abs(template.device.memory_bytes.value / GiB - wanted))


def _memory_variant(device: Device, memory_gb: float | None) -> Device:
    if memory_gb is None or abs(device.memory_bytes.value / GiB / memory_gb - 1) <= MEMORY_TOLERANCE:
        return device
    source = f"[derived] the row's {memory_gb:g} GB, read as GiB"
    return replace(device, name=f"{device.name}, {memory_gb:g} GB", memory_bytes=Quantity(memory_gb * GiB, source))


def _levels(setup: Setup, template: ClusterTemplate, notes: _Notes) -> tuple[Level, ...]:
    """The domain of fast links and, where the run is larger, the network between domains."""
    inner, outer = template.levels[0], template.levels[-1]
    domain = _domain(setup, template, notes)
    first = replace(inner, group_size=domain)
    if domain == setup.n_devices:
        return (first,)
    per_node = setup.devices_per_node or template.devices_per_unit
    rate_Bps = device_rate_Bps(setup.inter_node_net, per_node)
    if rate_Bps is None:
        usual = f"{outer.bandwidth_Bps.value * 8 / 1e9:g} Gbps a device, the usual network of such a machine"
        notes.add(f"inter_node_net {setup.inter_node_net or 'is blank'}: {usual}")
        bandwidth = outer.bandwidth_Bps
    else:
        bandwidth = Quantity(rate_Bps, f"[spec] the row: {setup.inter_node_net}")
    words = setup.inter_node_net.lower()
    share = next((share for name, share in NETWORK_SHARE.items() if name in words), 1.0)
    latency = next(
        (Quantity(value, f"[fit] {name}") for name, value in NETWORK_LATENCY_S.items() if name in words),
        outer.latency_s,
    )
    kind = next((kind for name, kind in NETWORK_KINDS.items() if name in words), outer.kind)
    last = Level(outer.name, setup.n_devices, bandwidth, latency, kind, 1 / share)
    return (first, last)


def _domain(setup: Setup, template: ClusterTemplate, notes: _Notes) -> int:
    """Devices that fast links join: a node, a rack of NVL72, a slice of TPUs."""
    most = template.levels[0].group_size
    if template.counts == "node":
        most = notes.filled("devices_per_node", setup.devices_per_node, template.devices_per_unit, "as in the preset")
    if setup.n_devices <= most:
        return setup.n_devices
    return nearest_divisor(setup.n_devices, most) if template.counts == "rack" else most


def device_rate_Bps(text: str, devices_per_node: int) -> float | None:
    """Bytes per second and device of a network in words; None where they name no rate.

    A product of cards and a rate of Ethernet are a node's, a rate of InfiniBand without more is a card's, and each
    device has one.

    >>> device_rate_Bps("RoCE 4x100Gbps/node", 8), device_rate_Bps("NDR InfiniBand 400Gbps/GPU", 8)
    (6250000000.0, 50000000000.0)
    """
    match = _RATE.search(text)
    if match is None or float(match["Gbps"]) <= 0:
        return None
    rate_Bps = float(match["Gbps"]) * int(match["cards"] or 1) * 1e9 / 8
    per = (match["per"] or ("node" if match["cards"] or "infiniband" not in text.lower() else "device")).lower()
    return rate_Bps / devices_per_node if per == "node" else rate_Bps
