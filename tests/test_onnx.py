"""ONNX files: what a program of one holds, that its FLOPs are those of the model it came from, and what is refused."""

from __future__ import annotations

import importlib.util
import itertools
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meshwright.errors import InputError
from meshwright.graph import Role, graph_problems
from meshwright.io.onnx import read_onnx, traced_onnx
from meshwright.io.onnx.sizes import SYMBOLIC_BATCH
from meshwright.io.traced import Program
from onnx_models import FLOAT, INT64, Net, attention, cnn, lstm, mlp


def program_of(net: Net, folder: Path, **sizes: int) -> Program:
    return read_onnx(net.save(folder), sizes=sizes).program


def ops_of(program: Program) -> list[str]:
    return [call.op.removeprefix("onnx.") for call in program.calls]


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as error:
        read_onnx(path)
    return str(error.value)


# ---- what a program holds


def test_mlp_is_read_without_its_weights(tmp_path):
    program = program_of(mlp(), tmp_path)
    assert ops_of(program) == ["Gemm", "Relu", "MatMul", "Add"]
    assert program.batch == SYMBOLIC_BATCH
    assert [program.values[name].shape for name in program.inputs] == [(SYMBOLIC_BATCH, 64)]
    assert [program.values[name].shape for name in program.outputs] == [(SYMBOLIC_BATCH, 10)]
    parameters = {value.path: value.shape for value in program.values.values() if value.role is Role.PARAMETER}
    assert parameters == {"up.weight": (256, 64), "up.bias": (256,), "down.weight_t": (256, 10), "down.bias": (10,)}
    gemm = program.calls[0]
    assert dict(gemm.operands) == {"A": "x", "B": "up.weight", "C": "up.bias"}
    assert gemm.attributes["transB"] == 1
    assert gemm.attributes["alpha"] == 1.0  # the schema's default
    assert program.values[gemm.outputs[0]].dtype == "float32"
    assert program.values[gemm.outputs[0]].differentiable


@pytest.mark.parametrize("opset", [14, 17, 18, 20, 23])
@pytest.mark.parametrize("net", [mlp, attention, cnn, lstm])
def test_every_shape_is_the_one_that_a_run_gives(tmp_path, net, opset):
    """By ONNX's reference implementation, with random weights and inputs."""
    program = program_of(net(opset), tmp_path)
    model = net(opset).filled()
    generator = np.random.default_rng(1)
    feeds = {}
    for name in program.inputs:
        value = program.values[name]
        array = generator.uniform(0, 9, value.shape)
        feeds[name] = array.astype(value.dtype)
    made = ReferenceEvaluator(model).run(None, feeds)
    arrays = dict(zip((item.name for item in model.graph.output), made, strict=True))
    compared = [name for name in program.values if name in arrays]
    assert len(compared) >= len(program.calls)
    for name in compared:
        value = program.values[name]
        assert (value.shape, value.dtype) == (arrays[name].shape, arrays[name].dtype.name), name


@pytest.mark.parametrize("opset", [13, 14, 17, 18, 20, 23])
def test_shape_arithmetic_is_folded(tmp_path, opset):
    program = program_of(attention(opset), tmp_path)
    kept = {"MatMul", "Reshape", "Transpose", "Slice", "Concat", "Neg", "Add", "Mul", "Unsqueeze", "Expand", "Div"}
    assert set(ops_of(program)) == kept | {"Where", "Softmax"}
    reshape = next(call for call in program.calls if call.op == "onnx.Reshape")
    assert list(reshape.operands) == ["data"]
    assert reshape.attributes["shape"] == (SYMBOLIC_BATCH, 16, 4, 16)
    shapes = {program.values[call.outputs[0]].shape for call in program.calls if call.op == "onnx.Softmax"}
    assert shapes == {(SYMBOLIC_BATCH, 4, 16, 16)}
    # What is left of the rotary positions and the mask are constants.
    buffers = sorted(value.shape for value in program.values.values() if value.role is Role.BUFFER)
    assert buffers == [(16, 16), (16, 16), (16, 16)]
    assert {value.dtype for value in program.values.values() if value.role is Role.BUFFER} == {"float32", "bool"}


