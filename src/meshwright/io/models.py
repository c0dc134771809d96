"""Models by name or by file: what the command line's MODEL means, as far as no framework has to be loaded for it.

Presets are Hugging Face configs in `data/models`, each with its source; a file is a `config.json` or the folder that
holds one. Modules of Python and exported graphs come in through other doors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph
from meshwright.io.decoder import Decoder, decoder_graph
from meshwright.io.huggingface import decoder_from_config

#: Files that will have a door of their own, by suffix.
OTHER_KINDS = {".pt2": "an exported PyTorch program", ".onnx": "an ONNX graph", ".py": "a Python file"}

_KINDS = "give a preset's name, a Hugging Face config.json or the folder that holds one"

_PRESETS = Path(__file__).parent.parent / "data" / "models"


def model_presets() -> tuple[str, ...]:
    """The names of the models that come with Meshwright.

    >>> "llama-3-8b" in model_presets()
    True
    """
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def load_model(text: str) -> Graph:
    """The operator graph of a preset, of a Hugging Face `config.json`, or of the folder that holds one.

    A preset's name goes before a file of the same name (write `./name` for the file); `-` reads stdin. Raises
    `InputError`, with the nearest preset or file where there is neither, with all problems of the config otherwise.

    >>> load_model("llama-3-8b").num_parameters
    8030261248
    """
    from meshwright.io.native import read_json_object  # only now: the file door costs more than a name needs

    if text in model_presets():
        return decoder_graph(load_decoder(text))
    path = Path(text)
    if text != "-" and (refusal := _refusal(text, path)):
        raise InputError([refusal])
    if _exists(path) and path.is_dir():
        path = path / "config.json"
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    data = read_json_object(text if text == "-" else path, "a Hugging Face config")
    return graph_from_config(data, "stdin" if text == "-" else str(path), "" if text == "-" else name)


def load_decoder(preset: str) -> Decoder:
    """The choices of the preset of that name."""
    from meshwright.io.native import read_json_object

    data = read_json_object(_PRESETS / f"{preset}.json", "a model preset")
    return decoder_from_config(data, preset, preset)


def graph_from_config(data: dict[str, Any], where: str = "config.json", name: str = "") -> Graph:
    """The operator graph of the content of a `config.json`; `where` begins the messages of its problems."""
    return decoder_graph(decoder_from_config(data, where, name))


def _refusal(text: str, path: Path) -> Problem | None:
    """Why `text` names no model that can be read here, None where it may."""
    exists = bool(text) and _exists(path)
    kind = OTHER_KINDS.get(path.suffix.lower(), "")
    if not exists and ":" in text:  # of `module:function` nothing is imported, not even looked for
        kind = "a function of a Python module"
    if kind:
        return Problem("model", text, f"{kind} cannot be read yet; {_KINDS}")
    return None if exists or _looks_like_path(text) else _unknown(text)


def _looks_like_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith(".json")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False


def _unknown(text: str) -> Problem:
    presets = model_presets()
    rule = f"is neither a preset nor a file; {_KINDS}; presets: {', '.join(presets)}"
    return Problem("model", text or "''", rule, nearest_name(text, presets))
