"""Any PyTorch model as a `Program`: traced by `torch.export` on the meta device, where tensors have shapes but no data.

`linear`, attention, norms and convolutions stay whole operators (nothing is decomposed); higher-order operators that
only switch gradients or autocast are inlined, assertions dropped. The only module outside `runtime/` that imports
torch, and only when called. A saved `.pt2` is looked at before it is opened: nothing of it is executed.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import re
import sys
import traceback
import warnings
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from meshwright.clock import timed
from meshwright.errors import InputError, Problem, nearest_name
from meshwright.graph import Role
from meshwright.io.layers import BLOCK, LayersDiffer, expanded, placeholders
from meshwright.io.rules import rule_of
from meshwright.io.traced import Call, Program, Traced, Value, needed

if TYPE_CHECKING:
    import torch

_RETURNS = "return an nn.Module with an `example_inputs()` method, or (nn.Module, example inputs: a tuple or a dict)"

#: Higher-order operators that branch or loop.
_CONTROL_FLOW = ("cond", "while_loop", "scan", "map_impl", "associative_scan")


def traced_function(text: str) -> Traced:
    """The model that `module:function` returns, traced.

    The module is found from the current folder and PYTHONPATH; the function is called without arguments on the meta
    device. Raises `InputError` where there is no such module or function, where it fails or returns something else,
    and where the model's control flow depends on data.
    """
    from meshwright.io.dims import traced

    phases_s: dict[str, float] = {}
    with timed(phases_s, "import torch"):
        torch = _torch()
    where = f"model {text}"
    try:
        with timed(phases_s, "model"), torch.device("meta"):
            made = _function(text)()
            module, example = _module_and_example(made, text)
    except InputError:
        raise
    except Exception as error:  # whatever a user's function raises
        rule = f"the function failed: {type(error).__name__}: {_first_line(error)}{_place(error)}"
        raise InputError([Problem("model", text, rule)]) from None
    with timed(phases_s, "export"):
        program = module_program(module, example, name=text.rpartition(":")[2], where=where)
    with timed(phases_s, "named dims"):
        found = traced(program)
    return replace(found, phases_s=phases_s)


def traced_module(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    name: str = "",
    where: str = "model",
) -> Traced:
    """A module traced with example inputs, dim 0 of each the batch; `name` is that of the graph."""
    from meshwright.io.dims import traced

    return traced(module_program(module, example_inputs, name=name, where=where))


def module_program(
    module: torch.nn.Module,
    example_inputs: tuple[Any, ...] | Mapping[str, Any],
    *,
    name: str = "",
    where: str = "model",
    equal_layers_once: bool = True,
) -> Program:
    """The program of a module; see `traced_module`. Of equal layers in a row one is traced (`io.layers`), or all."""
    args, kwargs = ((), dict(example_inputs)) if isinstance(example_inputs, Mapping) else (tuple(example_inputs), {})
    problems = _example_problems(where, [*args, *kwargs.values()])
    if problems:
        raise InputError(problems)
    name = name or type(module).__name__
    if equal_layers_once:
        try:
            exported, batch, runs = _exported(module, args, kwargs, where, equal_layers_once=True)
            return exported_program(exported, name, batch, where, runs)
        except LayersDiffer:
            pass
    exported, batch, _ = _exported(module, args, kwargs, where, equal_layers_once=False)
    return exported_program(exported, name, batch, where)


def traced_exported(path: str | Path) -> Traced:
    """A program that `torch.export.save` wrote, traced; see `exported_file`."""
    from meshwright.io.dims import traced

    exported = exported_file(Path(path))
    return traced(exported_program(exported, Path(path).stem, 0, str(path)))


# --- files ------------------------------------------------------------------------------------------------------------

#: Functions of Python that a saved program may name: arithmetic of sizes.
_ARITHMETIC = "add|sub|mul|floordiv|truediv|mod|pow|neg|pos|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem"

_TARGET = re.compile(rf"torch\.ops\.\w+\.\w+\.\w+|torch\.ops\.higher_order\.wrap_with_\w+|_operator\.({_ARITHMETIC})")

#: What a size as text may be made of, since it is evaluated when the file is read: symbols, numbers, arithmetic.
_SYMBOL = re.compile(r"Symbol\('[a-z]+\d*'(?:, [a-z]+=(?:True|False))*\)")
_SIZE = re.compile(
    r"(?:(?:Integer|Rational|Mul|Add|Pow|Mod|PythonMod|FloorDiv|CleanDiv|Max|Min)\(|[a-z]\d+|\d+|[-+*/%(), ])*"
)


def exported_file(path: Path) -> Any:
    """The program in a `.pt2` file. Before torch opens it, the file is looked through for whatever reading would
    execute: pickled weights and constants, objects of a custom kind, functions that are no operators, sizes that are
    no arithmetic, sample inputs that are more than tensors. Raises `InputError` on any of these, and on what is broken.
    """
    torch = _torch()
    where = str(path)
    try:
        with open(path, "rb") as file:
            try:
                with zipfile.ZipFile(file) as archive:
                    problems = list(_archive_problems(archive, where))
            except (zipfile.BadZipFile, EOFError, OSError, zlib.error, NotImplementedError, RuntimeError) as error:
                rule = f"is no .pt2 file, or a truncated one: {_first_line(error)}"
                raise InputError([Problem(where, "", rule)]) from None
            if problems:
                raise InputError(problems)
            file.seek(0)
            try:
                with _silence():
                    return torch.export.load(file)
            except Exception as error:  # whatever torch finds wrong with it
                rule = f"torch cannot read it: {type(error).__name__}: {_first_line(error)}"
                raise InputError([Problem(where, "", rule)]) from None
    except OSError as error:
        raise InputError([Problem(where, "", f"cannot be read: {error.strerror or error}")]) from None


def _archive_problems(archive: zipfile.ZipFile, where: str) -> Iterator[Problem]:
    names = archive.namelist()
    found = archive.testzip()
    if found:
        yield Problem(where, found, "is damaged (its checksum does not fit)")
        return
    inside = [name.partition("/")[2] for name in names]
    models = [name for name, own in zip(names, inside, strict=True) if re.fullmatch(r"models/[^/]+\.json", own)]
    if "archive_format" not in inside or not models:
        yield Problem(where, "", "is no .pt2 archive as torch.export.save of torch 2.8 and later writes it")
        return
    for name, own in zip(names, inside, strict=True):
        if own.startswith("data/aotinductor") or own.endswith((".so", ".py", ".pyc", ".dll")):
            yield Problem(where, name, "holds compiled code, which is never loaded")
        elif own.startswith("data/sample_inputs/"):
            yield from _pickle_problems(archive.read(name), f"{where}: {name}")
        elif own.endswith(("_weights_config.json", "_constants_config.json")):
            for key, entry in sorted(_config(archive.read(name)).items()):
                if not isinstance(entry, dict) or entry.get("use_pickle", True) or _is_custom(entry):
                    rule = "is pickled, or an object of a custom kind: reading it could execute code, so it is refused"
                    yield Problem(f"{where}: {name}", key, rule)
    for name in models:
        try:
            content = json.loads(archive.read(name))
        except (ValueError, RecursionError):
            yield Problem(f"{where}: {name}", "", "is not JSON")
            continue
        yield from _json_problems(content, f"{where}: {name}")


def _config(content: bytes) -> dict[str, Any]:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return {"": None}
    config = found.get("config", found) if isinstance(found, dict) else None
    return config if isinstance(config, dict) else {"": None}


def _is_custom(entry: dict[str, Any]) -> bool:
    return not re.fullmatch(r"(weight|tensor)_\d+", str(entry.get("path_name", "")))


def _pickle_problems(content: bytes, where: str) -> Iterator[Problem]:
    """Sample inputs that torch's safe loader refuses: with it, torch would go on to the unsafe one."""
    torch = _torch()
    try:
        torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # what it raises depends on what it finds
        yield Problem(where, "", "holds more than tensors: reading it could execute code, so it is refused")