def test_axes_read_alike_in_all_opsets(tmp_path):
    seen = set()
    for opset in (13, 17, 18, 23):
        program = program_of(cnn(opset), tmp_path)
        mean = next(call for call in program.calls if call.op == "onnx.ReduceMean")
        squeeze = next(call for call in program.calls if call.op == "onnx.Squeeze")
        seen.add((tuple(mean.operands), mean.attributes["axes"], mean.attributes["keepdims"]))
        assert (tuple(squeeze.operands), squeeze.attributes["axes"]) == (("data",), (2, 3))
    assert seen == {(("data",), (2, 3), 1)}


def test_running_statistics_are_state(tmp_path):
    program = program_of(cnn(), tmp_path)
    roles = {value.path: value.role for value in program.values.values() if value.path}
    assert [path for path, role in roles.items() if role is Role.BUFFER] == ["bn.mean", "bn.var"]
    assert roles["bn.scale"] is Role.PARAMETER


def test_results_keep_their_places(tmp_path):
    net = lstm()
    node = next(node for node in net.nodes if node.op_type == "LSTM")
    assert len(node.output) == 3
    node.output[1] = ""  # the last hidden state is left out, the last cell state is not
    program = program_of(net, tmp_path)
    call = next(call for call in program.calls if call.op == "onnx.LSTM")
    shapes = [program.values[name].shape for name in call.outputs]
    assert shapes == [(12, 1, SYMBOLIC_BATCH, 32), (1, SYMBOLIC_BATCH, 32), (1, SYMBOLIC_BATCH, 32)]


@pytest.mark.parametrize(
    ("batch", "expected"), [("N", SYMBOLIC_BATCH), (None, SYMBOLIC_BATCH), (4, 4), (1, SYMBOLIC_BATCH)]
)
@pytest.mark.parametrize("net", [mlp, attention, cnn, lstm])
def test_batch_named_unnamed_or_a_number(tmp_path, net, batch, expected):
    program = program_of(net(batch=batch), tmp_path)
    assert program.batch == expected
    assert {program.values[name].shape[0] for name in (*program.inputs, *program.outputs)} == {expected}


def test_batch_of_one_in_literal_shapes(tmp_path):
    """Exporters with static shapes write the 1 into the targets of reshapes."""
    net = Net(17)
    x = net.input("x", [1, 16, 64])
    y = net.reshape(x, 1, 16, 4, 16)
    y = net.op("Transpose", y, perm=[0, 2, 1, 3])
    y = net.reshape(y, 4, 16, 16)  # batch and heads in one
    y = net.reshape(y, 1, 4, -1, 16)
    y = net.op("Transpose", net.reshape(y, 1, 4, 16, 16), perm=[0, 2, 1, 3])
    y = net.reshape(y, 16, 64)  # batch and sequence in one
    y = net.reshape(net.op("MatMul", y, net.parameter("w", 64, 64)), 1, 16, -1)
    net.output(y, [1, 16, 64])
    program = program_of(net, tmp_path)
    shapes = [program.values[call.outputs[0]].shape for call in program.calls]
    b = SYMBOLIC_BATCH
    assert shapes == [
        *((b, 16, 4, 16), (b, 4, 16, 16), (b * 4, 16, 16), (b, 4, 16, 16), (b, 4, 16, 16), (b, 16, 4, 16)),
        *((b * 16, 64), (b * 16, 64), (b, 16, 64)),
    ]


def test_batch_of_one_where_tokens_come_first(tmp_path):
    """PyTorch's own attention: the batch goes with the heads, and with the tokens for the last projection; a class
    token of one sample is joined to the others."""
    net = Net(17)
    x = net.op("Concat", net.parameter("token", 1, 1, 64), net.input("x", [1, 7, 64]), axis=1)
    q = net.op("Transpose", x, perm=[1, 0, 2])
    q = net.op("Transpose", net.reshape(q, 8, 4, 16), perm=[1, 0, 2])
    scores = net.op("Softmax", net.op("MatMul", q, net.op("Transpose", q, perm=[0, 2, 1])))
    y = net.op("Transpose", net.op("MatMul", scores, q), perm=[1, 0, 2])
    y = net.op("Gemm", net.reshape(y, 8, 64), net.parameter("w", 64, 64))
    y = net.op("Transpose", net.reshape(y, 8, 1, 64), perm=[1, 0, 2])
    net.output(y, [1, 8, 64])
    traced = traced_onnx(net.save(tmp_path))
    assert traced.warnings == ()
    assert traced.program.batch == SYMBOLIC_BATCH
    assert traced.program.values[traced.program.outputs[0]].shape == (SYMBOLIC_BATCH, 8, 64)
    assert traced.graph.num_parameters == 64 + 64 * 64
    for batch in (1, 5):  # scores and their product with values of 4 heads of 8 x 8 x 16, the projection
        assert traced.graph.forward_flops(batch, 1) == 2 * batch * (2 * 4 * 8 * 8 * 16 + 8 * 64 * 64)


