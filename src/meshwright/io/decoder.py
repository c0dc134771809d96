"""One record for all decoder-only transformers, and the operator graph that it means.

Families differ in some forty choices (norms, biases, rotary or learned positions, grouped heads, experts, parallel
branches). `Decoder` holds the choices and knows no family; `decoder_graph` writes the operators. Every reader of a
format (Hugging Face configs today) fills in a `Decoder`, so a graph is written in one place only.

Names: query heads are two dims, `kv_heads` x `group`; attention sees the sequence of the keys as `kv_seq`, which is
never split. What is left out: key/value caches, encoders and cross-attention, and the float32 statistics that norms
keep for their backward (the literature's activation formulas ignore them, Korthikanti 2205.05198 section 4.1).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meshwright.graph import Block, Graph, Operator, Role, Segment, Tensor

Attribute = str | int | float | bool
Dims = tuple[str, ...]

TOKENS: Dims = ("batch", "seq")
HIDDEN: Dims = (*TOKENS, "hidden")
QUERY: Dims = ("kv_heads", "group", "head_dim")
KEY: Dims = ("kv_heads", "head_dim")
SCORES: Dims = ("batch", "kv_heads", "group", "seq", "kv_seq")
ROUTED: Dims = ("experts", "batch", "rows")


@dataclass(frozen=True)
class Norm:
    """How a family normalises: `rms` or `layer`; `weight_offset` is 1 where the weight is stored as w - 1 (Gemma)."""

    variant: Literal["rms", "layer"] = "rms"
    eps: float = 1e-6
    weight: bool = True
    bias: bool = False
    weight_offset: float = 0.0


@dataclass(frozen=True)
class Rotary:
    """Rotary positions on the first `rotary_dim` of each head; `scaling` is JSON text, empty for the plain kind."""

    theta: float
    rotary_dim: int
    interleaved: bool = False
    scaling: str = ""


@dataclass(frozen=True)
class Experts:
    """A router that sends each token to `topk` of `count` feed-forward experts, beside one shared by all tokens, which
    is weighted by a number of each token where `shared_gate`. `bias`: of the router and of every expert's products."""

    count: int
    topk: int
    normalize: bool = True
    shared_ffn: int = 0
    shared_gate: bool = True
    bias: bool = False


@dataclass(frozen=True)
class Latent:
    """Keys and values (and queries, where `q_rank` is not 0) made from a narrow latent; the last `rope_dim` numbers of
    a key come straight from the input, the same for all heads (DeepSeek-V2, 2405.04434, section 2.1). `value_dim` is
    the size of a head's value."""

    kv_rank: int
    rope_dim: int
    value_dim: int
    q_rank: int = 0


@dataclass(frozen=True)
class Layer:
    """What may differ between the layers of one model; `window` counts the token itself, 0 is no window."""

    name: str = "layer"
    window: int = 0
    rotary: Rotary | None = None
    sparse: bool = False


