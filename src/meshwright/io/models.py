"""Models by name or by file: what the command line's MODEL means.

Presets are Hugging Face configs in `data/models`, each with its source; a file is a `config.json` or the folder that
holds one. `module:function`, `.pt2` and `.onnx` are traced (`io.torch_graph`, `io.onnx`, loaded only then).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Graph
from meshwright.io.decoder import Decoder, decoder_graph
from meshwright.io.huggingface import decoder_from_config

if TYPE_CHECKING:
    from meshwright.io.traced import Traced

#: Files that hold a program, by suffix.
PROGRAMS = (".pt2", ".onnx")

_KINDS = (
    "give a preset's name, a Hugging Face config.json or the folder that holds one, a .pt2, an .onnx, or "
    "module:function of a Python module"
)

_PRESETS = Path(__file__).parent.parent / "data" / "models"


def model_presets() -> tuple[str, ...]:
    """The names of the models that come with Meshwright.

    >>> "llama-3-8b" in model_presets()
    True
    """
    return tuple(sorted(path.stem for path in _PRESETS.glob("*.json")))


def load_model(text: str) -> Graph:
    """The operator graph of a preset, of a Hugging Face `config.json` or the folder that holds one, or of a traced
    model (see `load_traced`).

    A preset's name goes before a file of the same name (write `./name` for the file); `-` reads stdin. Raises
    `InputError`, with the nearest preset or file where there is neither, with all problems of the config otherwise.

    >>> load_model("llama-3-8b").num_parameters
    8030261248
    """
    from meshwright.io.native import read_json_object  # only now: the file door costs more than a name needs

    if text in model_presets():
        return decoder_graph(load_decoder(text))
    if is_traced(text):
        return load_traced(text).graph
    path = Path(text)
    if text != "-" and (refusal := _refusal(text, path)):
        raise InputError([refusal])
    if _exists(path) and path.is_dir():
        path = path / "config.json"
    name = path.parent.resolve().name if path.name == "config.json" else path.stem
    data = read_json_object(text if text == "-" else path, "a Hugging Face config")
    return graph_from_config(data, "stdin" if text == "-" else str(path), "" if text == "-" else name)


def is_traced(text: str) -> bool:
    """Whether MODEL is traced rather than written down: `module:function`, a `.pt2` or an `.onnx`.

    >>> [is_traced(text) for text in ("zoo:llama", "model.onnx", "llama-3-8b", "config.json")]
    [True, True, False, False]
    """
    if text in model_presets():
        return False
    path = Path(text)
    return path.suffix.lower() in PROGRAMS or (":" in text and not _exists(path))


def load_traced(text: str) -> Traced:
    """The program behind MODEL and its graph: `module:function` (called, on the meta device), a `.pt2` or an `.onnx`
    (nothing of them is executed). Raises `InputError` with all that is wrong with it."""
    suffix = Path(text).suffix.lower()
    if suffix not in PROGRAMS:
        from meshwright.io.torch_graph import traced_function

        return traced_function(text)
    if not _exists(Path(text)):
        raise InputError([Problem("model", text, "there is no such file")])
    if suffix == ".onnx":
        try:
            from meshwright.io.onnx import traced_onnx
        except ImportError as error:
            if (error.name or "").partition(".")[0] == "meshwright":
                raise
            rule = f"an ONNX model needs {error.name}: pip install 'meshwright[onnx]'"
            raise InputError([Problem("model", text, rule)]) from None
        return traced_onnx(text)
    from meshwright.io.torch_graph import traced_exported

    return traced_exported(text)


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
    if path.suffix.lower() == ".py":
        function = f"{path.stem}:FUNCTION"
        return Problem("model", text, f"a Python file is not a model; name the function in it ({_KINDS})", function)
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
