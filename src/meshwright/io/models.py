"""Models by name or by file: what the command line's MODEL means, as far as no framework has to be loaded for it.

Presets are Hugging Face configs in `data/models`, each with its source; a file is a `config.json` or the folder that
holds one. Modules of Python and exported graphs come in through other doors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph
from meshwright.io.decoder import decoder_graph
from meshwright.io.huggingface import decoder_from_config

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
        return graph_from_config(read_json_object(_PRESETS / f"{text}.json", "a model preset"), text, text)
    path = Path(text)
    if text != "-" and not _looks_like_path(text) and (not text or not _exists(path)):
        raise InputError([_unknown(text)])
    if path.is_dir():
        path = path / "config.json"
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    data = read_json_object(text if text == "-" else path, "a Hugging Face config")
    return graph_from_config(data, "stdin" if text == "-" else str(path), "" if text == "-" else name)


def graph_from_config(data: dict[str, Any], where: str = "config.json", name: str = "") -> Graph:
    """The operator graph of the content of a `config.json`; `where` begins the messages of its problems."""
    return decoder_graph(decoder_from_config(data, where, name))


def _looks_like_path(text: str) -> bool:
    return "/" in text or "\\" in text or text.endswith(".json")


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name longer than the file system takes
        return False


def _unknown(text: str) -> Problem:
    presets = model_presets()
    rule = "is neither a preset nor a file; give a preset's name, a config.json or the folder that holds one"
    return Problem("model", text, f"{rule}; presets: {', '.join(presets)}", nearest_name(text, presets))