@dataclass(frozen=True)
class Decoder:
    """All choices of a decoder-only transformer; the defaults are Llama's.

    `ffn` is the width of the feed-forward, of one expert where there are experts (dense layers then have `dense_ffn`).
    `positions` is the length of the learned position table, 0 where there is none. `embed` is the width of the token
    table where it is not `hidden`. `sinks`: a number per head joins the scores' softmax. `norm_place`: `pre` before
    each branch, `post` on its output before the residual is added, `sandwich` both, `after` behind the addition. Linear
    biases (`alibi`) are added to the scores, `scaled` with them or not. `qk_norm_scope`: one weight for all heads, one
    per head, or a norm over all heads at once.

    >>> tiny = Decoder("tiny", hidden=8, kv_heads=2, group=1, head_dim=4, ffn=16, vocab=32,
    ...                layers=(Layer(),), segments=(Segment(("layer",), 3),))
    >>> decoder_graph(tiny).num_parameters  # 2 tables of 256, 3 layers of 4*64 + 3*128 + 2*8, a norm of 8
    2488
    """

    name: str
    hidden: int
    kv_heads: int
    group: int
    head_dim: int
    ffn: int
    vocab: int
    layers: tuple[Layer, ...]
    segments: tuple[Segment, ...]
    family: str = ""
    # embedding and head
    positions: int = 0
    position_offset: int = 0
    embed: int = 0
    tied: bool = False
    embedding_scale: float = 1.0
    embedding_norm: bool = False
    final_norm: bool = True
    lm_bias: bool = False
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    # norms and residuals
    norm: Norm = Norm()
    norm_place: Literal["pre", "post", "sandwich", "after"] = "pre"
    parallel: bool = False
    shared_norm: bool = False
    residual_is_normed: bool = False
    residual_scale: float = 1.0
    # attention
    attention: Literal["fused", "unfused"] = "fused"
    scale: float = 0.0  # 0: 1 / sqrt(head_dim)
    softcap: float = 0.0
    alibi: Literal["none", "plain", "scaled"] = "none"
    relative: bool = False
    latent: Latent | None = None
    sinks: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    qkv_clip: float = 0.0
    qk_norm: Norm | None = None
    qk_norm_scope: Literal["shared", "per_head", "all"] = "shared"
    # feed-forward
    activation: str = "silu"
    gated: bool = True
    mlp_bias: bool = False
    dense_ffn: int = 0
    experts: Experts | None = None
    # dropout
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    mlp_dropout: float = 0.0
    sum_dropout: float = 0.0

    @property
    def attention_scale(self) -> float:
        """The factor on the scores before their softmax."""
        return self.scale or float(self.head_dim) ** -0.5


def decoder_graph(decoder: Decoder) -> Graph:
    """The operator graph of `decoder`: `embedding`, its kinds of layer in their order, `head`."""
    blocks = (_embedding(decoder), *(_layer(decoder, layer) for layer in decoder.layers), _head(decoder))
    return Graph(
        name=decoder.name,
        dims=_dims(decoder, {dim for block in blocks for tensor in block.tensors for dim in tensor.dims}),
        blocks=blocks,
        segments=(Segment(("embedding",)), *decoder.segments, Segment(("head",))),
        tied=(("embedding/token.weight", "head/lm.weight"),) if decoder.tied else (),
        family=decoder.family,
    )


def _dims(decoder: Decoder, used: set[str]) -> dict[str, int]:
    experts = decoder.experts or Experts(0, 0)
    latent = decoder.latent or Latent(0, 0, 0)
    sizes = {
        "hidden": decoder.hidden,
        "kv_heads": decoder.kv_heads,
        "group": decoder.group,
        "head_dim": decoder.head_dim,
        "ffn": decoder.ffn,
        "dense_ffn": decoder.dense_ffn,
        "shared_ffn": experts.shared_ffn,
        "vocab": decoder.vocab,
        "embed": decoder.embed,
        "positions": decoder.positions,
        "experts": experts.count,
        "topk": experts.topk,
        "q_rank": latent.q_rank,
        "kv_rank": latent.kv_rank,
        "rope_dim": latent.rope_dim,
        "plain_dim": decoder.head_dim - latent.rope_dim,
        "value_dim": latent.value_dim,
    }
    return {dim: size for dim, size in sizes.items() if dim in used}


# --- a block while it is written ------------------------------------------------------------------------------------


