"""PyTorch models as graphs: FLOPs, parameters and saved bytes as PyTorch counts them, and every kind of bad input."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshwright.errors import InputError
from meshwright.graph import Role, graph_problems
from meshwright.io import torch_graph
from meshwright.io.dims import traced
from meshwright.io.models import is_traced, load_model, load_traced
from meshwright.io.saved import saved_bytes
from meshwright.io.traced import Program, Traced

EXAMPLES = Path(__file__).parents[1] / "examples" / "models"
sys.path.insert(0, str(EXAMPLES))
import architectures  # noqa: E402

HUGGING_FACE = ("llama", "qwen3", "phi3", "gpt2", "bert", "t5", "mixtral", "vit", "whisper", "clip")
OWN = ("mlp", "resnet", "unet", "dlrm", "bags", "lstm", "moe_block", "llama_block")

pytestmark = pytest.mark.filterwarnings("ignore")


def made(name: str, device: str = "meta", **sizes: int) -> tuple[nn.Module, Any]:
    with torch.device(device):
        return getattr(architectures, name)(**sizes)


def called(module: nn.Module, inputs: Any) -> Any:
    return module(**inputs) if isinstance(inputs, Mapping) else module(*inputs)


@cache
def exported(name: str) -> tuple[Any, Program, Traced, nn.Module, Any]:
    """A model's exported program, its Program and graph, and itself with its inputs."""
    module, inputs = made(name)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    found, batch, _ = torch_graph._exported(module, args, dict(kwargs), name, equal_layers_once=False)
    program = torch_graph.exported_program(found, name, batch)
    return found, program, traced(program), module, inputs


def counted_flops(module: nn.Module, inputs: Any) -> int:
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        called(module, inputs)
    return counter.get_total_flops()


# Of Mixtral, PyTorch counts no grouped products: 3 layers x 64 rows (2 experts for 32 tokens) x 64 x 3 * 192 x 2.
# Of the LSTM no product of its layers: 4 sequences x 12 steps x 4 gates of 32 x (16 + 32, then 32 + 32 inputs) x 2.
UNCOUNTED = {"mixtral": 3 * 64 * 64 * 3 * 192 * 2, "lstm": 4 * 12 * 4 * 32 * (16 + 32 + 32 + 32) * 2}


@pytest.mark.parametrize("name", [*HUGGING_FACE, *OWN])
def test_a_model_is_a_graph_with_pytorchs_flops_and_parameters(name: str) -> None:
    _, program, found, module, _ = exported(name)
    graph = found.graph
    assert graph_problems(graph) == []
    assert found.warnings == ()
    assert graph.num_parameters == sum(parameter.numel() for parameter in module.parameters())
    flops = counted_flops(*made(name, "cpu")) + UNCOUNTED.get(name, 0)
    assert graph.forward_flops(program.batch, 1) == flops
    unfolded = traced(program, fold=False).graph
    assert graph_problems(unfolded) == []
    assert len(unfolded.sequence) == 1
    assert unfolded.forward_flops(program.batch, 1) == flops
    assert unfolded.num_parameters == graph.num_parameters


@pytest.mark.parametrize("name", ["llama", "resnet", "dlrm", "clip"])
def test_the_batch_is_symbolic(name: str) -> None:
    graph = exported(name)[2].graph
    assert graph.forward_flops(6, 1) == counted_flops(*made(name, "cpu", batch=6))


# What the LSTM (unrolled, on the meta device) and an einsum of three operands keep between their steps is not said.
@pytest.mark.parametrize("name", [name for name in (*HUGGING_FACE, *OWN) if name not in ("lstm", "moe_block")])
def test_saved_bytes_are_pytorchs(name: str) -> None:
    found, program, ours, _, inputs = exported(name)
    module = found.module()
    parameters = {parameter.untyped_storage()._cdata for parameter in module.parameters()}
    storages: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)  # so that no storage's place is used twice
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage.nbytes()
        return tensor

    with torch.device("meta"), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        called(module, inputs)
    assert saved_bytes(ours, fused=False) == sum(storages.values())
    # A fused attention keeps no scores. All that is kept grows with the batch or not at all.
    assert saved_bytes(ours) <= sum(storages.values())
    double, single = (saved_bytes(ours, batch) for batch in (2 * program.batch, program.batch))
    assert single < double <= 2 * single or name == "clip"  # each with each grows with its square


@pytest.mark.parametrize("name", ["llama", "t5", "whisper", "vit", "mixtral"])
def test_equal_layers_traced_once_give_the_same_program(name: str) -> None:
    module, inputs = made(name, layers=7)
    args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
    short, _, runs = torch_graph._exported(module, args, dict(kwargs), name, equal_layers_once=True)
    assert runs
    once = torch_graph.module_program(module, inputs, name=name)
    whole = torch_graph.module_program(module, inputs, name=name, equal_layers_once=False)
    assert len(short.graph.find_nodes(op="call_function", target=torch.ops.meshwright.block.default)) >= 7
    assert once == whole
    assert called(*made(name, "cpu", layers=7)) is not None  # the classes are as they were


