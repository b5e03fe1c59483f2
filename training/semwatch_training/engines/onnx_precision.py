"""An fp32 ONNX network to one that multiplies in fp16 or bf16: what strongly typed TensorRT needs.

TensorRT takes a network's types as they are written; it has no switch for the precision any more. Products and
convolutions go to the low type, what only moves or joins their results stays with it, and all that sums, divides by
norms, or takes logarithms and roots is done in fp32. So is all that the network itself marks (``export.IN_FP32``):
covariances, their inverses, and distances are small differences of large numbers. Inputs and outputs keep their types.

Source: the operator lists follow PyTorch's ``torch.autocast``.
"""

from typing import Literal

import numpy as np
import onnx
import onnx.version_converter
import torch
from numpy.typing import NDArray
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from semwatch.errors import PublishError
from semwatch_training.publishing.export import IN_FP32, PRECISION

Low = Literal["fp16", "bf16"]

PRODUCTS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum"})
"""Nearly all of the arithmetic: always in the low type."""
MOVES = frozenset(
    {
        "Concat", "Expand", "Flatten", "Gather", "GatherND", "Identity", "Pad", "Reshape", "Slice", "Split", "Squeeze",
        "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Change no value: right in any type."""
FOLLOW = MOVES | {"Add", "Clip", "Div", "Gelu", "MaxPool", "Mul", "Relu", "Sigmoid", "Softmax", "Sub", "Tanh", "Where"}
"""In the low type where all they are fed with is; a fused attention has its softmax there."""
BF16_OPSET = 22
"""The first in which convolutions may be bf16."""
UNTYPED = frozenset({"Shape", "Size"})

_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}
_ONNX = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def lower(model: ModelProto, low: Low, *, emulate: bool = False) -> ModelProto:
    """Return a copy whose products are computed in a low type; inputs and outputs stay as they are.

    Args:
        model: an fp32 network.
        low: the type.
        emulate: compute in fp32 but round wherever the copy would, for a runtime without kernels of that type.

    Raises:
        PublishError: the network has parts that this does not know how to convert (branches, loops).
    """
    exact = in_fp32(model)
    if low == "bf16" and not emulate:
        model = onnx.version_converter.convert_version(model, BF16_OPSET)
    pass_ = _Lowering(model, low, emulate, exact)
    for node in model.graph.node:
        pass_.take(node)
    return pass_.whole()


def in_fp32(model: ModelProto) -> frozenset[str]:
    """Outputs of the nodes that the network wants computed in fp32: a conversion to another opset loses the marks."""
    return frozenset(
        name
        for node in model.graph.node
        if any((entry.key, entry.value) == (PRECISION, IN_FP32) for entry in node.metadata_props)
        for name in node.output
    )


def has_exact_products(model: ModelProto) -> bool:
    """Whether a network wants matrix products computed in fp32."""
    exact = in_fp32(model)
    return any(node.op_type in PRODUCTS - {"Conv"} and not exact.isdisjoint(node.output) for node in model.graph.node)


def float_inputs(model: ModelProto) -> ModelProto:
    """Return a copy that turns uint8 inputs into float at once: TensorRT cannot even slice uint8.

    Every uint8 is exact in fp32, fp16 and bf16. The signature stays.

    Raises:
        PublishError: something computes with uint8, and not only moves it.
    """
    types = element_types(model)
    copy = ModelProto()
    copy.CopyFrom(model)
    renamed = {t.name: f"{t.name}/float" for t in copy.graph.input if types[t.name] == TensorProto.UINT8}
    for node in copy.graph.node:
        if any(types.get(name) == TensorProto.UINT8 for name in node.input) and node.op_type not in (
            MOVES | UNTYPED | {"Cast"}
        ):
            raise PublishError(f"{node.name} ({node.op_type}) computes with uint8, which TensorRT cannot")
        for k, name in enumerate(node.input):
            node.input[k] = renamed.get(name, name)
    casts = [helper.make_node("Cast", [k], [v], name=f"{v}/cast", to=TensorProto.FLOAT) for k, v in renamed.items()]
    nodes = [*casts, *copy.graph.node]
    del copy.graph.node[:], copy.graph.value_info[:]  # the types of what follows have changed
    copy.graph.node.extend(nodes)
    return checked(copy)


def element_types(model: ModelProto) -> dict[str, int]:
    """ONNX element type of every tensor, by name."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = (*graph.value_info, *graph.input, *graph.output)
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    return types | {tensor.name: tensor.data_type for tensor in graph.initializer}


def checked(model: ModelProto) -> ModelProto:
    """Return the model, after ONNX's own checks of structure and types.

    Raises:
        PublishError: it is not valid ONNX.
    """
    try:
        onnx.checker.check_model(model)
        onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise PublishError(f"the converted network is not valid ONNX: {error}") from error
    return model


class _Lowering:
    """One pass over a network's nodes in their order; a tensor keeps its name in the type it is made in."""

    def __init__(self, model: ModelProto, low: Low, emulate: bool, exact: frozenset[str]) -> None:
        self._model, self._low, self._emulate, self._exact = model, low, emulate, exact
        self._float = {name for name, kind in element_types(model).items() if kind == TensorProto.FLOAT}
        self._constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        self._lowered: set[str] = set()  # tensors whose own name holds the low type
        self._made: dict[str, str] = {}  # tensor -> name of its other form
        self._nodes: list[NodeProto] = []
        self._new_constants: list[TensorProto] = []

    def take(self, source: NodeProto) -> None:
        """Add one node in the type that suits it."""
        if any(attribute.type == AttributeProto.GRAPH for attribute in source.attribute):
            raise PublishError(f"{source.name} ({source.op_type}) holds a network of its own; it cannot be converted")
        node = NodeProto()
        node.CopyFrom(source)
        is_low = self._exact.isdisjoint(node.output) and (
            node.op_type in PRODUCTS or (node.op_type in FOLLOW and self._can_follow(node))
        )
        if node.op_type not in UNTYPED:
            for k, name in enumerate(node.input):
                if name in self._float:
                    node.input[k] = self._as_low(name) if is_low else self._as_high(name)
        self._nodes.append(node)
        if is_low:
            for k, name in enumerate(source.output):
                if name in self._float:
                    self._give_low(node, k, name)

    def whole(self) -> ModelProto:
        """The converted network: outputs back in fp32, constants that nobody uses any more left out."""
        model = ModelProto()
        model.CopyFrom(self._model)
        for output in model.graph.output:
            if output.name in self._lowered and not self._emulate:
                self._restore(output.name)
        used = {name for node in self._nodes for name in node.input} | {t.name for t in model.graph.output}
        constants = [tensor for tensor in self._model.graph.initializer if tensor.name in used]
        del model.graph.node[:], model.graph.value_info[:], model.graph.initializer[:]
        model.graph.node.extend(self._nodes)
        model.graph.initializer.extend([*constants, *self._new_constants])
        return checked(model)

    def _can_follow(self, node: NodeProto) -> bool:
        fed = [name for name in node.input if name in self._float]
        variable = [name for name in fed if name not in self._constants]
        return (
            bool(variable)
            and all(name in self._lowered for name in variable)
            and all(self._survives(self._constants[name]) for name in fed if name in self._constants)
        )

    def _survives(self, constant: NDArray[np.float32]) -> bool:
        """Whether a constant beside the products means the same in the low type: no overflow, no epsilon lost."""
        rounded = self._rounded(constant)
        if not np.isfinite(rounded[np.isfinite(constant)]).all():
            return False
        return constant.size != 1 or bool(np.abs(rounded - constant).max() <= 0.01 * np.abs(constant).max())

    def _as_low(self, name: str) -> str:
        if name in self._lowered:
            return name
        if name not in self._made:
            self._made[name] = f"{name}/{self._low}"
            if name in self._constants:
                self._new_constants.append(self._constant(self._constants[name], self._made[name]))
            else:
                self._round(name, self._made[name])
        return self._made[name]

    def _as_high(self, name: str) -> str:
        if name not in self._lowered or self._emulate:
            return name
        if name not in self._made:
            self._made[name] = f"{name}/fp32"
            self._cast(name, self._made[name], TensorProto.FLOAT)
        return self._made[name]

    def _give_low(self, node: NodeProto, k: int, name: str) -> None:
        self._lowered.add(name)
        if self._emulate:
            node.output[k] = f"{name}/exact"
            self._round(node.output[k], name)

    def _restore(self, name: str) -> None:
        """Give an output its fp32 back under its own name; those who read it read the low form."""
        for node in self._nodes:
            for names in (node.input, node.output):
                for k, found in enumerate(names):
                    if found == name:
                        names[k] = f"{name}/{self._low}"
        self._cast(f"{name}/{self._low}", name, TensorProto.FLOAT)

    def _round(self, source: str, target: str) -> None:
        if not self._emulate:
            self._cast(source, target, _ONNX[self._low])
            return
        self._cast(source, f"{target}/rounded", _ONNX[self._low])
        self._cast(f"{target}/rounded", target, TensorProto.FLOAT)

    def _cast(self, source: str, target: str, to: int) -> None:
        self._nodes.append(helper.make_node("Cast", [source], [target], name=f"{target}/cast", to=to))

    def _constant(self, values: NDArray[np.float32], name: str) -> TensorProto:
        if self._emulate:
            return numpy_helper.from_array(self._rounded(values), name)
        bits = torch.tensor(values).to(_TORCH[self._low]).view(torch.int16).numpy()  # numpy has no bf16
        return helper.make_tensor(name, _ONNX[self._low], values.shape, bits.tobytes(), raw=True)

    def _rounded(self, values: NDArray[np.float32]) -> NDArray[np.float32]:
        rounded: NDArray[np.float32] = torch.tensor(values).to(_TORCH[self._low]).float().numpy()
        return rounded