class _Draft:
    """The tensors and operators of one block, in the order in which they are written down."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []

    def tensor(self, name: str, dims: Dims, dtype: str = "compute", differentiable: bool = True) -> str:
        return self._add(Tensor(name, dims, dtype=dtype, differentiable=differentiable))

    def parameter(self, name: str, dims: Dims) -> str:
        return self._add(Tensor(name, dims, Role.PARAMETER))

    def input(self, name: str) -> str:
        return self._add(Tensor(name, TOKENS, Role.INPUT, "int64", differentiable=False))

    def _add(self, tensor: Tensor) -> str:
        assert tensor.name not in self.tensors, tensor.name
        self.tensors[tensor.name] = tensor
        return tensor.name

    def operator(
        self,
        kind: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        renamed: Mapping[str, Dims] | None = None,
        unsplit: Dims = (),
        contractions: Sequence[str] = (),
        saves: Sequence[str] = (),
        group: str = "",
        attributes: Mapping[str, Attribute] | None = None,
    ) -> None:
        """Append one operator; its spec is the dims of its tensors, except those `renamed` for this operator."""
        specs = {operand: (renamed or {}).get(operand, self.tensors[operand].dims) for operand in (*inputs, *outputs)}
        texts = [", ".join(" ".join(specs[operand]) for operand in side) for side in (inputs, outputs)]
        present = {dim for dims in specs.values() for dim in dims}
        self.operators.append(
            Operator(
                name=name,
                kind=kind,
                spec=" -> ".join(texts),
                inputs=tuple(inputs),
                outputs=tuple(outputs),
                unsplit=tuple(dim for dim in unsplit if dim in present),
                contractions=tuple(contractions),
                saves=tuple(saves),
                recompute_group=group,
                attributes=dict(attributes or {}),
            )
        )

    def chain(self, x: str, steps: Sequence[tuple[str, _Step]], out: str) -> str:
        """Write steps one after the other; each output is called like its step, the last one `out`."""
        for position, (name, step) in enumerate(steps):
            x = step(self, name, x, out if position == len(steps) - 1 else f"{name}_out")
        return x

    def block(self, name: str, inputs: Dims = (), outputs: Dims = ()) -> Block:
        return Block(name, tuple(self.tensors.values()), tuple(self.operators), inputs, outputs)


_Step = Callable[[_Draft, str, str, str], str]
_Steps = list[tuple[str, _Step]]


# --- steps: one operator each ---------------------------------------------------------------------------------------


def _product(*operands: Dims) -> str:
    return " ".join(dict.fromkeys(dim for dims in operands for dim in dims))


def _project(weight: Dims, out_dims: Dims, contraction: str = "") -> _Step:
    """A matrix product with the step's `.weight`."""

    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        draft.parameter(f"{name}.weight", weight)
        draft.tensor(out, out_dims)
        draft.operator(
            "einsum",
            name,
            (x, f"{name}.weight"),
            (out,),
            unsplit=("head_dim",),
            contractions=(contraction or _product(draft.tensors[x].dims, out_dims),),
            saves=(x,),
        )
        return out

    return step


def _bias(dims: Dims) -> _Step:
    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        parameter = draft.parameter(f"{name.removesuffix('_bias')}.bias", dims)
        draft.tensor(out, draft.tensors[x].dims)
        draft.operator("bias", name, (x, parameter), (out,), unsplit=("head_dim",))
        return out

    return step


def _norm(norm: Norm, over: Dims = ("hidden",), weight: Dims | None = None) -> _Step:
    """A norm over the dims `over`, which cannot be split; `weight` has the same dims unless given."""

    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        kinds = [kind for kind, has in (("weight", norm.weight), ("bias", norm.bias)) if has]
        parameters = [draft.parameter(f"{name}.{kind}", weight or over) for kind in kinds]
        draft.tensor(out, draft.tensors[x].dims)
        attributes = {"variant": norm.variant, "eps": norm.eps, "weight_offset": norm.weight_offset}
        draft.operator("norm", name, (x, *parameters), (out,), unsplit=over, saves=(x,), attributes=attributes)
        return out

    return step


def _elementwise(kind: str, saves_input: bool = False, unsplit: Dims = (), **attributes: Attribute) -> _Step:
    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        draft.tensor(out, draft.tensors[x].dims)
        saves = (x,) if saves_input else ()
        draft.operator(kind, name, (x,), (out,), unsplit=unsplit, saves=saves, attributes=attributes)
        return out

    return step


def _dropout(p: float, *, dims: Dims | None = None, group: str = "") -> _Step:
    """Dropout; `dims` renames the dims for this operator where the tensor's own names do not serve."""

    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        draft.tensor(out, draft.tensors[x].dims)
        mask = draft.tensor(f"{name}_mask", draft.tensors[x].dims, "bool", differentiable=False)
        renamed = dict.fromkeys((x, out, mask), dims) if dims else {}
        attributes = {"p": p}
        draft.operator(
            "dropout",
            name,
            (x,),
            (out, mask),
            renamed=renamed,
            unsplit=("kv_seq",),
            saves=(mask,),
            group=group,
            attributes=attributes,
        )
        return out

    return step


def _optional(*steps: tuple[bool | float, str, _Step]) -> _Steps:
    return [(name, step) for wanted, name, step in steps if wanted]