def _json_problems(content: Any, where: str) -> Iterator[Problem]:
    stack = [content]
    while stack:
        item = stack.pop()
        if isinstance(item, list):
            stack += item
        elif isinstance(item, dict):
            stack += item.values()
            target, size = item.get("target"), item.get("expr_str")
            if isinstance(target, str) and "inputs" in item and not _TARGET.fullmatch(target):
                yield Problem(where, target[:100], "is no operator that a saved program may call")
            if size is not None and not (isinstance(size, str) and _SIZE.fullmatch(_SYMBOL.sub("s0", size))):
                yield Problem(where, str(size)[:100], "is no size: numbers, symbols and arithmetic are")


# --- the user's function ----------------------------------------------------------------------------------------------


def _torch() -> ModuleType:
    try:
        return importlib.import_module("torch")
    except ImportError:
        rule = "a PyTorch model needs PyTorch: pip install 'meshwright[run]'"
        raise InputError([Problem("model", "", rule)]) from None


def _function(text: str) -> Any:
    module_name, _, function_name = text.partition(":")
    if not all(part.isidentifier() for part in (*module_name.split("."), *function_name.split("."))):
        raise InputError([Problem("model", text, "must be module:function, both names as Python writes them")])
    module = _imported(module_name, text)
    found: Any = module
    for part in function_name.split("."):
        if not hasattr(found, part):
            names = [name for name, value in vars(found).items() if callable(value) and not name.startswith("_")]
            rule = f"{module_name} has no function {function_name}"
            near = nearest_name(part, names)
            raise InputError([Problem("model", text, rule, near and f"{module_name}:{near}")])
        found = getattr(found, part)
    if not callable(found):
        raise InputError([Problem("model", text, f"is not a function but {type(found).__name__}; {_RETURNS}")])
    return found


