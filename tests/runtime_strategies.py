"""Strategies that the runtime is held to: a fixed set of products, and a sampler of legal shorthands."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache

from meshwright.graph import Graph
from meshwright.io.models import graph_from_config, load_model
from meshwright.results import Measurement
from meshwright.runtime.launch import run_many
from meshwright.runtime.refuse import SCHEDULES_RUN, run_problems
from meshwright.runtime.train import Job
from meshwright.strategy import CUSTOM, Recompute, Shorthand, expand, parse_shorthand
from meshwright.workload import Workload

WORKLOAD = Workload(global_batch=8, seq_len=16, precision="float64")

#: An odd vocabulary (not even a multiple of 2) and an odd number of layers: pieces and stages are unequal.
UNEVEN = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 48,
    "vocab_size": 61,
    "tie_word_embeddings": True,
}

#: Two stages on each of four ranks are eight, and it has no block more; embedding and head are one tensor.
DEEP = {**UNEVEN, "hidden_size": 16, "num_hidden_layers": 6, "head_dim": 4, "intermediate_size": 24}

#: Per model, what each entry is there for; those of one model run out of one worker and share one reference.
PRODUCTS: dict[str, tuple[str, ...]] = {
    "llama-tiny": (
        "dp=2,zero=1",
        "dp=2,zero=2,mbs=2",
        "dp=4,dp_shard=2,zero=3,recompute=selective",
        "tp=2,sp=1,mbs=2,recompute=full",
        "tp=4,sp=1,mbs=4",  # more ranks than key/value heads
        "pp=2,schedule=GPipe,mbs=2",
        "pp=2,tp=2,dp=2,zero=1,sp=1,mbs=2",
        "pp=2,tp=2,dp=2,zero=3,recompute=full,mbs=2",
        "dp=4,dp_shard=2,tp=2,zero=3,sp=1,mbs=2",
        "dp=2,cp=2,tp=2,zero=1,sp=1,mbs=4",  # state sharded over data and context
    ),
    "qwen2-tiny": (
        "tp=2,dp=2,zero=2,mbs=2",
        "pp=4,mbs=4",  # 1F1B with fewer microbatches than stages; tied embeddings at both ends
        "pp=2,vpp=2,dp=2,zero=3,schedule=Interleaved1F1B",
        "pp=2,tp=4,sp=1,mbs=4,schedule=GPipe",
    ),
    "gpt2-tiny": (
        "tp=2,dp=2,zero=3,sp=1,mbs=2",
        "pp=6,mbs=2",  # embedding and head are stages of their own
        "pp=2,vpp=2,dp=4,dp_shard=2,zero=2,schedule=Interleaved1F1B,recompute=selective",
    ),
    "uneven": (
        "tp=2,sp=1,mbs=2,recompute=selective",  # a padded vocabulary; norms of heads
        "tp=4,mbs=4",
        "pp=3,mbs=2,zero=0",
        "pp=2,dp=2,zero=2,mbs=2",
    ),
}


@cache
def model(name: str) -> Graph:
    """A tiny model by its name here."""
    configs = {"uneven": UNEVEN, "deep": DEEP}
    return graph_from_config(dict(configs[name]), name=name) if name in configs else load_model(name)


def job(name: str, shorthand: str | Shorthand, workload: Workload = WORKLOAD, steps: int = 3) -> Job:
    """A checked job of three steps."""
    parsed = parse_shorthand(shorthand) if isinstance(shorthand, str) else shorthand
    return Job(model(name), expand(parsed, model(name)), workload, steps, check=True)


def run_checked(jobs: Sequence[Job]) -> list[Measurement]:
    """Run jobs out of one worker."""
    return run_many(jobs)


def sampled(seed: int, count: int) -> list[tuple[str, Shorthand]]:
    """`count` distinct legal shorthands on 2 to 8 processes, each with a model."""
    generator = random.Random(seed)
    found: list[tuple[str, Shorthand]] = []
    while len(found) < count:
        name = generator.choice(list(PRODUCTS))
        tp, pp, dp = (generator.choice((1, 1, 2, 4)) for _ in range(3))
        cp = generator.choice((1, 1, 1, 2))
        vpp = generator.choice((1, 2)) if pp > 1 else 1
        zero = generator.choice((0, 1, 2, 3))
        candidate = Shorthand(
            tp=tp,
            pp=pp,
            dp=dp,
            cp=cp,
            mbs=generator.choice((2, 4)),
            vpp=vpp,
            schedule=generator.choice([name for name in SCHEDULES_RUN if name != CUSTOM]),
            zero=zero,
            recompute=generator.choice(list(Recompute)),
            sp=generator.choice((0, 1)),
            dp_shard=2 if zero and dp == 4 and generator.random() < 0.5 else 0,
        )
        legal = 2 <= candidate.num_devices <= 8 and (name, candidate) not in found
        if legal and not run_problems(model(name), expand(candidate, model(name)), WORKLOAD):
            found.append((name, candidate))
    return found
