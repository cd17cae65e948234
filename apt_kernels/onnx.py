"""The op as a function in an ONNX model: a translation table for `torch.onnx.export`."""

from __future__ import annotations

import zlib
from dataclasses import fields
from functools import cache as memoise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import ArgumentError
from .impl.inputs import Inputs
from .ops.attention import COMPOSITE

DOMAIN, NAME = "apt_kernels", "attention"
_NAMES = tuple(field.name for field in fields(Inputs))
_TENSORS = _NAMES[: _NAMES.index("offset")]
_INPUTS = (*_TENSORS, "dynamic_offset")
_DTYPES = {"FLOAT": torch.float32, "DOUBLE": torch.float64, "FLOAT16": torch.float16, "BFLOAT16": torch.bfloat16}
_DTYPES |= {"BOOL": torch.bool, "INT64": torch.int64}


class OnnxFunctions(dict):
    """A ``custom_translation_table`` of ``torch.onnx.export`` that keeps attention together as an ONNX function.

    Each call is then one node ``attention`` of the domain ``apt_kernels``, and `define` adds its function to the
    exported program. The function consists of standard operators, so that every runtime computes it; a runtime with a
    kernel of that name can replace it. Calls with other arguments are other overloads of the function. (The exporter
    replaces every function by its nodes, so a table alone cannot add one.) Needs onnxscript.

    The node's inputs are the tensors of the operator ``apt_kernels::composite_attention`` in its order, then the offset
    of the queries where that depends on a length. Its outputs are those of `attention`: ``[B, Hq, T, Dv]`` and the
    log-sum-exp ``[B, Hq, T]``. Its attributes are the operator's numbers: mask, scale and soft-cap.

    Examples:
        >>> functions = apt_kernels.OnnxFunctions()
        >>> options = {"dynamo": True, "custom_translation_table": functions}
        >>> program = torch.onnx.export(model, (), kwargs={**batch}, **options)
        >>> functions.define(program)
        >>> sorted({node.op_type for node in program.model.graph if node.domain == "apt_kernels"})
        ['attention']
    """

    def __init__(self):
        super().__init__()
        self._functions: dict[str, Any] = {}

        def translate(*arguments):  # torch sets an attribute on it, which a method refuses
            return self._translate(arguments)

        self[COMPOSITE] = translate

    def define(self, program) -> None:
        """Add the functions of the exported calls to an ``ONNXProgram``, before it is saved or run.

        Raises:
            ArgumentError: the program was exported without this table, or its attention is not that of the table.
        """
        from onnxscript import ir

        needed = {node.overload for node in program.model.graph.all_nodes() if node.domain == DOMAIN}
        if not needed or needed - self._functions.keys():
            raise ArgumentError(
                "the program has no attention of this table; it needs torch.onnx.export(model, ..., dynamo=True, "
                "custom_translation_table=functions) of a patched model whose implementation is 'auto' or 'reference'"
            )
        for overload in sorted(needed):
            function = ir.serde.deserialize_function(self._functions[overload])
            program.model.functions[function.identifier()] = function
        program.model.graph.opset_imports[DOMAIN] = 1

    def _translate(self, arguments: tuple):
        """The node of one call of the operator, in the model that the exporter builds."""
        from onnxscript import evaluator, ir

        values = dict(zip(_NAMES, arguments))
        inputs = [values.pop(name) for name in _TENSORS]
        # An offset that depends on a length is a value of the model.
        inputs.append(values.pop("offset") if isinstance(values["offset"], ir.Value) else None)
        call = _call(inputs, values)
        overload = f"{zlib.crc32(repr(call).encode()):08x}"
        self._functions[overload] = _body(call, overload)
        attributes = [ir.Attr(name, _attribute(number), number) for name, number in call.numbers]
        while inputs[-1] is None:
            inputs.pop()
        node = ir.Node(DOMAIN, NAME, inputs, attributes, overload=overload, num_outputs=2, version=1)
        recorder: Any = evaluator.default()
        recorder.nodes.append(node)
        return node.outputs


class _Call(NamedTuple):
    """The tensors that a call gives, as (name, dtype, sizes), where a dynamic size is a text; and its numbers."""

    tensors: tuple[tuple[str, str, tuple[int | str, ...]], ...]
    numbers: tuple[tuple[str, Any], ...]


def _attribute(number):
    from onnxscript import ir

    return ir.AttributeType.FLOAT if isinstance(number, float) else ir.AttributeType.INT


def _call(inputs: list, numbers: dict[str, Any]) -> _Call:
    symbols: dict[str, str] = {}

    def size(dim) -> int | str:
        return dim if isinstance(dim, int) else symbols.setdefault(str(dim), f"size_{len(symbols)}")

    tensors = tuple(
        (name, value.dtype.name, tuple(map(size, value.shape)))
        for name, value in zip(_INPUTS, inputs)
        if value is not None
    )
    return _Call(tensors, tuple((name, +number) for name, number in numbers.items()))


@memoise
def _body(call: _Call, overload: str):
    """The function of a call, as protobuf: the specification, exported for these sizes."""
    from onnxscript import ir

    graph = _exported(call)
    given = dict(zip([name for name, *_ in call.tensors], list(graph.inputs)))
    graph.inputs[:] = [given.get(name) or ir.Value() for name in _INPUTS]
    for value, name in zip((*graph.inputs, *graph.outputs), (*_INPUTS, "out", "logsumexp")):
        value.name = name
    for node in graph:
        node.metadata_props.clear()
    for value in list(graph.initializers.values()):  # a function has constants only as nodes
        constant = ir.Attr("value", ir.AttributeType.TENSOR, value.const_value)
        node = ir.Node("", "Constant", [], [constant], num_outputs=1)
        node.outputs[0].name = value.name
        ir.convenience.replace_all_uses_with(value, node.outputs[0])
        graph.insert_before(graph[0], node)
    graph.initializers.clear()
    attributes = [ir.Attr(name, _attribute(number), None) for name, number in call.numbers]
    return ir.serde.serialize_function(ir.Function(DOMAIN, NAME, overload, graph=graph, attributes=attributes))


def _exported(call: _Call):
    """The graph of the specification for a call; sizes of the same name are equal."""
    sizes: dict[int | str, int] = {}

    def example(dtype: str, shape: tuple[int | str, ...]) -> Tensor:
        lengths = [dim if isinstance(dim, int) else sizes.setdefault(dim, 5 + len(sizes)) for dim in shape]
        return torch.zeros(lengths, dtype=_DTYPES[dtype], device="cpu")

    examples = tuple(example(dtype, shape) for _, dtype, shape in call.tensors)
    dynamic = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, dim in enumerate(shape) if isinstance(dim, str)}
        for _, _, shape in call.tensors
    )
    body = _Specification(call).eval()
    program: Any = torch.onnx.export(body, examples, dynamic_shapes=(dynamic,), dynamo=True, verbose=False)
    return program.model.graph


class _Specification(torch.nn.Module):
    """The operator with the numbers of a call, as a function of the tensors that the call gives."""

    def __init__(self, call: _Call):
        super().__init__()
        self.names, self.numbers = [name for name, *_ in call.tensors], dict(call.numbers)

    def forward(self, *tensors):
        given = {**dict.fromkeys(_TENSORS), **self.numbers, **dict(zip(self.names, tensors))}
        offset = given.pop("dynamic_offset", None)
        if offset is not None:
            given |= {"offset": 0, "query_offset": offset.reshape(1)}
        given["causal"] = bool(given["causal"])
        return COMPOSITE(*Inputs(**given).flat())