def _imported(name: str, text: str) -> ModuleType:
    with _current_folder_first():
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or name
            if name == missing or name.startswith(f"{missing}."):
                known = sorted(path.stem for path in Path.cwd().glob("*.py"))
                rule = f"no module {name} in the current folder or on PYTHONPATH"
                near = nearest_name(name, known)
                tail = text.partition(":")[2]
                raise InputError([Problem("model", text, rule, near and f"{near}:{tail}")]) from None
            rule = f"its module needs {missing}, which is not installed{_place(error)}"
            raise InputError([Problem("model", text, rule)]) from None
        except Exception as error:  # whatever a user's module raises
            rule = f"its module cannot be imported: {type(error).__name__}: {_first_line(error)}{_place(error)}"
            raise InputError([Problem("model", text, rule)]) from None


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = os.getcwd()
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _module_and_example(made: Any, text: str) -> tuple[Any, Any]:
    torch = _torch()
    if isinstance(made, torch.nn.Module):
        example = getattr(made, "example_inputs", None)
        if example is None:
            example = getattr(made, "dummy_inputs", None)
        if example is None:
            rule = f"{type(made).__name__} does not say what its inputs look like; {_RETURNS}"
            raise InputError([Problem("model", text, rule)])
        made = (made, example() if callable(example) else example)
    pair = isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], torch.nn.Module)
    if pair and isinstance(made[1], torch.Tensor):
        return made[0], (made[1],)
    if pair and isinstance(made[1], (tuple, list, Mapping)):
        return made[0], made[1] if isinstance(made[1], Mapping) else tuple(made[1])
    kind = type(made).__name__
    if isinstance(made, tuple):
        kind = f"tuple of {', '.join(type(item).__name__ for item in made) or 'nothing'}"
    raise InputError([Problem("model", text, f"returned {kind}; it must {_RETURNS}")])


def _example_problems(where: str, values: Sequence[Any]) -> list[Problem]:
    torch = _torch()
    tensors = [value for value in _leaves(values) if isinstance(value, torch.Tensor)]
    if not tensors:
        return [Problem(where, "", "example inputs without a tensor")]
    if not any(tensor.dim() for tensor in tensors):
        return [Problem(where, "", "example inputs have no dims; dim 0 of each is the batch")]
    empty = [str(tuple(tensor.shape)) for tensor in tensors if not tensor.numel()]
    return [Problem(where, ", ".join(empty), "example inputs must not be empty")] if empty else []