def test_a_batch_that_the_file_fixes_is_said(tmp_path):
    net = Net(17)
    x = net.input("x", [1, 8])
    y = net.op("MatMul", net.parameter("w", 8, 8), net.op("Reshape", x, net.ints(8, 1)))
    net.output(net.op("Split", y, net.ints(4, 4), outputs=2, axis=0)[0], [4, 1])
    found = read_onnx(net.save(tmp_path))
    assert found.program.batch == 1
    assert found.assumptions == ("its batch is fixed at 1: nothing of it grows with the batch that is asked for",)


def test_other_symbolic_dims_are_given_or_assumed(tmp_path):
    path = attention(seq="tokens").save(tmp_path)
    found = read_onnx(path)
    assert found.assumptions == ("the symbolic dim tokens is taken as 128",)
    assert found.program.values[found.program.outputs[0]].shape == (SYMBOLIC_BATCH, 128, 64)
    found = read_onnx(path, sizes={"tokens": 24})
    assert found.assumptions == ()
    assert found.program.values[found.program.outputs[0]].shape == (SYMBOLIC_BATCH, 24, 64)
    with pytest.raises(InputError, match=r"token = 8: is no symbolic dim of the inputs \(nearest: tokens\)"):
        read_onnx(path, sizes={"token": 8})


