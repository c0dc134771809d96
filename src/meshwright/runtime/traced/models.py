"""Small models of the kinds that plans are checked on: each as a module on the meta device and example inputs.

They are written as their users write them; nothing in them knows that it will be split.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Made = tuple[nn.Module, tuple[Tensor, ...]]


class MLP(nn.Module):
    """A residual layer of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(F.gelu(self.up(self.norm(x))))
        return x + hidden


class RMSNorm(nn.Module):
    """Root mean square normalisation as Llama spells it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.float32)
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def _rotated(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Attention(nn.Module):
    """Grouped queries; with positions rotary; of `memory` where it is given."""

    def __init__(self, width: int, heads: int, kv_heads: int, *, rotary: bool, causal: bool, fused: bool) -> None:
        super().__init__()
        self.head_dim, self.groups, self.fused, self.causal = width // heads, heads // kv_heads, fused, causal
        self.q = nn.Linear(width, width, bias=False)
        self.k = nn.Linear(width, width // self.groups, bias=False)
        self.v = nn.Linear(width, width // self.groups, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.rotary = rotary
        if rotary:
            self.register_buffer("frequencies", torch.ones(self.head_dim // 2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        source = x if memory is None else memory
        q, k, v = self._heads(self.q(x)), self._heads(self.k(source)), self._heads(self.v(source))
        if self.rotary:
            with torch.no_grad():
                places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
                angles = torch.outer(places, self.frequencies)
                table = torch.cat((angles, angles), dim=-1)
                cos, sin = table.cos()[None, None], table.sin()[None, None]
            q, k = q * cos + _rotated(q) * sin, k * cos + _rotated(k) * sin
        if self.groups > 1:
            k, v = (_repeated(each, self.groups) for each in (k, v))
        if self.fused:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        else:
            scores = q @ k.transpose(2, 3) / self.head_dim**0.5
            mixed = scores.softmax(-1) @ v
        joined: Tensor = self.out(mixed.transpose(1, 2).reshape(x.shape))
        return joined


def _repeated(x: Tensor, count: int) -> Tensor:
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, count, length, width).reshape(batch, heads * count, length, width)


class DecoderLayer(nn.Module):
    """A Llama layer."""

    def __init__(self, *, fused: bool) -> None:
        super().__init__()
        self.before, self.between = RMSNorm(16), RMSNorm(16)
        self.attention = Attention(16, 4, 2, rotary=True, causal=fused, fused=fused)
        self.gate, self.up, self.down = (
            nn.Linear(16, 32, bias=False),
            nn.Linear(16, 32, bias=False),
            nn.Linear(32, 16, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.before(x))
        normed = self.between(x)
        fed: Tensor = self.down(F.silu(self.gate(normed)) * self.up(normed))
        return x + fed


class Decoder(nn.Module):
    """Several Llama layers between an embedding and a head that is tied to it, and the loss."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.layers = nn.ModuleList(DecoderLayer(fused=True) for _ in range(layers))
        self.norm = RMSNorm(16)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), labels.flatten())


class MoE(nn.Module):
    """A block of experts: a router sends each token to two of four; all experts see all tokens, weighted."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.router = nn.Linear(16, 4, bias=False)
        self.up = nn.Parameter(torch.empty(4, 16, 32))
        self.down = nn.Parameter(torch.empty(4, 32, 16))

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.norm(x).flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        shares = torch.zeros(tokens.shape[0], 4, dtype=weights.dtype, device=x.device).scatter(1, chosen, weights)
        hidden = F.silu(torch.einsum("th,ehf->etf", tokens, self.up))
        made = torch.bmm(hidden, self.down)
        return x + (made * shares.t().unsqueeze(-1)).sum(0).view(x.shape)


class ConvNet(nn.Module):
    """Convolutions over space with BatchNorm in training, pools and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.first, self.first_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 12)

    def forward(self, image: Tensor) -> Tensor:
        x = self.pool(F.relu(self.stem_norm(self.stem(image))))
        hidden = F.relu(self.first_norm(self.first(x)))
        x = F.relu(x + self.second_norm(self.second(hidden)))
        found: Tensor = self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return found


class UNet(nn.Module):
    """Down, up by a transposed convolution, and a skip beside."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.GroupNorm(4, 8)
        self.deep = nn.Conv2d(8, 8, 3, padding=2, dilation=2)
        self.up = nn.ConvTranspose2d(8, 8, 4, stride=2, padding=1)
        self.outward = nn.Conv2d(16, 2, 5, padding=2)

    def forward(self, image: Tensor) -> Tensor:
        wide = F.silu(self.norm(self.inward(image)))
        deep = F.silu(self.deep(F.avg_pool2d(wide, 2)))
        found: Tensor = self.outward(torch.cat((wide, self.up(deep)), dim=1))
        return found


class Recommender(nn.Module):
    """Embeddings of categories, a layer for numbers, the products of all pairs, and a layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in (12, 24, 8))
        self.bottom = nn.Linear(6, 8)
        self.top = nn.Linear(8 + 16, 1)

    def forward(self, numbers: Tensor, categories: Tensor) -> Tensor:
        dense = F.relu(self.bottom(numbers))
        rows = [table(categories[:, index]) for index, table in enumerate(self.tables)]
        all_rows = torch.stack([dense, *rows], dim=1)
        pairs = torch.bmm(all_rows, all_rows.transpose(1, 2)).flatten(1)
        found: Tensor = self.top(torch.cat((dense, pairs), dim=1)).squeeze(-1)
        return found


class EncoderDecoder(nn.Module):
    """A small T5: an encoder whose output every layer of the decoder reads."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(24, 16)
        self.encoder = nn.ModuleList(self._attention() for _ in range(2))
        self.decoder = nn.ModuleList(self._attention() for _ in range(4))
        self.norms = nn.ModuleList(RMSNorm(16) for _ in range(6))
        self.head = nn.Linear(16, 24, bias=False)

    @staticmethod
    def _attention() -> Attention:
        return Attention(16, 2, 2, rotary=False, causal=False, fused=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        memory = self.embedding(tokens)
        for norm, layer in zip(self.norms, self.encoder, strict=False):
            memory = memory + layer(norm(memory))
        x = self.embedding(targets)
        for index, norm in enumerate(list(self.norms)[2:]):
            x = x + self.decoder[index](norm(x), memory if index % 2 else None)
        found: Tensor = self.head(x)
        return found


def _floats(*shape: int) -> Tensor:
    return torch.empty(shape)


def _numbers(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.int64)


def _attention_layer() -> Made:
    return DecoderLayer(fused=False), (_floats(4, 8, 16),)


#: Each kind by name.
MODELS: dict[str, Callable[[], Made]] = {
    "mlp": lambda: (MLP(), (_floats(4, 8, 16),)),
    "attention": _attention_layer,
    "decoder": lambda: (Decoder(3), (_numbers(4, 8), _numbers(4, 8))),
    "moe": lambda: (MoE(), (_floats(4, 8, 16),)),
    "convnet": lambda: (ConvNet(), (_floats(4, 3, 16, 16),)),
    "unet": lambda: (UNet(), (_floats(4, 2, 16, 16),)),
    "recommender": lambda: (Recommender(), (_floats(4, 6), _numbers(4, 3))),
    "encoder_decoder": lambda: (EncoderDecoder(), (_numbers(4, 8), _numbers(4, 4))),
}


def made(name: str) -> Made:
    """A model on the meta device, and its example inputs."""
    with torch.device("meta"):
        return MODELS[name]()