def _add(draft: _Draft, name: str, a: str, b: str, out: str) -> str:
    draft.tensor(out, draft.tensors[a].dims)
    draft.operator("add", name, (a, b), (out,))
    return out


# --- embedding and head ---------------------------------------------------------------------------------------------


def _embedding(decoder: Decoder) -> Block:
    draft = _Draft()
    tokens = draft.input("tokens")
    steps: _Steps = [
        ("token", _lookup("embed" if decoder.embed else "hidden")),
        *_optional(
            (decoder.embed, "project_in", _project(("hidden", "embed"), HIDDEN)),
            (decoder.embedding_norm, "norm", _norm(decoder.norm)),
            (decoder.positions, "position", _add_positions(decoder.position_offset)),
            (decoder.embedding_scale != 1, "scale", _elementwise("scale", factor=decoder.embedding_scale)),
            (decoder.embedding_dropout, "dropout", _dropout(decoder.embedding_dropout)),
        ),
    ]
    draft.chain(tokens, steps, "y")
    return draft.block("embedding", outputs=("y",))


def _lookup(width: str) -> _Step:
    """Rows of the token table; vocab is contracted: a rank with some of the rows has a partial result."""

    def step(draft: _Draft, name: str, tokens: str, out: str) -> str:
        draft.parameter(f"{name}.weight", ("vocab", width))
        draft.tensor(out, (*TOKENS, width))
        draft.operator("embedding", name, (tokens, f"{name}.weight"), (out,), saves=(tokens,))
        return out

    return step


def _add_positions(offset: int) -> _Step:
    def step(draft: _Draft, name: str, x: str, out: str) -> str:
        table = draft.parameter(f"{name}.weight", ("positions", "hidden"))
        draft.tensor(out, HIDDEN)
        attributes = {"offset": offset}
        draft.operator("position_embedding", name, (x, table), (out,), unsplit=("positions",), attributes=attributes)
        return out

    return step


def _head(decoder: Decoder) -> Block:
    draft = _Draft()
    width = "embed" if decoder.embed else "hidden"
    logits: Dims = (*TOKENS, "vocab")
    steps: _Steps = [
        *_optional(
            (decoder.final_norm, "norm", _norm(decoder.norm)),
            (decoder.embed, "project_out", _project(("embed", "hidden"), (*TOKENS, "embed"))),
        ),
        ("lm", _project(("vocab", width), logits)),
        *_optional(
            (decoder.lm_bias, "lm_bias", _bias(("vocab",))),
            (decoder.logit_scale != 1, "scale", _elementwise("scale", factor=decoder.logit_scale)),
            (decoder.logit_softcap, "softcap", _elementwise("softcap", saves_input=True, cap=decoder.logit_softcap)),
        ),
    ]
    last = draft.chain(draft.tensor("x", HIDDEN), steps, "logits")
    _loss(draft, last)
    return draft.block("head", inputs=("x",))


def _loss(draft: _Draft, logits: str) -> None:
    """Cross-entropy as Megatron computes it: with vocab split, three numbers per token are all that is exchanged.

    The float32 copy of the logits is overwritten in place by the probabilities that the backward needs.
    """
    draft.tensor("logits32", draft.tensors[logits].dims, "float32")
    draft.operator("upcast", "upcast", (logits,), ("logits32",))
    labels = draft.input("labels")
    for name in ("max", "sumexp", "target", "loss"):
        draft.tensor(name, TOKENS, "float32", differentiable=name != "max")
    statistics = ("max", "sumexp", "target")
    inputs = ("logits32", labels)
    draft.operator("cross_entropy", "cross_entropy", inputs, statistics, saves=inputs)
    draft.operator("loss", "loss", statistics, ("loss",))


# --- a layer --------------------------------------------------------------------------------------------------------


def _layer(decoder: Decoder, layer: Layer) -> Block:
    draft = _Draft()
    x = draft.tensor("x", HIDDEN)
    if decoder.parallel:
        _parallel(draft, decoder, layer, x)
    else:
        middle = _branch(draft, decoder, layer, x, "middle", 1)
        _branch(draft, decoder, layer, middle, "y", 2)
    return draft.block(layer.name, inputs=("x",), outputs=("y",))