def test_a_symbolic_dim_may_be_a_sum(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", "tokens", 8])
    past = net.input("past", ["batch", "seen", 8])
    mask = net.input("mask", ["batch", "seen + tokens", 1])
    y = net.op("Mul", net.op("Concat", past, x, axis=1), mask)
    net.output(y, ["batch", None, 8])
    program = program_of(net, tmp_path, tokens=4, seen=10)
    assert program.values[program.outputs[0]].shape == (SYMBOLIC_BATCH, 14, 8)


def test_what_outputs_do_not_need_is_left_out(tmp_path):
    net = mlp()
    net.op("MatMul", "x", net.parameter("unused", 64, 8))
    program = program_of(net, tmp_path)
    assert "unused" not in program.values
    assert len(program.calls) == 4


def test_known_branches_are_taken(tmp_path):
    """Old exporters wrap squeezes into an If on a shape."""
    net = Net(13)
    x = net.input("x", ["batch", 1, 8])
    size = net.op("Gather", net.op("Shape", x), net.scalar(1, INT64))
    condition = net.op("Equal", size, net.scalar(1, INT64))
    then, other = Net(13), Net(13)
    then.outputs.append(helper.make_tensor_value_info(then.op("Squeeze", x, then.ints(1), outputs=["a"]), FLOAT, None))
    other.outputs.append(helper.make_tensor_value_info(other.op("Relu", x, outputs=["b"]), FLOAT, None))
    then.nodes[0].input[1] = then.initialisers[0].name = "then_axes"
    y = net.op("If", condition, then_branch=then.model().graph, else_branch=other.model().graph)
    net.output(y)
    program = program_of(net, tmp_path)
    assert ops_of(program) == ["Squeeze", "Identity"]
    assert program.values[program.outputs[0]].shape == (SYMBOLIC_BATCH, 8)


def test_functions_are_inlined(tmp_path):
    net = Net(18)
    body = [
        helper.make_node("MatMul", ["a", "w"], ["m"]),
        helper.make_node("Relu", ["m"], ["r"]),
    ]
    opsets = [helper.make_opsetid("", 18)]
    net.functions.append(helper.make_function("mine", "Layer", ["a", "w"], ["r"], body, opsets))
    net.domains["mine"] = 1
    x = net.input("x", ["batch", 8])
    for i in range(2):
        x = net.op("Layer", x, net.parameter(f"w{i}", 8, 8), domain="mine")
    net.output(x, ["batch", 8])
    assert ops_of(program_of(net, tmp_path)) == ["MatMul", "Relu", "MatMul", "Relu"]


def test_fused_operators_are_spelled_out(tmp_path):
    net = Net(17)
    net.domains["com.microsoft"] = 1
    x = net.input("x", ["batch", 16, 64])
    ms = "com.microsoft"
    scale, shift, bias = net.parameter("scale", 64), net.parameter("shift", 64), net.parameter("bias", 64)
    y, _, _, total = net.op(
        "SkipLayerNormalization", x, x, scale, shift, bias, outputs=["y", "", "", "total"], domain=ms, epsilon=1e-5
    )
    y = net.op("FusedMatMul", y, net.parameter("w", 256, 64), domain=ms, transB=1, alpha=0.5)
    y = net.op("BiasGelu", y, net.parameter("b", 256), domain=ms)
    y = net.op("QuickGelu", net.op("MatMul", y, net.parameter("w2", 256, 64)), domain=ms)
    y = net.op("MultiHeadAttention", y, total, total, domain=ms, num_heads=4)
    y = net.op("SimplifiedLayerNormalization", y, scale, axis=-1, epsilon=1e-6)
    net.output(y, ["batch", 16, 64])
    program = program_of(net, tmp_path)
    expected = "Add Add LayerNormalization Transpose MatMul Mul Add Gelu MatMul Sigmoid Mul Attention RMSNormalization"
    assert ops_of(program) == expected.split()
    product = program.calls[5]
    assert product.attributes["B"] == 0.5
    attention_call = program.calls[-2]
    assert attention_call.attributes["q_num_heads"] == attention_call.attributes["kv_num_heads"] == 4


def test_an_unknown_operator_stays_if_the_file_says_its_shape(tmp_path):
    net = Net(17)
    net.domains["acme"] = 3
    x = net.input("x", ["batch", 8])
    y = net.op("Frobnicate", x, net.parameter("w", 8, 4), domain="acme", strength=2)
    net.value_info.append(helper.make_tensor_value_info(y, FLOAT, ["batch", 4]))
    net.output(net.op("Relu", y), ["batch", 4])
    program = program_of(net, tmp_path)
    call = program.calls[0]
    assert call.op == "acme.Frobnicate"
    assert dict(call.operands) == {"input_0": "x", "input_1": "w"}
    assert call.attributes == {"strength": 2}


def test_names_are_fit_for_paths_and_told_apart(tmp_path):
    net = Net(17)
    x = net.input("a/b", ["batch", 8])
    y = net.op("Relu", x, outputs=["a b"])
    z = net.op("Relu", y, outputs=["/a/b"])
    net.output(z)
    for node in net.nodes:
        node.name = "a:b"
        node.metadata_props.add(key="stack", value="/home/someone/model.py")
        node.doc_string = "/home/someone/model.py"
    program = program_of(net, tmp_path)
    names = [*program.values, *(call.name for call in program.calls)]
    assert len(set(names)) == len(names) == 5
    assert all(name.replace("_", "").replace(".", "").isalnum() for name in names)
    assert "someone" not in repr(program)


def test_large_constants_are_known_by_shape(tmp_path):
    """A mask of 4096 x 4096 positions is not computed."""
    program = program_of(attention(seq=4096), tmp_path)
    assert (4096, 4096) in [value.shape for value in program.values.values() if value.role is Role.BUFFER]


def test_a_layer_of_a_large_model_is_read_quickly(tmp_path):
    """Neither weights nor a checker of whole models: CPU time is that of the nodes."""
    code = (
        "import sys, time; from meshwright.io.onnx import read_onnx; read_onnx(sys.argv[1]);"
        "start = time.process_time(); [read_onnx(sys.argv[1]) for _ in range(5)];"
        "assert time.process_time() - start < 5 * 0.1; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(attention().save(tmp_path))], check=True)


# ---- what is refused


def test_an_empty_array(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    net.output(net.op("Relu", net.op("Slice", x, net.ints(3), net.ints(3), net.ints(1))))
    assert "has no elements" in refusal(net.save(tmp_path))


def test_a_file_that_is_no_onnx_file(tmp_path):
    path = tmp_path / "net.onnx"
    for content in (b"", b"\x08\x0a", b"not a protobuf at all, but text", b"PK\x03\x04" + b"\0" * 40, os.urandom(500)):
        path.write_bytes(content)
        assert refusal(path).startswith(f"{path}: is not an ONNX file")
    assert "No such file" in refusal(tmp_path / "absent.onnx")
    assert "cannot be read" in refusal(tmp_path)


def test_truncated_anywhere(tmp_path):
    whole = attention().save(tmp_path).read_bytes()
    path = tmp_path / "part.onnx"
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        assert refusal(path).count("\n") == 0  # one clear error


def test_changed_bytes_never_raise_anything_else(tmp_path):
    whole = bytearray(attention().save(tmp_path).read_bytes())
    path = tmp_path / "changed.onnx"
    refused = 0
    for at in range(0, len(whole), 41):
        changed = bytearray(whole)
        changed[at] ^= 0x15
        path.write_bytes(changed)
        try:
            read_onnx(path)
        except InputError:
            refused += 1
    assert refused > 10


def test_too_large_for_protobuf(tmp_path):
    path = tmp_path / "large.onnx"
    with path.open("wb") as file:
        file.truncate(2**31)  # sparse: no disk is used
    assert "save it with its weights as external data" in refusal(path)


@pytest.mark.parametrize(("opset", "nearest"), [(9, 13), (12, 13), (24, 23)])
def test_opset(tmp_path, opset, nearest):
    text = refusal(mlp(opset).save(tmp_path))
    assert f"opset {opset}: the opset of the default domain must be from 13 to 23" in text
    assert f"convert_version(model, {nearest})" in text


def test_control_flow_that_depends_on_data(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    condition = net.op("Greater", net.op("ReduceSum", x, keepdims=0), net.scalar(0.0))
    bodies = []
    for op in ("Relu", "Neg"):
        body = Net(17)
        body.outputs.append(helper.make_tensor_value_info(body.op(op, x, outputs=[op]), FLOAT, None))
        bodies.append(body.model().graph)
    net.output(net.op("If", condition, then_branch=bodies[0], else_branch=bodies[1]))
    path = net.save(tmp_path)
    text = refusal(path)
    assert text.startswith(f"{path}: If If_")
    assert "control flow that depends on data cannot be planned" in text


def test_shapes_that_depend_on_data(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    net.output(net.op("NonZero", x), kind=INT64)
    assert "its shape depends on data" in refusal(net.save(tmp_path))


def test_a_shape_whose_numbers_are_not_there(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    net.output(net.op("Reshape", x, net.parameter("target", 2, kind=INT64)))
    assert "the numbers of target are not in the file" in refusal(net.save(tmp_path))


def test_a_small_constant_beside_the_file_is_read(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    net.output(net.op("Reshape", x, net.ints(-1, 2, 4)))
    path = tmp_path / "net.onnx"
    model = net.model()
    onnx.save_model(model, path, save_as_external_data=True, location="net.data", size_threshold=0)
    assert read_onnx(path).program.calls[0].attributes["shape"] == (-1, 2, 4)
    # A location outside the folder is not followed.
    model = onnx.load(path, load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../net.data"
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "net.onnx").write_bytes(model.SerializeToString())
    assert "are not in the file" in refusal(tmp_path / "in" / "net.onnx")


def test_shapes_that_inference_lets_pass(tmp_path):
    net = lstm()
    next(tensor for tensor in net.initialisers if tensor.name == "R").dims[:] = [1, 128]
    assert "do not fit together" in refusal(net.save(tmp_path))
    net = Net(17)
    net.output(net.reshape(net.input("x", [6, 8]), 7, 7))
    assert "has 48 elements, and cannot have the shape [7, 7]" in refusal(net.save(tmp_path))


def test_all_problems_at_once(tmp_path):
    net = Net(17)
    net.domains["acme"] = 1
    x = net.input("x", ["batch", 8])
    a = net.op("MatMul", x, net.parameter("w", 9, 4))
    b = net.op("Frobnicate", x, domain="acme")
    net.output(net.op("Add", a, b))  # follows from the others: not a problem of its own
    text = refusal(net.save(tmp_path))
    assert text.count("\n") == 1
    assert "MatMul MatMul_0 = [23, 8], [9, 4]: is not valid" in text
    assert "acme Frobnicate: is no operator that is known here" in text


def test_nodes_out_of_order_twice_or_without_operands(tmp_path):
    net = mlp()
    net.nodes.reverse()
    assert "is read before anything makes it" in refusal(net.save(tmp_path))
    net = mlp()
    net.op("Relu", "x", outputs=["x"])
    assert "x: is made twice" in refusal(net.save(tmp_path))
    net = mlp()
    net.nodes[1].ClearField("input")
    assert "Relu" in refusal(net.save(tmp_path))


@pytest.mark.parametrize("doubling", [False, True])
def test_functions_without_end(tmp_path, doubling):
    """A function that calls itself, and forty that each call the one before twice."""
    net = Net(18)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("mine", 1)]
    names = [f"F{i}" for i in range(40)] if doubling else ["F0", "F0"]
    for name, inner in itertools.pairwise(names):
        body = [helper.make_node(inner, [a], [b], domain="mine") for a, b in (("a", "m"), ("m", "r"))]
        net.functions.append(helper.make_function("mine", name, ["a"], ["r"], body, opsets))
    if doubling:
        relu = [helper.make_node("Relu", ["a"], ["r"])]
        net.functions.append(helper.make_function("mine", names[-1], ["a"], ["r"], relu, opsets))
    net.domains["mine"] = 1
    net.output(net.op("F0", net.input("x", ["batch", 8]), domain="mine"), ["batch", 8])
    text = refusal(net.save(tmp_path))
    assert (
        "a model may have 2,000,000 nodes" if doubling else "mine:F0: this function of the model calls itself"
    ) in text


def test_hostile_constants_are_not_computed(tmp_path):
    net = Net(17)
    x = net.input("x", ["batch", 8])
    huge = net.op("ConstantOfShape", net.ints(2**20, 2**20, 2**20))
    net.output(net.op("Add", x, net.reduce("ReduceMean", huge, 0, 1, 2)), ["batch", 8])
    program = program_of(net, tmp_path)
    assert ops_of(program) == ["Add"]


# ---- FLOPs are those of the model it came from


class TorchAttention(nn.Module):
    """What `onnx_models.attention` spells out."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(64, size, bias=False) for size in (64, 32, 32, 64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x.shape
        q, k, v = (layer(x).view(batch, seq, -1, 16).transpose(1, 2) for layer in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        scores = (q @ k.transpose(2, 3) / 4).softmax(-1)
        return x + self.o((scores @ v).transpose(1, 2).reshape(batch, seq, 64))


def torch_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10))


def torch_cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


def torch_flops(module: nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module.eval()(*inputs)
    return counter.get_total_flops()


@pytest.mark.parametrize("opset", [13, 17, 20, 23])
@pytest.mark.parametrize(
    ("net", "module", "shape"),
    [(mlp, torch_mlp, (64,)), (attention, TorchAttention, (16, 64)), (cnn, torch_cnn, (3, 32, 32))],
)
def test_flops_and_parameters_equal_torch(tmp_path, net, module, shape, opset):
    traced = traced_onnx(net(opset).save(tmp_path))
    assert graph_problems(traced.graph) == []
    assert traced.warnings == ()
    for batch in (1, 6):
        assert traced.graph.forward_flops(batch, 1) == torch_flops(module(), torch.empty(batch, *shape))
    assert traced.graph.num_parameters == sum(parameter.numel() for parameter in module().parameters())


def test_batch_norm_in_training_reduces_statistics(tmp_path):
    """Sums over batch and space are an operator of their own, so that splitting these leaves summands."""
    net = Net(17)
    x = net.input("x", ["batch", 6, 8, 8])
    x = net.op("Conv", x, net.parameter("w", 6, 6, 1, 1))
    weights = [net.parameter(name, 6) for name in ("scale", "shift", "mean", "var")]
    y, _, _ = net.op("BatchNormalization", x, *weights, outputs=3, training_mode=1)
    net.output(y, ["batch", 6, 8, 8])
    traced = traced_onnx(net.save(tmp_path))
    assert graph_problems(traced.graph) == []
    _, statistics, norm = traced.graph.blocks[0].operators
    assert statistics.name == f"{norm.name}.statistics"
    assert len(statistics.outputs) == 2
    assert len(statistics.contracted) == 3
    assert set(statistics.outputs) <= set(norm.inputs)
    assert not statistics.unsplit


def test_flops_of_recurrent_layers(tmp_path):
    """PyTorch counts none of a fused LSTM. By hand, of one sequence: input and hidden products of four gates over 12
    steps, 2 x 12 x 128 x (24 + 32), and the head, 2 x 12 x 32 x 100."""
    traced = traced_onnx(lstm(20).save(tmp_path))
    assert graph_problems(traced.graph) == []
    assert traced.graph.forward_flops(5, 1) == 5 * (172_032 + 76_800)
    assert traced.graph.num_parameters == 100 * 24 + 128 * 24 + 128 * 32 + 256 + 32 * 100


def test_an_unknown_operator_is_replicated_and_named(tmp_path):
    net = Net(17)
    net.domains["acme"] = 3
    x = net.input("x", ["batch", 8])
    y = net.op("Frobnicate", x, net.parameter("w", 8, 4), domain="acme")
    net.value_info.append(helper.make_tensor_value_info(y, FLOAT, ["batch", 4]))
    net.output(net.op("MatMul", y, net.parameter("v", 4, 8)), ["batch", 8])
    traced = traced_onnx(net.save(tmp_path))
    assert any("acme.Frobnicate" in warning for warning in traced.warnings)
    operators = [operator for block in traced.graph.blocks for operator in block.operators]
    unknown = next(operator for operator in operators if operator.name.startswith("Frobnicate"))
    assert set(unknown.unsplit) == set(unknown.dims)


def test_equal_layers_are_folded(tmp_path):
    net = Net(20)
    x = net.input("x", ["batch", 8])
    for layer in range(12):
        y = net.op("Relu", net.op("MatMul", x, net.parameter(f"layers.{layer}.up", 8, 32)))
        x = net.op("Add", x, net.op("MatMul", y, net.parameter(f"layers.{layer}.down", 32, 8)))
    net.output(net.op("MatMul", x, net.parameter("head", 8, 5)), ["batch", 5])
    graph = traced_onnx(net.save(tmp_path)).graph
    assert graph_problems(graph) == []
    assert max(segment.repeat for segment in graph.segments) >= 10
    assert graph.num_parameters == 12 * 2 * 8 * 32 + 8 * 5
    assert graph.forward_flops(3, 1) == 3 * 2 * graph.num_parameters


def test_a_constant_for_one_batch_is_no_parameter(tmp_path):
    """Exporters with static shapes write a mask for the batch they saw."""
    net = Net(17)
    x = net.input("x", [6, 8])
    net.output(net.op("Add", net.op("MatMul", x, net.parameter("w", 8, 8)), net.parameter("mask", 6, 8)), [6, 8])
    traced = traced_onnx(net.save(tmp_path))
    assert graph_problems(traced.graph) == []
    assert traced.graph.num_parameters == 64


class TorchCausal(nn.Module):
    """Fused causal attention after one projection to queries, keys and values, and a norm before it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.qkv, self.o = nn.LayerNorm(64), nn.Linear(64, 192), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, seq, _ = x.shape
        q, k, v = (y.view(batch, seq, 4, 16).transpose(1, 2) for y in self.qkv(self.norm(x)).split(64, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.o(y.transpose(1, 2).reshape(batch, seq, 64))


@pytest.mark.parametrize(
    ("module", "shape", "dynamic", "opset"),
    [
        (TorchAttention, (16, 64), True, 18),
        (TorchCausal, (16, 64), False, 18),
        (TorchCausal, (16, 64), True, 23),
        (torch_cnn, (3, 32, 32), False, 23),
    ],
)
def test_what_pytorch_exports_has_the_same_flops(tmp_path, module, shape, dynamic, opset):
    pytest.importorskip("onnxscript", reason="PyTorch's exporter needs it")
    model = module().eval()
    path = tmp_path / "exported.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = torch.onnx.export(
            model,
            (torch.randn(2, *shape),),
            dynamo=True,
            verbose=False,
            opset_version=opset,
            dynamic_shapes=({0: torch.export.Dim("batch", min=2)},) if dynamic else None,
        )
        exported.save(path, external_data=True)
    path.with_suffix(".onnx.data").unlink(missing_ok=True)  # weights need not be there
    traced = traced_onnx(path)
    assert graph_problems(traced.graph) == []
    assert traced.warnings == ()
    assert traced.graph.forward_flops(6, 1) == torch_flops(model, torch.empty(6, *shape))
    if module is not torch_cnn:  # the exporter folds the norm into the convolution
        assert traced.graph.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_without_the_package(tmp_path, monkeypatch):
    path = mlp().save(tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install 'meshwright[onnx]'" in refusal(path)
