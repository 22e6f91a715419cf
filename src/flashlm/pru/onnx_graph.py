"""The ONNX graphs of a `PRU` and its language model, written node by node. Needs the package onnx."""

from __future__ import annotations

from typing import Any, cast

import torch
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto, helper, numpy_helper
from torch import nn

from flashlm._version import __version__
from flashlm.errors import ConfigError
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.module import PRU

OPSET = 17
IR_VERSION = 8  # the one of opset 17
MAX_WEIGHT_BYTES = 2**31 - 2**20  # protobuf's limit, less room for the nodes
_GATES = [0, 3, 1, 2]  # i, f, g, o in ONNX's order: i, o, f, g
_SWAPPED = [1, 0, 2]  # batch first from steps first, and back
Shape = list[int | str]


def module_graph(pru: PRU, has_state: bool) -> ModelProto:
    """Return the model of an fp32 module on the CPU; see `export_onnx` for its inputs and outputs.

    Raises:
        ConfigError: Sub-sampling is `max`, or the weights are too large.
    """
    graph, lstm = _Graph(), pru.to_lstm()
    lengths: Shape = ["batch", "steps"] if pru.batch_first else ["steps", "batch"]
    x = graph.input("input", [*lengths, pru.input_size])
    if pru.batch_first:
        x = graph.node("Transpose", [x], ["input.by_step"], perm=_SWAPPED)
    state_shape: Shape = [pru.num_layers * pru.num_directions, "batch", pru.hidden_size]
    layers = range(pru.num_layers)
    past: dict[str, list[str]] = {}
    for part in ("h_0", "c_0"):
        past[part] = [f"{part}.{layer}" if has_state else "" for layer in layers]
        if has_state:
            sizes = graph.integers(f"{part}.sizes", [pru.num_directions] * pru.num_layers)
            graph.node("Split", [graph.input(part, state_shape), sizes], past[part], axis=0)
    graph.output("output", [*lengths, pru.num_directions * pru.hidden_size])
    for layer in layers:
        is_output = layer == pru.num_layers - 1 and not pru.batch_first
        names = ["output" if is_output else f"layer.{layer}", f"h_n.{layer}", f"c_n.{layer}"]
        x = graph.lstm(lstm, layer, x, [past["h_0"][layer], past["c_0"][layer]], names)
    if pru.batch_first:
        graph.node("Transpose", [x], ["output"], perm=_SWAPPED)
    for part in ("h_n", "c_n"):
        graph.node("Concat", [f"{part}.{layer}" for layer in layers], [graph.output(part, state_shape)], axis=0)
    return graph.finish("pru")


def language_model_graph(model: PRUForCausalLM, has_state: bool) -> ModelProto:
    """Return the model of an fp32 language model on the CPU; see `export_onnx` for its inputs and outputs.

    Raises:
        ConfigError: Sub-sampling is `max`, or the weights are too large.
    """
    graph, config = _Graph(), model.config
    tokens = graph.input("input_ids", ["batch", "steps"], TensorProto.INT64)
    graph.output("logits", ["batch", "steps", config.vocab_size])
    words = graph.weight("embedding.weight", model.embedding.weight)
    embedded = graph.node("Gather", [words, tokens], ["embedded"])
    x = graph.node("Transpose", [embedded], ["embedded.by_step"], perm=_SWAPPED)
    for position, layer in enumerate(model.layers):
        lstm = layer.to_lstm() if isinstance(layer, PRU) else cast(nn.LSTM, layer)
        shape: Shape = [1, "batch", lstm.hidden_size]
        past = [graph.input(f"past.{position}.{part}", shape) if has_state else "" for part in "hc"]
        present = [graph.output(f"present.{position}.{part}", shape) for part in "hc"]
        x = graph.lstm(lstm, 0, x, past, [f"layer.{position}", *present])
    by_text = graph.node("Transpose", [x], ["last.by_text"], perm=_SWAPPED)
    softmax = words  # tied
    if model.decoder.weight is not model.embedding.weight:
        softmax = graph.weight("decoder.weight", model.decoder.weight)
    columns = graph.node("Transpose", [softmax], ["decoder.columns"], perm=[1, 0])
    products = graph.node("MatMul", [by_text, columns], ["decoder.products"])
    graph.node("Add", [products, graph.weight("decoder.bias", model.decoder.bias)], ["logits"])
    return graph.finish("pru_for_causal_lm")


class _Graph:
    """Nodes, weights, inputs and outputs, in the order in which they are added; names are returned."""

    def __init__(self) -> None:
        self._nodes: list[NodeProto] = []
        self._weights: list[TensorProto] = []
        self._inputs: list[ValueInfoProto] = []
        self._outputs: list[ValueInfoProto] = []
        self._num_bytes = 0

    def input(self, name: str, shape: Shape, kind: int = TensorProto.FLOAT) -> str:
        self._inputs.append(helper.make_tensor_value_info(name, kind, shape))
        return name

    def output(self, name: str, shape: Shape) -> str:
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
        return name

    def weight(self, name: str, values: torch.Tensor) -> str:
        self._num_bytes += values.numel() * values.element_size()
        if self._num_bytes > MAX_WEIGHT_BYTES:
            raise ConfigError(
                f"an ONNX file holds at most {MAX_WEIGHT_BYTES:,} bytes of weights; with {name} the dense ones take more"
            )
        self._weights.append(numpy_helper.from_array(values.detach().contiguous().numpy(), name))
        return name

    def integers(self, name: str, values: list[int]) -> str:
        return self.weight(name, torch.tensor(values))

    def node(self, operation: str, inputs: list[str], outputs: list[str], **attributes: Any) -> str:
        self._nodes.append(helper.make_node(operation, inputs, outputs, name=f"{operation}:{outputs[0]}", **attributes))
        return outputs[0]

    def lstm(self, lstm: nn.LSTM, layer: int, x: str, past: list[str], names: list[str]) -> str:
        """Add a layer of an LSTM: x (steps, batch, features); `names` are those of its output, last h and last c."""
        output, *present = names
        suffixes = [f"_l{layer}", f"_l{layer}_reverse"][: 2 if lstm.bidirectional else 1]

        def of(name: str) -> torch.Tensor:
            directions = [_regated(getattr(lstm, name + suffix), lstm.hidden_size) for suffix in suffixes]
            return torch.stack(directions)

        weights = [self.weight(f"{output}.{name}", of(name)) for name in ("weight_ih", "weight_hh")]
        bias = ""
        if lstm.bias:
            bias = self.weight(f"{output}.bias", torch.cat([of("bias_ih"), of("bias_hh")], dim=1))
        by_direction = self.node(
            "LSTM",
            [x, *weights, bias, "", *past],
            [f"{output}.by_direction", *present],  # (steps, directions, batch, hidden)
            hidden_size=lstm.hidden_size,
            direction="bidirectional" if lstm.bidirectional else "forward",
        )
        by_batch = self.node("Transpose", [by_direction], [f"{output}.by_batch"], perm=[0, 2, 1, 3])
        return self.node("Reshape", [by_batch, self.integers(f"{output}.shape", [0, 0, -1])], [output])

    def finish(self, name: str) -> ModelProto:
        graph: GraphProto = helper.make_graph(self._nodes, name, self._inputs, self._outputs, self._weights)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="flashlm",
            producer_version=__version__,
        )


def _regated(rows: torch.Tensor, size: int) -> torch.Tensor:
    """Return weights or biases (4 * size, ...) with the gates in ONNX's order."""
    return torch.cat([rows[gate * size : (gate + 1) * size] for gate in _GATES])