def _leaves(values: Any) -> list[Any]:
    from torch.utils import _pytree

    return list(_pytree.tree_leaves(values))


# --- export -----------------------------------------------------------------------------------------------------------


def _exported(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], where: str, *, equal_layers_once: bool
) -> tuple[Any, int, dict[int, tuple[str, list[str]]]]:
    """The exported program, the batch that it was traced with, and the layers that are placeholders in it."""
    torch = _torch()
    from torch.utils import _pytree

    batch = next(value.shape[0] for value in _leaves((args, kwargs)) if isinstance(value, torch.Tensor) and value.dim())
    traced_batch = max(2, batch)  # a dim of size 1 could not be told from one that is broadcast

    def on_meta(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        shape = list(value.shape)
        if shape and shape[0] == batch:
            shape[0] = traced_batch
        return torch.empty(shape, dtype=value.dtype, device="meta")

    args, kwargs = _pytree.tree_map(on_meta, (args, kwargs))
    module = _on_meta(module, where)
    returned = module.register_forward_hook(_fields)
    with _without_caches(module), _silence(), torch.device("meta"):
        try:
            spared: Any = placeholders(module, torch) if equal_layers_once else nullcontext({})
            with spared as runs:
                if equal_layers_once and not runs:
                    raise LayersDiffer
                return torch.export.export(module, args, kwargs, strict=False), traced_batch, runs
        except LayersDiffer:
            raise
        except Exception as error:  # torch raises errors of many kinds
            raise InputError([_export_problem(error, where)]) from None
        finally:
            returned.remove()


def _on_meta(module: Any, where: str) -> Any:
    """The module with all its tensors on the meta device, those too that are plain attributes: a copy where one of them
    has data, so that the caller keeps them. `Module.to("meta")` would part tied parameters."""
    torch = _torch()
    tensors = [
        tensor for part in module.modules() for tensor in vars(part).values() if isinstance(tensor, torch.Tensor)
    ]
    tensors += [*module.parameters(), *module.buffers()]
    memo: dict[int, Any] = {}
    for tensor in tensors:
        if tensor.device.type != "meta":
            found = torch.empty_like(tensor, device="meta", requires_grad=False)
            is_parameter = isinstance(tensor, torch.nn.Parameter)
            memo[id(tensor)] = torch.nn.Parameter(found, tensor.requires_grad) if is_parameter else found
    if not memo:
        return module
    try:
        return copy.deepcopy(module, memo)
    except Exception as error:  # what cannot be copied says so in many ways
        rule = f"has data and cannot be copied without: {_first_line(error)}; make it under torch.device('meta')"
        raise InputError([Problem(where, type(module).__name__, rule)]) from None


def _fields(_module: Any, _args: Any, outcome: Any) -> Any:
    """What a forward returns, a dataclass as its fields: `torch.export` knows those only that were registered."""
    from torch.utils import _pytree

    is_unknown = is_dataclass(outcome) and not isinstance(outcome, type) and _pytree.tree_is_leaf(outcome)
    return {item.name: getattr(outcome, item.name) for item in fields(outcome)} if is_unknown else outcome


@contextmanager
def _silence() -> Iterator[None]:
    """Without torch's own account of what it does: what matters is in the error."""
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.CRITICAL)
        try:
            yield
        finally:
            logging.disable(before)


@contextmanager
def _without_caches(module: Any) -> Iterator[None]:
    """Hugging Face's models without the keys and values of earlier tokens, which training does not have."""
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    for config in list(configs.values()):
        for name in ("text_config", "vision_config", "encoder", "decoder"):
            if hasattr(config, name):
                configs.setdefault(id(getattr(config, name)), getattr(config, name))
    before = [(config, config.use_cache) for config in configs.values() if getattr(config, "use_cache", False) is True]
    for config, _ in before:
        config.use_cache = False
    try:
        yield
    finally:
        for config, value in before:
            config.use_cache = value