def _branch(draft: _Draft, decoder: Decoder, layer: Layer, x: str, out: str, number: Literal[1, 2]) -> str:
    """Attention (1) or the feed-forward (2) with its norms and its residual."""
    norm = f"norm{number}"
    before = decoder.norm_place in ("pre", "sandwich")
    branch_in = _norm(decoder.norm)(draft, norm, x, f"{norm}_out") if before else x
    residual = branch_in if decoder.residual_is_normed else x
    write = _attention if number == 1 else _feed_forward
    branch = write(draft, decoder, layer, branch_in, "attention_out" if number == 1 else "mlp_out")
    if decoder.norm_place != "after":
        return _add(draft, f"add{number}", branch, residual, out)
    total = _add(draft, f"add{number}", branch, residual, f"add{number}_out")
    return _norm(decoder.norm)(draft, norm, total, out)


def _parallel(draft: _Draft, decoder: Decoder, layer: Layer, x: str) -> None:
    """Both branches read the block's input and are added at once (GPT-J, PaLM)."""
    first = _norm(decoder.norm)(draft, "norm1", x, "norm1_out")
    second = first if decoder.shared_norm else _norm(decoder.norm)(draft, "norm2", x, "norm2_out")
    attention = _attention(draft, decoder, layer, first, "attention_out")
    mlp = _feed_forward(draft, decoder, layer, second, "mlp_out")
    total = _add(draft, "add1", attention, mlp, "add1_out")
    if decoder.sum_dropout:
        total = _dropout(decoder.sum_dropout)(draft, "sum_dropout", total, "sum_dropout_out")
    _add(draft, "add2", total, x, "y")


def _branch_end(decoder: Decoder, number: int, p: float) -> _Steps:
    """What follows the last projection of a branch, before its residual is added."""
    name = "attention" if number == 1 else "mlp"
    return _optional(
        (decoder.norm_place in ("post", "sandwich"), f"post_norm{number}", _norm(decoder.norm)),
        (decoder.residual_scale != 1, f"{name}_scale", _elementwise("scale", factor=decoder.residual_scale)),
        (p, f"{name}_dropout", _dropout(p)),
    )


# --- attention ------------------------------------------------------------------------------------------------------


def _attention(draft: _Draft, decoder: Decoder, layer: Layer, x: str, out: str) -> str:
    if decoder.latent:
        qkv = _latent_qkv(draft, decoder, decoder.latent, layer, x)
    else:
        widths = (("q", QUERY), ("k", KEY), ("v", KEY))
        q, k, v = (draft.chain(x, _qkv_steps(decoder, layer, name, heads), name) for name, heads in widths)
        qkv = (q, k, v)
    attend = _unfused if decoder.attention == "unfused" or decoder.relative else _fused
    context = attend(draft, decoder, layer, qkv)
    steps = [
        ("out", _project(("hidden", *draft.tensors[context].dims[len(TOKENS) :]), HIDDEN)),
        *_optional((decoder.out_bias, "out_bias", _bias(("hidden",)))),
        *_branch_end(decoder, 1, decoder.residual_dropout),
    ]
    return draft.chain(context, steps, out)


def _qkv_steps(decoder: Decoder, layer: Layer, name: str, heads: Dims) -> _Steps:
    steps: _Steps = [
        (name, _project((*heads, "hidden"), (*TOKENS, *heads), _product(TOKENS, ("hidden",), heads))),
        *_optional(
            (decoder.qkv_bias, f"{name}_bias", _bias(heads)),
            (decoder.qkv_clip, f"{name}_clip", _elementwise("clip", saves_input=True, limit=decoder.qkv_clip)),
        ),
    ]
    if name != "v" and decoder.qk_norm:
        over = heads if decoder.qk_norm_scope == "all" else ("head_dim",)
        weight = ("head_dim",) if decoder.qk_norm_scope == "shared" else heads
        steps.append((f"{name}_norm", _norm(decoder.qk_norm, over, weight)))
    if name != "v" and layer.rotary:
        steps.append((f"{name}_rotary", _rotary(layer.rotary)))
    return steps