class Numbered(nn.Module):
    """A layer that knows its number; every fourth one is another."""

    def __init__(self, number: int, uses: str) -> None:
        super().__init__()
        self.linear, self.number, self.uses = nn.Linear(4, 4), number, uses

    def forward(self, x: torch.Tensor, scale: int = 1) -> torch.Tensor:
        x = self.linear(x) * scale
        return x.relu() if self.uses == "number" and self.number % 4 == 3 else x


class Stack(nn.Module):
    def __init__(self, uses: str) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Numbered(number, uses) for number in range(8))
        self.uses = uses

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = x
        for number, layer in enumerate(self.layers):
            x = layer(x, 2 if self.uses == "argument" and number == 6 else 1)
            if self.uses == "skip" and number == 5:
                x = x + first
        return layer(x) if self.uses == "twice" else x


@pytest.mark.parametrize(
    ("uses", "is_spared"), [("nothing", True), ("skip", True), ("number", False), ("argument", False), ("twice", False)]
)
def test_layers_that_differ_are_traced_in_full(uses: str, is_spared: bool) -> None:
    module, inputs = Stack(uses), (torch.zeros(2, 4),)
    once = torch_graph.module_program(module, inputs)
    whole = torch_graph.module_program(module, inputs, equal_layers_once=False)
    assert once == whole
    assert [type(layer.number) for layer in module.layers] == [int] * 8
    assert all("forward" not in vars(layer) for layer in module.layers)
    try:
        short, batch, runs = torch_graph._exported(module, inputs, {}, "", equal_layers_once=True)
        torch_graph.exported_program(short, "", batch, "", runs)
        spared = True
    except torch_graph.LayersDiffer:
        spared = False
    assert spared is is_spared


def test_a_frozen_parameter_has_no_gradient_and_saves_less() -> None:
    """A LoRA pair beside a frozen product: the frozen weight's gradient is not made, so its operand is not kept."""

    class Lora(nn.Module):
        def __init__(self, frozen: bool) -> None:
            super().__init__()
            self.base, self.down, self.up = nn.Linear(8, 8, bias=False), nn.Linear(8, 2), nn.Linear(2, 8)
            self.base.requires_grad_(not frozen)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.base(x).relu() + self.up(self.down(x))

    free, frozen = (torch_graph.traced_module(Lora(is_frozen), (torch.zeros(4, 8),)) for is_frozen in (False, True))
    (block,) = frozen.graph.blocks
    assert not block.tensor["base.weight"].differentiable
    assert block.tensor["down.weight"].differentiable
    operators = {operator.name: operator for operator in block.operators}
    assert operators["base.linear"].saves == ()
    assert operators["relu"].saves == ()
    assert frozen.graph.num_parameters == free.graph.num_parameters
    assert saved_bytes(frozen) == saved_bytes(free) - 4 * 8 * 4  # the result of relu; x is kept by the pair


def test_tied_parameters_count_once() -> None:
    graph = exported("gpt2")[2].graph
    (pair,) = graph.tied
    assert [path.split("/")[0] for path in pair] == ["start", "end"]


def test_batch_of_one_is_traced_with_two() -> None:
    assert torch_graph.traced_module(nn.Linear(4, 4), (torch.zeros(1, 4),)).program.batch == 2


def test_a_module_with_data_keeps_it_and_its_ties() -> None:
    embedding, head = nn.Embedding(11, 4), nn.Linear(4, 11, bias=False)
    head.weight = embedding.weight
    before = head.weight.detach().clone()
    graph = torch_graph.traced_module(nn.Sequential(embedding, head), (torch.zeros(2, 3, dtype=torch.long),)).graph
    assert graph.num_parameters == before.numel()
    assert torch.equal(head.weight, before)
    assert head.weight is embedding.weight