def _export_problem(error: Exception, where: str) -> Problem:
    text = str(error)
    kind = type(error).__name__
    by_data = "GuardOnDataDependent" in kind or "ata-dependent" in text or "cannot be called on meta" in text
    if by_data or "Could not guard on data" in text or "DynamicOutputShape" in kind:
        what = next((line for line in text.splitlines() if "Could not" in line or "guard" in line), _first_line(error))
        rule = f"its control flow or shapes depend on data: {what.strip()}{_place(error)}"
        return Problem(where, "", f"{rule}; write it without branches on tensors (torch.where, fixed sizes)")
    return Problem(where, "", f"cannot be traced: {kind}: {_first_line(error)}{_place(error)}")


def _place(error: BaseException) -> str:
    """The last line of the user's own code in a traceback, where there is one."""
    own = Path(__file__).parent
    torch_folder = str(Path(sys.modules["torch"].__file__ or "").parent) if "torch" in sys.modules else "/torch/"
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith((torch_folder, "<", str(own))) and "importlib" not in frame.filename
    ]
    return f" (at {frames[-1].filename}:{frames[-1].lineno})" if frames else ""


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__


# --- from an exported program -----------------------------------------------------------------------------------------


def exported_program(
    exported: Any,
    name: str,
    batch: int,
    where: str = "model",
    runs: Mapping[int, tuple[str, list[str]]] | None = None,
) -> Program:
    """The `Program` of a `torch.export.ExportedProgram`; `batch` 0: that of its first input. `runs` are the layers that
    are placeholders in it."""
    try:
        return _Reader(exported, name, batch, where, runs or {}).program()
    except _Mutation:
        if runs:
            raise LayersDiffer from None
        with _silence():
            exported = exported.run_decompositions({})
        return exported_program(exported, name, batch, where)
    except _Composite as error:
        if runs:
            raise LayersDiffer from None
        with _silence():
            exported = exported.run_decompositions(error.table)
        return _Reader(exported, name, batch, where, are_parts_read=True).program()


class _Composite(Exception):
    """Operators without a rule that PyTorch writes as several others (a GRU cell): these are read in their place."""

    def __init__(self, table: dict[Any, Any]) -> None:
        super().__init__()
        self.table = table


class _Mutation(Exception):
    """A tensor is changed in place that others see; only a functional form of the program can say what they see."""


def _composites(module: Any) -> dict[Any, Any]:
    """How PyTorch decomposes those operators of a graph that make floats and that no rule knows, where it can. (What
    masks and positions are made of needs no rule.)"""
    torch = sys.modules["torch"]

    def is_float(value: Any) -> bool:
        first = value[0] if isinstance(value, (tuple, list)) and value else value
        return isinstance(first, torch.Tensor) and (first.is_floating_point() or first.is_complex())

    graphs = [part.graph for part in module.modules() if isinstance(part, torch.fx.GraphModule)]
    nodes = [node for graph in graphs for node in graph.nodes if isinstance(node.target, torch._ops.OpOverload)]
    unknown = {
        node.target
        for node in nodes
        if is_float(node.meta.get("val"))
        and rule_of(_functional(str(node.target))) is None
        and node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    }
    known = torch.export.default_decompositions() if unknown else {}
    return {target: known[target] for target in unknown if target in known}


_DTYPES: dict[Any, str] = {}


def _dtype(dtype: Any) -> str:
    if dtype not in _DTYPES:
        _DTYPES[dtype] = str(dtype).removeprefix("torch.")
    return _DTYPES[dtype]