def _latent_qkv(draft: _Draft, decoder: Decoder, latent: Latent, layer: Layer, x: str) -> tuple[str, str, str]:
    """Queries, keys and values of latent attention; only the rotary part of a key does not pass through the latent."""
    query, plain, value = QUERY, ("kv_heads", "plain_dim"), ("kv_heads", "value_dim")
    turned = _optional((layer.rotary is not None, "q_rotary", _rotary(layer.rotary or Rotary(0.0, 0))))
    narrow: _Steps = []
    if latent.q_rank:
        narrow = [("q_down", _project(("q_rank", "hidden"), (*TOKENS, "q_rank"))), _latent_norm(decoder, "q_rank")]
    from_q = "q_rank" if latent.q_rank else "hidden"
    q = draft.chain(x, [*narrow, ("q", _project((*query, from_q), (*TOKENS, *query))), *turned], "q")
    down = ("kv_down", _project(("kv_rank", "hidden"), (*TOKENS, "kv_rank")))
    low = draft.chain(x, [down, _latent_norm(decoder, "kv_rank")], "kv_latent")
    rope = draft.chain(x, [("k_rope", _project(("rope_dim", "hidden"), (*TOKENS, "rope_dim")))], "k_rope")
    whole = draft.chain(low, [("k", _project((*plain, "kv_rank"), (*TOKENS, *plain)))], "k_plain")
    v = draft.chain(low, [("v", _project((*value, "kv_rank"), (*TOKENS, *value)))], "v")
    k = draft.tensor("k", (*TOKENS, *KEY))
    draft.operator("join", "k_join", (whole, rope), (k,), unsplit=("plain_dim", "rope_dim", "head_dim"))
    return q, k, v


def _latent_norm(decoder: Decoder, rank: str) -> tuple[str, _Step]:
    return f"{rank.removesuffix('_rank')}_norm", _norm(decoder.norm, (rank,))


def _rotary(rotary: Rotary) -> _Step:
    return _elementwise(
        "rotary",
        unsplit=("head_dim",),
        theta=rotary.theta,
        rotary_dim=rotary.rotary_dim,
        interleaved=rotary.interleaved,
        scaling=rotary.scaling,
    )


def _score_attributes(decoder: Decoder, layer: Layer) -> dict[str, Attribute]:
    attributes: dict[str, Attribute] = {
        "causal": True,
        "scale": decoder.attention_scale,
        "window": layer.window,
        "softcap": decoder.softcap,
        "alibi": decoder.alibi != "none",
    }
    if decoder.alibi != "none":
        attributes["alibi_scale"] = decoder.attention_scale if decoder.alibi == "scaled" else 1.0
    return attributes


CORE = "core_attention"


def _seen_as_keys(draft: _Draft, name: str) -> Dims:
    """The dims of keys or values as attention sees them: along a sequence of their own."""
    return tuple("kv_seq" if dim == "seq" else dim for dim in draft.tensors[name].dims)


def _square(draft: _Draft, name: str) -> str:
    """The product of queries and keys over the heads and the head size of the keys or values `name`."""
    return _product(TOKENS, ("kv_seq", "kv_heads", "group", draft.tensors[name].dims[-1]))


def _context(draft: _Draft, v: str) -> str:
    return draft.tensor("context", (*TOKENS, "kv_heads", "group", draft.tensors[v].dims[-1]))


def _fused(draft: _Draft, decoder: Decoder, layer: Layer, qkv: tuple[str, str, str]) -> str:
    """One kernel (FlashAttention): the scores are never stored."""
    _, k, v = qkv
    context = _context(draft, v)
    logsumexp = draft.tensor("logsumexp", (*TOKENS, "kv_heads", "group"), "float32", differentiable=False)
    dropout = {"dropout": decoder.attention_dropout} if decoder.attention_dropout else {}
    sinks = (draft.parameter("sinks", ("kv_heads", "group")),) if decoder.sinks else ()
    draft.operator(
        "attention",
        "attention",
        (*qkv, *sinks),
        (context, logsumexp),
        renamed={name: _seen_as_keys(draft, name) for name in (k, v)},
        unsplit=("kv_seq", "head_dim", "value_dim"),
        contractions=(_square(draft, k), _square(draft, v)),
        saves=(*qkv, context, logsumexp),
        group=CORE,
        attributes={**_score_attributes(decoder, layer), **dropout},
    )
    return context