def test_vmap_is_named() -> None:
    class Mapped(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return torch.vmap(super().forward)(x)

    with pytest.raises(InputError, match=r"torch\.vmap .*write it over the whole batch"):
        torch_graph.traced_module(Mapped(4, 4), (torch.zeros(2, 3, 4),))


@pytest.mark.parametrize("cell", [nn.GRUCell, nn.LSTMCell, nn.RNNCell])
def test_an_operator_without_a_rule_that_is_made_of_others_is_read_as_these(cell: Any) -> None:
    module, inputs = cell(6, 5), (torch.ones(4, 6),)
    found = torch_graph.traced_module(module, inputs)
    assert not found.warnings
    assert found.graph.forward_flops(4, 1) == counted_flops(module, inputs) > 0
    assert found.graph.forward_flops(12, 1) == 3 * found.graph.forward_flops(4, 1)


@dataclass
class Outcome:
    scores: torch.Tensor
    loss: torch.Tensor


class Dataclass(nn.Linear):
    def forward(self, x: torch.Tensor) -> Any:
        scores = super().forward(x)
        return Outcome(scores, scores.mean())


def test_a_forward_may_return_a_dataclass() -> None:
    module = Dataclass(4, 3)
    assert len(torch_graph.traced_module(module, (torch.zeros(2, 4),)).program.outputs) == 2
    assert isinstance(module(torch.zeros(2, 4)), Outcome)


def test_loading_presets_does_not_import_torch() -> None:
    code = "import sys, meshwright.io.models as m; m.load_model('llama-3-8b'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- module:function --------------------------------------------------------------------------------------------------

BAD = """
import torch
from torch import nn

class Branch(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        if y.sum() > 0:
            return y
        return 2 * y

class Masked(nn.Linear):
    def forward(self, x):
        return super().forward(x)[x[:, 0] > 0]

class Own(nn.Linear):
    def example_inputs(self):
        return (torch.zeros(2, 4),)

class InPlace(nn.Linear):
    def forward(self, x):
        y = super().forward(x)
        y[:, 0] += 1
        return y.relu_()

def branch(): return Branch(4, 4), (torch.zeros(2, 4),)
def masked(): return Masked(4, 4), (torch.zeros(2, 4),)
def shapes(): return nn.Linear(5, 4), (torch.zeros(2, 4),)
def raises(): raise ValueError("no luck")
def number(): return 3
def pair(): return nn.Linear(4, 4), 3
def bare(): return nn.Linear(4, 4)
def empty(): return nn.Linear(4, 4), ()
def scalar(): return nn.Linear(4, 4), (torch.tensor(1.0),)
def own(): return Own(4, 4)
def one(): return nn.Linear(4, 4), torch.zeros(2, 4)
def in_place(): return InPlace(4, 4), (torch.zeros(2, 4),)
constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "odd_models.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "odd_models", raising=False)
    return tmp_path


def refusal(text: str) -> str:
    with pytest.raises(InputError) as caught:
        load_model(text)
    assert len(caught.value.problems) == 1
    return str(caught.value)


@pytest.mark.parametrize("name", ["own", "one", "in_place"])
def test_functions_found_from_the_current_folder(name: str, folder: Path) -> None:
    assert load_model(f"odd_models:{name}").num_parameters == 20
    assert str(folder) not in sys.path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("odd_models:branch", "its control flow or shapes depend on data: Could not guard on data-dependent"),
        ("odd_models:branch", "odd_models.py:8); write it without branches on tensors"),
        ("odd_models:masked", "the shape of a result of aten.index.Tensor depends on data (at "),
        ("odd_models:shapes", "cannot be traced: RuntimeError: a and b must have same reduction dim"),
        ("odd_models:raises", "the function failed: ValueError: no luck (at "),
        (
            "odd_models:number",
            "returned int; it must return an nn.Module with an `example_inputs()` method, or (nn.Module",
        ),
        ("odd_models:pair", "returned tuple of Linear, int; it must return"),
        ("odd_models:bare", "Linear does not say what its inputs look like; return an nn.Module with"),
        ("odd_models:empty", "example inputs without a tensor"),
        ("odd_models:scalar", "example inputs have no dims; dim 0 of each is the batch"),
        ("odd_models:constant", "is not a function but int"),
        ("odd_models:brnch", "odd_models has no function brnch (nearest: odd_models:branch)"),
        ("odd_model:x", "no module odd_model in the current folder or on PYTHONPATH (nearest: odd_models:x)"),
        ("odd_models:", "must be module:function, both names as Python writes them"),
        ("no/such.pt2", "there is no such file"),
        ("no/such.onnx", "there is no such file"),
        ("odd_models.py", "a Python file is not a model; name the function in it"),
    ],
)
def test_what_is_wrong_with_a_function_is_said(text: str, message: str, folder: Path) -> None:
    assert message in refusal(text)


def test_a_module_that_cannot_be_imported(folder: Path) -> None:
    (folder / "broken_models.py").write_text("import not_there_at_all\n")
    assert "its module needs not_there_at_all, which is not installed (at " in refusal("broken_models:x")
    (folder / "fails_models.py").write_text("1 / 0\n")
    assert "its module cannot be imported: ZeroDivisionError: division by zero (at " in refusal("fails_models:x")


# --- .pt2 -------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 6)
        self.register_buffer("shift", torch.ones(6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.linear(x) + self.shift).view(x.shape[0] * 2, 3).relu().view(-1, 6)


def saved(path: Path, dynamic: bool = False) -> Path:
    sizes = ({0: torch.export.Dim("n", min=2)},) if dynamic else None
    program = torch.export.export(Small(), (torch.zeros(4, 4),), strict=False, dynamic_shapes=sizes)
    torch.export.save(program, path)
    return path


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_saved_program_is_the_model(dynamic: bool, tmp_path: Path) -> None:
    found = load_traced(str(saved(tmp_path / "small.pt2", dynamic)))
    direct = torch_graph.traced_module(Small(), (torch.zeros(4, 4),), name="small")
    assert is_traced("small.pt2")
    assert found.graph == direct.graph
    assert found.graph.forward_flops(10, 1) == 2 * 10 * 4 * 6
    (block,) = found.graph.blocks
    assert {tensor.role for tensor in block.tensors} == set(Role)


@pytest.mark.parametrize("part", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_program(part: float, tmp_path: Path) -> None:
    path = saved(tmp_path / "small.pt2")
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * part)])
    assert "is no .pt2 " in refusal(str(path))


def test_damaged_programs(tmp_path: Path) -> None:
    path = saved(tmp_path / "small.pt2")
    content = bytearray(path.read_bytes())
    content[content.index(b"graph_module")] ^= 1
    path.write_bytes(content)
    assert "model.json: is damaged" in refusal(str(path)) or "is damaged" in refusal(str(path))
    path.write_text("hello")
    assert "is no .pt2 file, or a truncated one: File is not a zip file" in refusal(str(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/readme", "hello")
    assert "is no .pt2 archive as torch.export.save of torch 2.8 and later writes it" in refusal(str(path))


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)


def rewritten(path: Path, change: Callable[[str, bytes], bytes], extra: Mapping[str, bytes] | None = None) -> None:
    with zipfile.ZipFile(path) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(contents)).partition("/")[0]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, change(name, content))
        for name, content in (extra or {}).items():
            archive.writestr(f"{root}/{name}", content)


def evil(kind: str, trap: Path) -> tuple[Callable[[str, bytes], bytes], dict[str, bytes], str]:
    bomb = pickle.dumps(Bomb(trap))
    command = f"__import__('os').mkdir('{trap}')"

    def inputs(name: str, content: bytes) -> bytes:
        buffer = io.BytesIO()
        torch.save(Bomb(trap), buffer)
        return buffer.getvalue() if "sample_inputs" in name else content

    def weights(name: str, content: bytes) -> bytes:
        if name.endswith("weight_0"):
            return bomb
        return content.replace(b'"use_pickle": false', b'"use_pickle": true') if "weights_config" in name else content

    def constants(name: str, content: bytes) -> bytes:
        if not name.endswith("constants_config.json"):
            return content
        config = json.loads(content)
        config["config"]["odd"] = {"path_name": "custom_obj_0", "is_param": False, "use_pickle": False}
        return json.dumps(config).encode()

    def model(change: Callable[[str], str]) -> Callable[[str, bytes], bytes]:
        return lambda name, content: change(content.decode()).encode() if "/models/" in name else content

    if kind == "inputs":
        return inputs, {}, "holds more than tensors: reading it could execute code"
    if kind == "weights":
        return weights, {}, "is pickled, or an object of a custom kind"
    if kind == "constants":
        return constants, {"data/constants/custom_obj_0": bomb}, "is pickled, or an object of a custom kind"
    if kind == "code":
        return lambda _, content: content, {"data/aotinductor/model/x.so": b"x"}, "holds compiled code"
    if kind == "target":
        change = model(lambda text: text.replace("torch.ops.aten.relu.default", "torch.os.system", 1))
        return change, {}, "is no operator that a saved program may call"
    assert kind == "size"
    change = model(lambda text: text.replace("\"Symbol('", '"' + command + "+Symbol('", 1))
    return change, {}, "is no size: numbers, symbols and arithmetic are"


@pytest.mark.parametrize("kind", ["inputs", "weights", "constants", "code", "target", "size"])
def test_loading_never_executes_code(kind: str, tmp_path: Path) -> None:
    path, trap = saved(tmp_path / "small.pt2", dynamic=True), tmp_path / "sprung"
    change, extra, message = evil(kind, trap)
    rewritten(path, change, extra)
    with pytest.raises(InputError) as caught:
        load_model(str(path))
    assert message in str(caught.value)
    assert not trap.exists()


def test_what_is_rewritten_without_a_change_still_loads(tmp_path: Path) -> None:
    path = saved(tmp_path / "small.pt2")
    rewritten(path, lambda _, content: content)
    assert load_model(str(path)).num_parameters == 30
