"""Models of many kinds, for `meshwright plan architectures:NAME ...` from this folder.

Each function returns a module and example inputs (dim 0 is the batch), tiny unless it says otherwise; the keyword
arguments make it larger from Python. Models of Hugging Face need `transformers`. Nothing here is downloaded: weights
are whatever the constructors make, and on the meta device they have no numbers at all.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Example = tuple[nn.Module, dict[str, Any] | tuple[Any, ...]]


def _tokens(batch: int, seq: int) -> Tensor:
    return torch.zeros((batch, seq), dtype=torch.long)


# --- Hugging Face -----------------------------------------------------------------------------------------------------


def llama(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """A decoder with rotary positions, grouped queries and a gated feed-forward."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=128,
    )
    return LlamaForCausalLM(config), {"input_ids": _tokens(batch, seq)}


def qwen3(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """Llama with norms on queries and keys."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=128,
    )
    return Qwen3ForCausalLM(config), {"input_ids": _tokens(batch, seq)}


def phi3(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """Llama with one product for queries, keys and values."""
    from transformers import Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Phi3ForCausalLM(config), {"input_ids": _tokens(batch, seq)}


def gpt2(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """A decoder with learned positions and a tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_embd=hidden, n_layer=layers, n_head=4, vocab_size=128, n_positions=32)
    return GPT2LMHeadModel(config), {"input_ids": _tokens(batch, seq)}


def bert(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """An encoder with a masked-language head."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=128,
        max_position_embeddings=32,
    )
    return BertForMaskedLM(config), {"input_ids": _tokens(batch, seq)}


def t5(layers: int = 4, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """An encoder and a decoder with relative positions."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=hidden,
        d_kv=16,
        d_ff=3 * hidden,
        num_layers=layers,
        num_heads=4,
        vocab_size=128,
        decoder_start_token_id=0,
    )
    inputs = {"input_ids": _tokens(batch, seq), "decoder_input_ids": _tokens(batch, seq + 8)}
    return T5ForConditionalGeneration(config), inputs


def mixtral(layers: int = 3, hidden: int = 64, batch: int = 2, seq: int = 16) -> Example:
    """A decoder whose tokens each go to two of four experts."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        vocab_size=128,
    )
    return MixtralForCausalLM(config), {"input_ids": _tokens(batch, seq)}


def vit(layers: int = 4, hidden: int = 64, batch: int = 2, image: int = 32) -> Example:
    """An encoder of image patches and a class token."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        image_size=image,
        patch_size=8,
    )
    return ViTForImageClassification(config), {"pixel_values": torch.zeros((batch, 3, image, image))}