def _unfused(draft: _Draft, decoder: Decoder, layer: Layer, qkv: tuple[str, str, str]) -> str:
    """Scores, softmax, dropout and context one by one: the 5as/h of Korthikanti 2205.05198, eq. 1."""
    q, k, v = qkv
    scores = draft.tensor("scores", SCORES)
    _attention_einsum(draft, "scores", (q, k), scores, k)
    if decoder.relative:
        scores = _relative(draft, q, scores)
    probabilities = draft.tensor("probabilities", SCORES)
    draft.operator(
        "softmax",
        "softmax",
        (scores,),
        (probabilities,),
        unsplit=("kv_seq",),
        saves=(probabilities,),
        group=CORE,
        attributes=_score_attributes(decoder, layer),
    )
    if decoder.attention_dropout:
        step = _dropout(decoder.attention_dropout, dims=SCORES, group=CORE)
        probabilities = step(draft, "probabilities_dropout", probabilities, "dropped_probabilities")
    context = _context(draft, v)
    _attention_einsum(draft, "context", (probabilities, v), context, v)
    return context


def _attention_einsum(
    draft: _Draft, name: str, inputs: tuple[str, str], out: str, keys: str, kind: str = "einsum"
) -> None:
    """A product of queries or probabilities with the keys or values `keys`."""
    draft.operator(
        kind,
        name,
        inputs,
        (out,),
        renamed={keys: _seen_as_keys(draft, keys)},
        unsplit=("kv_seq", "head_dim", "value_dim"),
        contractions=(_square(draft, keys),),
        saves=inputs,
        group=CORE,
    )


def _relative(draft: _Draft, q: str, scores: str) -> str:
    """Transformer-XL's term of relative positions (Dai 1901.02860, section 3.3), as Gopher has it.

    Sinusoids of each distance are projected to a key per head, and the query meets those keys in a second product.
    The bias vectors u and v of the paper are left out (2 x heads x head_dim numbers in a layer).
    """
    weight = draft.parameter("relative.weight", (*QUERY, "hidden"))
    keys = draft.tensor("relative_keys", ("seq", *QUERY))
    product = (_product(("seq", "hidden"), QUERY),)
    draft.operator("relative_keys", "relative", (weight,), (keys,), unsplit=("seq", "head_dim"), contractions=product)
    term = draft.tensor("relative_scores", SCORES)
    _attention_einsum(draft, "relative_scores", (q, keys), term, keys, kind="relative_scores")
    total = draft.tensor("all_scores", SCORES)
    draft.operator("add", "add_relative", (scores, term), (total,), unsplit=("kv_seq",), group=CORE)
    return total


# --- feed-forward ---------------------------------------------------------------------------------------------------


def _feed_forward(draft: _Draft, decoder: Decoder, layer: Layer, x: str, out: str) -> str:
    end = _branch_end(decoder, 2, decoder.mlp_dropout)
    result = f"{end[0][0]}_in" if end else out
    if layer.sparse:
        _sparse(draft, decoder, x, result)
    else:
        _dense(draft, decoder, x, result, "dense_ffn" if decoder.experts else "ffn")
    return draft.chain(result, end, out) if end else result


def _dense(draft: _Draft, decoder: Decoder, x: str, out: str, ffn: str, prefix: str = "") -> str:
    inner: Dims = (*TOKENS, ffn)

    def up(name: str) -> str:
        steps = [
            (f"{prefix}{name}", _project((ffn, "hidden"), inner)),
            *_optional((decoder.mlp_bias, f"{prefix}{name}_bias", _bias((ffn,)))),
        ]
        return draft.chain(x, steps, f"{prefix}{name}_proj")

    if decoder.gated:
        activated = _gate(draft, decoder, up("gate"), up("up"), f"{prefix}activation")
    else:
        activation = _elementwise("activation", saves_input=True, function=decoder.activation)
        activated = activation(draft, f"{prefix}activation", up("up"), f"{prefix}activation_out")
    steps = [
        (f"{prefix}down", _project(("hidden", ffn), HIDDEN)),
        *_optional((decoder.mlp_bias, f"{prefix}down_bias", _bias(("hidden",)))),
    ]
    return draft.chain(activated, steps, out)


