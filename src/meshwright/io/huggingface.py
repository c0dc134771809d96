"""Hugging Face configs in: the dict of a `config.json` becomes a `Decoder`, by its family.

All faults of a config are reported at once. transformers itself is not imported: the tests compare every family with
it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.io.config import Config, short_text
from meshwright.io.decoder import Decoder
from meshwright.io.families import FAMILIES


def decoder_from_config(data: Mapping[str, Any], where: str = "config.json", name: str = "") -> Decoder:
    """The `Decoder` that a Hugging Face config describes.

    `data` is the content of a config.json; of a multi-modal one the text model is taken. `where` begins the messages,
    `name` names the model (default: the config's `_name_or_path`, else its family). Raises `InputError` with every
    problem of the config.

    >>> data = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    ...         "num_key_value_heads": 3, "vocab_size": 256}
    >>> decoder_from_config(data)
    Traceback (most recent call last):
    meshwright.errors.InputError: config.json: num_key_value_heads = 3: must divide num_attention_heads = 4 (nearest: 2)
    config.json: intermediate_size: missing; a llama config must say it
    >>> decoder_from_config({**data, "num_key_value_heads": 2, "intermediate_size": 128}).group
    2
    """
    prefix, data = _text_model(data)
    family = _family(data, f"{where}: {prefix}model_type")
    config = Config(data, where, family, prefix)
    decoder = FAMILIES[family](config)
    if config.problems:
        raise InputError(dict.fromkeys(config.problems))  # a key read twice is still one problem
    known_as = data.get("_name_or_path")
    given = known_as.rstrip("/").rsplit("/")[-1] if isinstance(known_as, str) else ""
    return replace(decoder, name=name or given or family, family=family)


def _text_model(data: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """The key path and the config of the language model: of a multi-modal config its `text_config`."""
    inner = data.get("text_config")
    family = inner.get("model_type") if isinstance(inner, Mapping) else None
    if not isinstance(inner, Mapping) or not isinstance(family, str) or family not in FAMILIES:
        return "", data
    shared = {key: data[key] for key in ("tie_word_embeddings", "_attn_implementation") if key in data}
    return "text_config.", {**shared, **inner}


def _family(data: Mapping[str, Any], place: str) -> str:
    family = data.get("model_type")
    known = f"known: {', '.join(FAMILIES)}"
    if family is None:
        rule = f"missing; a Hugging Face config names its family here; {known}"
        raise InputError([Problem(place, "", rule, nearest_name("model_type", data))])
    if not isinstance(family, str) or family not in FAMILIES:
        near = nearest_name(family, FAMILIES) if isinstance(family, str) else None
        raise InputError([Problem(place, short_text(family), known, near)])
    return family