def whisper(layers: int = 3, hidden: int = 64, batch: int = 2, seq: int = 12) -> Example:
    """Speech to text: convolutions, an encoder and a decoder that reads it."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        d_model=hidden,
        encoder_layers=layers,
        decoder_layers=layers,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=4 * hidden,
        decoder_ffn_dim=4 * hidden,
        vocab_size=128,
        num_mel_bins=16,
        max_source_positions=20,
        max_target_positions=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.zeros((batch, 16, 40)), "decoder_input_ids": _tokens(batch, seq)}
    return WhisperForConditionalGeneration(config), inputs


def clip(layers: int = 3, hidden: int = 64, batch: int = 2, seq: int = 12) -> Example:
    """Two encoders, of images and of texts, whose results are compared each with each."""
    from transformers import CLIPConfig, CLIPModel

    shared = {"hidden_size": hidden, "intermediate_size": 2 * hidden, "num_hidden_layers": layers}
    config = CLIPConfig(
        text_config={
            **shared,
            "num_attention_heads": 4,
            "vocab_size": 128,
            "max_position_embeddings": 16,
            "eos_token_id": 2,
        },
        vision_config={**shared, "num_attention_heads": 4, "image_size": 32, "patch_size": 8},
        projection_dim=48,
    )
    return CLIPModel(config), {"input_ids": _tokens(batch, seq), "pixel_values": torch.zeros((batch, 3, 32, 32))}


# --- written here -----------------------------------------------------------------------------------------------------


def mlp(layers: int = 4, width: int = 32, batch: int = 8) -> Example:
    """Linear layers with ReLU between."""
    blocks = [part for _ in range(layers) for part in (nn.Linear(width, width), nn.ReLU())]
    return nn.Sequential(*blocks, nn.Linear(width, 10)), (torch.zeros((batch, width)),)


class _Residual(nn.Module):
    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        straight = inside == outside and stride == 1
        self.shortcut = None if straight else nn.Conv2d(inside, outside, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return functional.relu(y + (self.shortcut(x) if self.shortcut is not None else x))


def resnet(width: int = 8, depth: int = 3, batch: int = 4, image: int = 32) -> Example:
    """Residual blocks of convolutions with BatchNorm, three resolutions."""
    stages: list[nn.Module] = []
    inside = width
    for outside, stride in ((width, 1), (2 * width, 2), (4 * width, 2)):
        stages += [
            _Residual(inside if not index else outside, outside, 1 if index else stride) for index in range(depth)
        ]
        inside = outside
    module = nn.Sequential(
        nn.Conv2d(3, width, 3, 1, 1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(inside, 10),
    )
    return module, (torch.zeros((batch, 3, image, image)),)


class _Double(nn.Sequential):
    def __init__(self, inside: int, outside: int) -> None:
        super().__init__(
            nn.Conv2d(inside, outside, 3, padding=1),
            nn.GroupNorm(2, outside),
            nn.SiLU(),
            nn.Conv2d(outside, outside, 3, padding=1),
            nn.SiLU(),
        )


class _UNet(nn.Module):
    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.first = _Double(3, width)
        self.down = nn.ModuleList(_Double(one, two) for one, two in pairwise(widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(two, one, 2, stride=2) for one, two in pairwise(widths))
        self.mix = nn.ModuleList(_Double(2 * one, one) for one in widths[:-1])
        self.last = nn.Conv2d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        found = [self.first(x)]
        for down in self.down:
            found.append(down(functional.max_pool2d(found[-1], 2)))
        y = found.pop()
        for up, mix in zip(reversed(self.up), reversed(self.mix), strict=True):
            y = mix(torch.cat([found.pop(), up(y)], dim=1))
        return self.last(y)


def unet(width: int = 8, levels: int = 2, batch: int = 2, image: int = 32) -> Example:
    """Convolutions down to a coarse image and up again, each level joined with its counterpart."""
    return _UNet(width, levels), (torch.zeros((batch, 3, image, image)),)


class _Dlrm(nn.Module):
    def __init__(self, tables: int, rows: int, width: int) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, width) for _ in range(tables))
        self.bottom = nn.Sequential(nn.Linear(13, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU())
        self.top = nn.Sequential(nn.Linear((tables + 1) ** 2 + width, 32), nn.ReLU(), nn.Linear(32, 1), nn.Sigmoid())

    def forward(self, dense: Tensor, sparse: Tensor) -> Tensor:
        x = self.bottom(dense)
        pooled = [table(sparse[:, index]).sum(dim=1) for index, table in enumerate(self.tables)]
        together = torch.stack([x, *pooled], dim=1)
        pairs = torch.bmm(together, together.transpose(1, 2)).flatten(1)
        return self.top(torch.cat([x, pairs], dim=1))


def dlrm(tables: int = 5, rows: int = 64, width: int = 16, batch: int = 8, hots: int = 4) -> Example:
    """A recommender: sums of rows of large tables, their products in pairs, small dense layers."""
    inputs = (torch.zeros((batch, 13)), torch.zeros((batch, tables, hots), dtype=torch.long))
    return _Dlrm(tables, rows, width), inputs


class _Bag(nn.Module):
    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(rows, width, mode="sum")
        self.head = nn.Linear(width, 1)

    def forward(self, indices: Tensor) -> Tensor:
        return self.head(self.table(indices))


def bags(rows: int = 64, width: int = 16, batch: int = 8, hots: int = 4) -> Example:
    """One `EmbeddingBag` and a head."""
    return _Bag(rows, width), (torch.zeros((batch, hots), dtype=torch.long),)


class _Recurrent(nn.Module):
    def __init__(self, vocab: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.lstm = nn.LSTM(width, 2 * width, layers, batch_first=True)
        self.head = nn.Linear(2 * width, vocab)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0])


def lstm(vocab: int = 64, width: int = 16, layers: int = 2, batch: int = 4, seq: int = 12) -> Example:
    """A language model of recurrent layers."""
    return _Recurrent(vocab, width, layers), (_tokens(batch, seq),)


class _Experts(nn.Module):
    """Every expert sees every token, weighted by a router (0 for all but the two best)."""

    def __init__(self, width: int, ffn: int, experts: int) -> None:
        super().__init__()
        self.router = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, ffn))
        self.down = nn.Parameter(torch.empty(experts, ffn, width))
        nn.init.normal_(self.up, std=0.1)
        nn.init.normal_(self.down, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        scores = functional.softmax(self.router(x), dim=-1)
        best = torch.topk(scores, 2, dim=-1)
        weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values)
        hidden = functional.silu(torch.einsum("bsh,ehf->ebsf", x, self.up))
        return torch.einsum("ebsf,efh,bse->bsh", hidden, self.down, weights)


class _MoeBlock(nn.Module):
    def __init__(self, width: int, ffn: int, experts: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.experts = _Experts(width, ffn, experts)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.experts(self.norm(x))


def moe_block(width: int = 32, ffn: int = 64, experts: int = 4, batch: int = 4, seq: int = 8) -> Example:
    """One feed-forward of experts with its norm and residual."""
    return _MoeBlock(width, ffn, experts), (torch.zeros((batch, seq, width)),)


class _Attention(nn.Module):
    """Grouped-query attention with rotary positions, as Llama has it."""

    def __init__(self, hidden: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, hidden // heads
        self.q = nn.Linear(hidden, heads * self.dim, bias=False)
        self.k = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.v = nn.Linear(hidden, kv_heads * self.dim, bias=False)
        self.o = nn.Linear(heads * self.dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q, k, v = (product(x).view(batch, seq, -1, self.dim).transpose(1, 2) for product in (self.q, self.k, self.v))
        q, k = _rotated(q, cos, sin), _rotated(k, cos, sin)
        shape = (batch, self.kv_heads, self.heads // self.kv_heads, seq, self.dim)
        k, v = (y[:, :, None].expand(shape).reshape(batch, self.heads, seq, self.dim) for y in (k, v))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y.transpose(1, 2).reshape(batch, seq, -1))


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-two, one], dim=-1) * sin


class _Block(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.attention = _Attention(hidden, heads, kv_heads)
        self.gate = nn.Linear(hidden, ffn, bias=False)
        self.up = nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x), cos, sin)
        y = self.norm2(x)
        return x + self.down(functional.silu(self.gate(y)) * self.up(y))


class _Llama(nn.Module):
    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int, layers: int, seq: int, vocab: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, hidden) if vocab else None
        self.layers = nn.ModuleList(_Block(hidden, heads, kv_heads, ffn) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden) if vocab else None
        self.head = nn.Linear(hidden, vocab, bias=False) if vocab else None
        self.register_buffer("cos", torch.ones(seq, hidden // heads), persistent=False)
        self.register_buffer("sin", torch.zeros(seq, hidden // heads), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return self.head(self.norm(x)) if self.head is not None and self.norm is not None else x


def llama70b_block(batch: int = 2, seq: int = 8192) -> Example:
    """One layer of Llama 3 70B, at full size."""
    return _Llama(8192, 64, 8, 28672, 1, seq, 0), (torch.zeros((batch, seq, 8192)),)


def llama70b(layers: int = 80, batch: int = 2, seq: int = 8192) -> Example:
    """Llama 3 70B, at full size: 80 layers, embedding and head."""
    return _Llama(8192, 64, 8, 28672, layers, seq, 128256), (_tokens(batch, seq),)


def llama_block(hidden: int = 64, heads: int = 8, kv_heads: int = 2, batch: int = 4, seq: int = 16) -> Example:
    """One layer of Llama, small."""
    return _Llama(hidden, heads, kv_heads, 2 * hidden, 1, seq, 0), (torch.zeros((batch, seq, hidden)),)