def _gate(draft: _Draft, decoder: Decoder, gate: str, up: str, name: str) -> str:
    out = draft.tensor(f"{name}_out", draft.tensors[gate].dims)
    attributes = {"function": decoder.activation}
    draft.operator("gated_activation", name, (gate, up), (out,), saves=(gate, up), attributes=attributes)
    return out


def _sparse(draft: _Draft, decoder: Decoder, x: str, out: str) -> str:
    """Routed experts: each token's rows go to `topk` of them, which hold as many rows each.

    Tokens are split along batch and sequence, experts along themselves: between the two the rows change places, which
    is the all-to-all of expert parallelism.
    """
    experts = decoder.experts
    assert experts
    weights = _route(draft, experts, x)
    routed = draft.tensor("routed", (*ROUTED, "hidden"))
    by_token = ("experts", *TOKENS, "hidden")
    moved: dict[str, Any] = {"unsplit": ("experts", "topk"), "renamed": {routed: by_token}}
    draft.operator("dispatch", "dispatch", (x,), (routed,), **moved)
    inner: Dims = (*ROUTED, "ffn")
    bias = {"inner": ("experts", "ffn"), "outer": ("experts", "hidden")} if experts.bias else {}

    def product(name: str, weight: Dims, dims: Dims, over: Dims | None) -> _Steps:
        return [(name, _project(weight, dims)), *_optional((over is not None, f"{name}_bias", _bias(over or ())))]

    gate, up = (
        draft.chain(routed, product(name, ("experts", "ffn", "hidden"), inner, bias.get("inner")), f"{name}_proj")
        for name in ("gate", "up")
    )
    activated = _gate(draft, decoder, gate, up, "activation")
    down = product("down", ("experts", "hidden", "ffn"), (*ROUTED, "hidden"), bias.get("outer"))
    expert = draft.chain(activated, down, "expert_out")
    combined = draft.tensor("combined" if experts.shared_ffn else out, HIDDEN)
    moved = {"unsplit": ("experts", "topk"), "renamed": {expert: by_token}, "saves": (expert, weights)}
    draft.operator("combine", "combine", (expert, weights), (combined,), **moved)
    return _shared(draft, decoder, x, combined, out) if experts.shared_ffn else combined


def _route(draft: _Draft, experts: Experts, x: str) -> str:
    """The weights of each token's experts; every rank that routes a token knows all experts."""
    draft.parameter("router.weight", ("experts", "hidden"))
    scores = draft.tensor("router_scores", (*TOKENS, "experts"))
    whole: Dims = ("experts", "topk")
    product = (_product(HIDDEN, ("experts",)),)
    draft.operator("einsum", "router", (x, "router.weight"), (scores,), unsplit=whole, contractions=product, saves=(x,))
    if experts.bias:
        bias = draft.parameter("router.bias", ("experts",))
        biased = draft.tensor("biased_scores", (*TOKENS, "experts"))
        draft.operator("bias", "router_bias", (scores, bias), (biased,), unsplit=whole)
        scores = biased
    weights = draft.tensor("weights", (*TOKENS, "topk"))
    attributes = {"topk": experts.topk, "normalize": experts.normalize}
    draft.operator("top_k", "top_k", (scores,), (weights,), unsplit=whole, saves=(scores,), attributes=attributes)
    return weights


def _shared(draft: _Draft, decoder: Decoder, x: str, combined: str, out: str) -> str:
    """The expert of all tokens, weighted by a sigmoid of one number per token where it has a gate (Qwen2-MoE)."""
    value = _dense(draft, decoder, x, "shared_out", "shared_ffn", "shared_")
    if decoder.experts and decoder.experts.shared_gate:
        steps: _Steps = [
            ("shared_weight", _project(("hidden",), TOKENS, _product(HIDDEN))),
            ("shared_sigmoid", _elementwise("activation", saves_input=True, function="sigmoid")),
        ]
        weight = draft.chain(x, steps, "shared_factor")
        weighted = draft.tensor("shared_weighted", HIDDEN)
        draft.operator("einsum", "shared_combine", (value, weight), (weighted,), saves=(value, weight))
        value = weighted
    return _add(draft, "add_shared", combined, value, out)
