"""A config.json while it is read: typed keys, every fault noted, reading goes on with a harmless value."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from meshwright.errors import Problem, nearest_name

MAX_LAYERS = 100_000  # so that a typing error cannot unfold into gigabytes
MAX_SIZE = 2**40
MAX_NUMBER = 1e30

#: The names that families have for one and the same size.
HIDDEN_KEYS = ("hidden_size", "n_embd", "n_embed")
LAYERS_KEYS = ("num_hidden_layers", "n_layer")
HEADS_KEYS = ("num_attention_heads", "n_head")
KV_HEADS_KEYS = ("num_key_value_heads", "num_kv_heads")
FFN_KEYS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
#: Keys that hold sizes; another whole number may be one of them misspelt.
SIZE_KEYS = {
    *HIDDEN_KEYS,
    *LAYERS_KEYS,
    *HEADS_KEYS,
    *KV_HEADS_KEYS,
    *FFN_KEYS,
    "vocab_size",
    "head_dim",
    "max_position_embeddings",
}

#: Names of activations in transformers, and what they compute.
ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "relu2": "relu2",
}

ATTENTIONS: dict[str, Literal["fused", "unfused"]] = {
    "eager": "unfused",
    "sdpa": "fused",
    "flash_attention_2": "fused",
    "flash_attention_3": "fused",
    "flex_attention": "fused",
}


def short_text(value: object) -> str:
    """A value as an error shows it."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Config:
    """A config while it is read: typed getters that note a problem and go on with a harmless value.

    `where` and `prefix` begin the place of each problem; `data` holds the keys, `family` is its `model_type`.
    """

    def __init__(self, data: Mapping[str, Any], where: str, family: str, prefix: str = "") -> None:
        self.data, self.where, self.family, self.prefix = data, where, family, prefix
        self.problems: list[Problem] = []

    def section(self, key: str, data: Mapping[str, Any]) -> Config:
        """The object `data` under `key`, read with the same list of problems."""
        section = Config(data, self.where, self.family, f"{self.prefix}{key}.")
        section.problems = self.problems
        return section

    def revised(self, data: Mapping[str, Any]) -> Config:
        """The same place with other `data`, read with the same list of problems."""
        revised = Config(data, self.where, self.family, self.prefix)
        revised.problems = self.problems
        return revised

    def problem(self, key: str, value: object, rule: str, nearest: str | None = None) -> None:
        """Note what is wrong with `key`; no `value` (None) is a key that is missing."""
        text = "" if value is None else short_text(value)
        self.problems.append(Problem(f"{self.where}: {self.prefix}{key}", text, rule, nearest))

    def key(self, *names: str) -> str:
        """The first of `names` that the config gives a value, else the first."""
        return next((name for name in names if self.data.get(name) is not None), names[0])

    def size(self, *names: str, default: int | None = None, at_most: int = MAX_SIZE) -> int:
        """A whole number from 1; 0 where it is missing or wrong, so that rules between sizes can be skipped."""
        key = self.key(*names)
        value = self.data.get(key)
        if value is None:
            if default is None:
                also = f" ({' or '.join(names)})" if len(names) > 1 else ""
                rule = f"missing; {_article(self.family)} config must say it{also}"
                self.problem(key, None, rule, nearest_name(key, self._unknown_sizes()))
                return 0
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            near = None
            if isinstance(value, float) and value == value and 1 <= round(value) <= at_most:
                near = str(round(value))
            self.problem(key, value, f"must be a whole number from 1 to {at_most:,}", near)
            return 0
        return value

    def _unknown_sizes(self) -> list[str]:
        """Keys that may be misspelt sizes."""
        return [key for key, value in self.data.items() if type(value) is int and key not in SIZE_KEYS]

    def number(self, key: str, default: float, *, at_least: float = 0.0, below: float = MAX_NUMBER) -> float:
        value = self.data.get(key)
        if value is None:
            return default
        wrong = isinstance(value, bool) or not isinstance(value, int | float) or not at_least <= value < below
        if wrong:
            limit = "" if below == MAX_NUMBER else f" and less than {below:g}"
            self.problem(key, value, f"must be a number of at least {at_least:g}{limit}")
            return default
        return float(value)

    def probability(self, key: str, default: float = 0.0) -> float:
        return self.number(key, default, below=1.0)

    def eps(self, key: str, default: float) -> float:
        return self.number(key, default, below=1.0)

    def flag(self, key: str, default: bool) -> bool:
        value = self.data.get(key)
        if value is None or isinstance(value, bool):
            return default if value is None else value
        self.problem(key, value, "must be true or false")
        return default

    def choice(self, key: str, default: str, choices: Mapping[str, str]) -> str:
        value = self.data.get(key)
        if value is None:
            value = default
        if not isinstance(value, str) or value not in choices:
            near = nearest_name(value, choices) if isinstance(value, str) else None
            self.problem(key, value, f"known: {', '.join(choices)}", near)
            return choices[default]
        return choices[value]

    def refuse(self, key: str, *harmless: object) -> None:
        """Note a feature that the graph cannot express, where the config switches it on."""
        value = self.data.get(key)
        if value is not None and not any(type(value) is type(off) and value == off for off in harmless):
            allowed = " or ".join(short_text(off) for off in harmless)
            self.problem(key, value, f"is not supported in {_article(self.family)} config; must be {allowed} or absent")

    def list_of(self, key: str, kind: type, rule: str) -> list[Any] | None:
        value = self.data.get(key)
        if value is None:
            return None
        if not isinstance(value, list) or any(type(item) is not kind for item in value):
            self.problem(key, value, rule)
            return None
        return value

    def activation(self, key: str = "hidden_act", default: str = "silu") -> str:
        return self.choice(key, default, ACTIVATIONS)

    def attention(self) -> Literal["fused", "unfused"]:
        key = self.key("_attn_implementation", "attn_implementation")
        return "unfused" if self.choice(key, "sdpa", ATTENTIONS) == "unfused" else "fused"


def _article(noun: str) -> str:
    return f"{'an' if noun[:1] in tuple('aeio') else 'a'} {noun}"