@dataclass
class _Reader:
    """Reads the nodes of an exported program in order."""

    exported: Any
    name: str
    batch: int
    where: str
    runs: Mapping[int, tuple[str, list[str]]] = field(default_factory=dict)
    are_parts_read: bool = False
    values: dict[str, Value] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    owners: dict[int, str] = field(default_factory=dict)
    names: set[str] = field(default_factory=set)
    schemas: dict[Any, Any] = field(default_factory=dict)

    def program(self) -> Program:
        graph = self.exported.graph_module.graph
        made: dict[Any, Any] = {}
        specs = {spec.arg.name: spec for spec in self.exported.graph_signature.input_specs}
        tied: dict[int, list[str]] = {}
        for node in graph.find_nodes(op="placeholder"):
            made[node] = self._placeholder(node, specs[node.name], tied)
        if not self.are_parts_read and (composites := _composites(self.exported.graph_module)):
            raise _Composite(composites)
        outputs = self._nodes(self.exported.graph_module, made, grad=True)
        mutated = {
            spec.arg.name
            for spec in self.exported.graph_signature.output_specs
            if spec.kind.name not in ("USER_OUTPUT", "LOSS_OUTPUT")
        }
        kept = [
            outcome
            for node, outcome in outputs
            if isinstance(outcome, str) and getattr(node, "name", "") not in mutated
        ]
        inputs = tuple(name for name, value in self.values.items() if value.role is Role.INPUT)
        if not inputs:
            raise InputError([Problem(self.where, "", "has no input tensors")])
        if not kept:
            raise InputError([Problem(self.where, "", "returns no tensor")])
        batch = self.batch or self.values[inputs[0]].shape[0]
        if self.runs:
            self.calls, renamed = expanded(self.calls, self.values, self.runs)
            kept = [renamed.get(name, name) for name in kept]
        calls, used = needed(self.calls, kept)
        values = {
            name: value
            for name, value in self.values.items()
            if name in used or value.role in (Role.PARAMETER, Role.INPUT)
        }
        pairs = tuple((names[0], other) for names in tied.values() for other in names[1:])
        return Program(self.name, values, calls, inputs, tuple(dict.fromkeys(kept)), batch, pairs)

    def _placeholder(self, node: Any, spec: Any, tied: dict[int, list[str]]) -> str | None:
        torch = sys.modules["torch"]
        found = node.meta.get("val")
        if not isinstance(found, torch.Tensor):
            return None
        kind = spec.kind.name
        role = {"PARAMETER": Role.PARAMETER, "USER_INPUT": Role.INPUT}.get(kind, Role.BUFFER)
        path = spec.target or ""
        name = self._unique(path or node.name)
        trained = False
        if role is Role.PARAMETER:
            weight = self.exported.state_dict[path]
            trained = bool(weight.requires_grad)
            tied.setdefault(_storage_key(weight), []).append(name)
        shape = tuple(_size(size) or 0 for size in found.shape)
        self.values[name] = Value(name, shape, _dtype(found.dtype), role, trained, path)
        self.owners.setdefault(_storage_key(found), name)
        return name

    def _unique(self, name: str) -> str:
        number, found = 1, name
        while found in self.names:
            found, number = f"{name}_{number}", number + 1
        self.names.add(found)
        return found

    def _nodes(self, module: Any, made: dict[Any, Any], grad: bool) -> list[tuple[Any, Any]]:
        """Read the nodes of a graph; what it returns, each with its node."""
        for node in module.graph.nodes:
            if node.op == "call_function":
                made[node] = self._call_function(module, node, made, grad)
            elif node.op == "get_attr":
                made[node] = self._attribute(module, node)
            elif node.op == "output":
                outputs = node.args[0]
                flat = outputs if isinstance(outputs, (tuple, list)) else [outputs]
                return [(item, made.get(item) if hasattr(item, "op") else None) for item in flat]
        return []

    def _attribute(self, module: Any, node: Any) -> Any:
        torch = sys.modules["torch"]
        found = module
        for part in str(node.target).split("."):
            found = getattr(found, part)
        if not isinstance(found, torch.Tensor):
            return found
        name = self._unique(str(node.target))
        shape = tuple(map(int, found.shape))
        self.values[name] = Value(name, shape, _dtype(found.dtype), Role.BUFFER, False, str(node.target))
        return name

    def _call_function(self, module: Any, node: Any, made: dict[Any, Any], grad: bool) -> Any:
        torch = sys.modules["torch"]
        target = node.target
        if target is _getitem:
            source = made[node.args[0]]
            return source[node.args[1]] if isinstance(source, (tuple, list)) else source
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self._higher_order(module, node, made, grad)
        if isinstance(node.meta.get("val"), (int, torch.SymInt)):
            return self._number(node)
        if not isinstance(target, torch._ops.OpOverload):
            if target.__name__ == "_set_grad_enabled" or "val" not in node.meta:
                return None
            if "functorch" in (target.__module__ or ""):
                rule = f"torch.vmap and other function transforms cannot be read{_node_place(node)}"
                raise InputError([Problem(self.where, "", f"{rule}; write it over the whole batch")])
            rule = f"{getattr(target, '__name__', target)} depends on data{_node_place(node)}"
            raise InputError([Problem(self.where, "", f"its control flow or shapes depend on data: {rule}")])
        return self._operator(node, target, made, grad)

    def _number(self, node: Any) -> int:
        """A size that the program computes."""
        size = _size(node.meta["val"])
        if size is None:
            rule = f"{node.target} makes a size of data{_node_place(node)}"
            raise InputError([Problem(self.where, "", f"its control flow or shapes depend on data: {rule}")])
        return size

    def _higher_order(self, module: Any, node: Any, made: dict[Any, Any], grad: bool) -> Any:
        torch = sys.modules["torch"]
        name = str(node.target)
        if any(word in name for word in _CONTROL_FLOW):
            rule = f"its control flow depends on data ({name}{_node_place(node)}); write it without branches on tensors"
            raise InputError([Problem(self.where, "", rule)])
        at = (
            next(
                (index for index, item in enumerate(node.args) if isinstance(made.get(item), torch.fx.GraphModule)),
                None,
            )
            if all(not isinstance(item, (list, tuple, dict)) for item in node.args[:5])
            else None
        )
        if at is None:
            raise InputError(
                [Problem(self.where, name, f"this higher-order operator cannot be read{_node_place(node)}")]
            )
        body = made[node.args[at]]
        arguments = [made.get(item) if hasattr(item, "op") else item for item in node.args[at + 1 :]]
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), arguments, strict=True))
        grad = grad and not ("set_grad_enabled" in name and node.args[0] is False)
        outcomes = [outcome for _, outcome in self._nodes(body, inner, grad)]
        return tuple(outcomes)

    def _operator(self, node: Any, target: Any, made: dict[Any, Any], grad: bool) -> Any:
        torch = sys.modules["torch"]
        found = node.meta.get("val")
        results = (
            [found] if isinstance(found, torch.Tensor) else list(found) if isinstance(found, (tuple, list)) else []
        )
        results = [item for item in results if item is not None]
        if not results or any(not isinstance(item, torch.Tensor) for item in results):
            if isinstance(found, (int, float, bool, torch.SymInt, torch.SymFloat, torch.SymBool)):
                rule = f"{target} makes a number of a tensor{_node_place(node)}"
                raise InputError([Problem(self.where, "", f"its control flow or shapes depend on data: {rule}")])
            return None
        operands, attributes = self._arguments(node, target, made)
        shapes = [tuple(_size(size) for size in item.shape) for item in results]
        if any(size is None for shape in shapes for size in shape):
            rule = f"the shape of a result of {target} depends on data{_node_place(node)}"
            raise InputError([Problem(self.where, "", rule)])
        op = str(target)
        inputs = [name for item in operands.values() for name in ((item,) if isinstance(item, str) else item)]
        trained = grad and any(self.values[name].differentiable for name in inputs) and "detach" not in op
        call_name = self._unique(_call_name(node, op))
        trains = [trained] * len(results)
        if op == BLOCK:  # each result is like one of the operands
            trains = [self.values[inputs[index]].differentiable for index in attributes["like"]]
        outputs = []
        for index, item in enumerate(results):
            name = self._unique(f"{call_name}.out{index if len(results) > 1 else ''}")
            floats = item.dtype.is_floating_point or item.dtype.is_complex
            value = Value(name, shapes[index], _dtype(item.dtype), Role.ACTIVATION, trains[index] and floats)  # type: ignore[arg-type]
            outputs.append(name)
            self.values[name] = value
        if _writes(target):
            op = _functional(op)
            self._replace_mutated(node, made, outputs[0])
        for name, item in zip(outputs, results, strict=True):
            key = _storage_key(item)
            owner = self.owners.setdefault(key, name)
            if owner != name:
                packed = bool(item.is_contiguous())
                self.values[name] = replace(self.values[name], storage=owner, is_packed=packed)
        self.calls.append(Call(call_name, op, operands, tuple(outputs), attributes))
        return outputs[0] if isinstance(found, torch.Tensor) else tuple(outputs)

    def _arguments(self, node: Any, target: Any, made: dict[Any, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        operands: dict[str, str | tuple[str, ...]] = {}
        attributes: dict[str, Any] = {}
        schema = self.schemas.get(target)
        if schema is None:
            schema = self.schemas[target] = [argument.name for argument in target._schema.arguments]
        for argument, value in (*zip(schema, node.args, strict=False), *node.kwargs.items()):
            if hasattr(value, "op"):
                if isinstance(made[value], str):
                    operands[argument] = made[value]
                elif isinstance(made[value], (int, float)):
                    attributes[argument] = made[value]
            elif isinstance(value, (list, tuple)) and any(
                isinstance(made.get(item), str) for item in value if hasattr(item, "op")
            ):
                operands[argument] = tuple(made[item] for item in value if item is not None)
                attributes[f"{argument}_present"] = tuple(item is not None for item in value)
                if all(attributes[f"{argument}_present"]):
                    del attributes[f"{argument}_present"]
            elif value is not None and argument not in ("device", "pin_memory", "layout", "memory_format"):
                attributes[argument] = _plain(value, made)
        return operands, attributes

    def _replace_mutated(self, node: Any, made: dict[Any, Any], result: str) -> None:
        """Whoever reads the changed tensor later reads the result."""
        changed = made[node.args[0]]
        key = self.values[changed].storage or changed
        for other, name in made.items():
            if not isinstance(name, str) or other is node:
                continue
            if name == changed:
                made[other] = result
            elif (self.values[name].storage or name) == key and any(user > node for user in other.users):
                raise _Mutation


def _getitem_function() -> Any:
    import operator

    return operator.getitem


_getitem = _getitem_function()


def _storage_key(tensor: Any) -> int:
    return int(tensor.untyped_storage()._cdata)


def _plain(value: Any, made: Mapping[Any, Any]) -> Any:
    if isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(_plain(item, made) for item in value)
    return made[value] if hasattr(value, "op") else str(value).removeprefix("torch.")


def _size(size: Any) -> int | None:
    """A size as a number: of a symbolic one the number that it was traced with, None where data decide it."""
    if isinstance(size, int):
        return size
    hint = size.node.hint if size.node.has_hint() else None
    return int(hint) if hint is not None else None


def _writes(target: Any) -> bool:
    first = next(iter(target._schema.arguments), None)
    return first is not None and first.alias_info is not None and first.alias_info.is_write


def _functional(op: str) -> str:
    """The name of the operator that does the same to a copy: `aten.add_.Tensor` -> `aten.add.Tensor`."""
    space, name, overload = op.split(".", 2)
    return f"{space}.{name.removesuffix('_')}.{overload}"


def _call_name(node: Any, op: str) -> str:
    """The path of the innermost module that made the call, and the operator's short name."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    short = op.split(".")[1].strip("_")
    short = {"scaled_dot_product_attention": "attention"}.get(short, short)
    return f"{path}.{short}" if path else short


def _node_place(node: Any) -> str:
    lines = [
        line.strip() for line in (node.meta.get("stack_trace") or "").splitlines() if line.strip().startswith("File")
    ]
    own = [line for line in lines if "/torch/" not in line]
    if not own:
        return ""
    parts = own[-1].split(",")
    return f" (at {parts[0].removeprefix('File ').strip(chr(34))}:{parts[1].removeprefix(' line ')})"
