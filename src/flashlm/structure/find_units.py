"""What of a transformers model is streamed, in the order in which a forward pass meets it.

Feed-forward layers are found by `families`, experts by `experts`; here linear layers are added: attention's projections,
shared experts, dense layers that a mixture of experts begins with, the output layer. Every token is multiplied with these,
so on flash they cost a token their bytes, exactly as a feed-forward layer does; whether they are pinned is the budget's
affair. Only large ones are worth it.

A linear layer is streamed as it is, and its module keeps its own forward, so nothing about it need be proved but that it
is called like a function and its weight is not used in another way. Both are read from the forward's source, which also
gives the order: a stream that is read ahead must know it. What the source does not show stays in DRAM.

Of the table of input embeddings a token needs one row, so it stays on flash and its rows are read one by one. Where the
output layer shares it, both read the output layer's file.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from flashlm.errors import UnsupportedModelError
from flashlm.rows.layout import MAX_BLOCK_BYTES, ROWS_PER_STEP, matrix_row_step
from flashlm.structure.experts import ExpertLayer, find_expert_layers
from flashlm.structure.families import FfnLayer, decoder_layers, find_ffn_layers

MIN_LINEAR_BYTES = 1 << 20
_HARMLESS = {"dtype", "device", "shape", "size"}  # of a weight, without its values


@dataclass(frozen=True, kw_only=True)
class LinearLayer:
    """One linear layer, (num_outputs, num_inputs).

    Attributes:
        module: Dotted path of the module, which stays in the model without its weight.
        num_inputs, num_outputs: Its sizes.
        has_bias: Whether it has a bias, which stays in DRAM.
        table: Dotted path of the table of input embeddings that shares its weight; "" where none does.
    """

    module: str
    num_inputs: int
    num_outputs: int
    has_bias: bool
    table: str = ""

    @property
    def weight(self) -> str:
        """State-dict name of its weight."""
        return f"{self.module}.weight"

    @property
    def names(self) -> tuple[str, ...]:
        """State-dict names of its weight: a checkpoint may have it under any of them."""
        return (self.weight, f"{self.table}.weight") if self.table else (self.weight,)


@dataclass(frozen=True, kw_only=True)
class EmbeddingLayer:
    """The table of input embeddings, (num_rows, hidden_size), which no other layer shares.

    Attributes:
        module: Dotted path of the module, which stays in the model without its weight.
        num_rows: Tokens that it knows.
        hidden_size: Elements of a row.
    """

    module: str
    num_rows: int
    hidden_size: int

    @property
    def weight(self) -> str:
        """State-dict name of its weight."""
        return f"{self.module}.weight"


FoundUnit = FfnLayer | ExpertLayer | LinearLayer | EmbeddingLayer


def find_units(
    model: PreTrainedModel, *, dtype_bytes: int, min_linear_bytes: int = MIN_LINEAR_BYTES
) -> tuple[FoundUnit, ...]:
    """Return what of `model` is streamed, in forward order: embeddings, feed-forward layers or experts, linear layers.

    Args:
        model: On the meta device, or with weights.
        dtype_bytes: Of a weight in the pack.
        min_linear_bytes: Smaller linear layers and embeddings stay in DRAM.

    Raises:
        UnsupportedModelError: A feed-forward layer or experts that can't be placed.
    """
    main: tuple[FfnLayer | ExpertLayer, ...] = find_expert_layers(model) or find_ffn_layers(model)
    try:
        path, layers = decoder_layers(model)
    except UnsupportedModelError:  # of experts only: they are found wherever they are
        return main
    replaced = {name for each in main if isinstance(each, FfnLayer) for name in (each.module, *each.identities)}
    walk = _Walk(
        by_module={each.module: each for each in main},
        replaced=replaced,
        names=_names_of(model),
        initialised=_initialised_by_name(type(model)),
    )
    table = _input_table(model)
    if table is not None and table.module.rpartition(".")[2] in walk.initialised:
        table = None
    found: list[FoundUnit] = []
    if table is not None and table.weight in walk.once:
        found.append(table)
    for index, layer in enumerate(layers):
        found += walk.units(layer, f"{path}.{index}")
    found += _output_layer(model, walk, table)
    met = {each.module for each in found}
    if not all(each.module in met for each in main):  # a forward that can't be followed: none of its order is known
        return main
    return tuple(each for each in found if _is_worth_it(each, dtype_bytes, min_linear_bytes))


def _is_worth_it(found: FoundUnit, dtype_bytes: int, min_linear_bytes: int) -> bool:
    """Return whether a matrix is large, and can be cut into blocks of a usual size.

    Blocks of whole steps give the bits of the whole matrix in torch's products; a last one that is shorter may not.
    """
    if isinstance(found, EmbeddingLayer):
        num_rows, row_bytes, is_cut = found.num_rows, found.hidden_size * dtype_bytes, True
    elif isinstance(found, LinearLayer):
        num_rows, row_bytes = found.num_outputs, found.num_inputs * dtype_bytes
        is_cut = num_rows % ROWS_PER_STEP == 0
    else:
        return True
    return (
        is_cut
        and matrix_row_step(row_bytes) * row_bytes <= MAX_BLOCK_BYTES
        and num_rows * row_bytes >= min_linear_bytes
    )


def _names_of(model: PreTrainedModel) -> list[frozenset[str]]:
    """Return the names of each weight: more than one where modules share it, or will once weights are loaded."""
    shared = {name: {name, source} for name, source in model.all_tied_weights_keys.items()}
    names: dict[str, set[str]] = {}
    seen: dict[int, str] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        first = seen.setdefault(id(weight), name)
        group = set[str]().union(*(names.get(each, {each}) for each in {name, first} | shared.get(name, set())))
        names |= dict.fromkeys(group, group)
    return [frozenset(group) for group in {id(group): group for group in names.values()}.values()]


def _input_table(model: PreTrainedModel) -> EmbeddingLayer | None:
    """Return the table of input embeddings; None where it is more than looked up, or not as a table is."""
    try:
        module: Any = model.get_input_embeddings()
    except (NotImplementedError, AttributeError):
        return None
    path = next((name for name, each in model.named_modules() if each is module), None)
    if not path or not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return None
    if not looks_up(type(module)):  # type: ignore[arg-type]  # classes are hashable
        return None
    outer: nn.Module = model
    names = path.split(".")
    for index, name in enumerate(names):  # of every module around it: does its forward use the weight itself?
        if ".".join(names[index:]) in called_children(type(outer)).read:  # type: ignore[arg-type]  # classes are hashable
            return None
        outer = outer.get_submodule(name)
    return EmbeddingLayer(module=path, num_rows=module.num_embeddings, hidden_size=module.embedding_dim)


@cache
def looks_up(cls: type) -> bool:
    """Return whether the forward of `cls` is torch's, or one that asks torch's and uses no value of the weight itself."""
    forward: Any = getattr(cls, "forward", None)
    if forward is nn.Embedding.forward:
        return True
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    asks = False
    allowed = 0
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        if node.attr == "forward" and ast.unparse(node.value) == "super()":
            asks = True
        elif node.attr in _HARMLESS and _own_name(node.value) == "weight":
            allowed += 1
    used = sum(_own_name(node) == "weight" for node in ast.walk(tree) if isinstance(node, ast.expr))
    return asks and used == allowed


@dataclass(kw_only=True)
class _Walk:
    """Follows forwards from module to module."""

    by_module: dict[str, FfnLayer | ExpertLayer]
    replaced: set[str]
    names: list[frozenset[str]]
    initialised: frozenset[str]
    met: set[str] = field(default_factory=set)

    @cached_property
    def once(self) -> set[str]:
        """The names of weights that no other name shares."""
        return {name for names in self.names if len(names) == 1 for name in names}

    def units(self, module: nn.Module, path: str) -> Iterator[FoundUnit]:
        """Yield the units within `module` in the order in which its forward calls them."""
        calls = called_children(type(module))  # type: ignore[arg-type]  # classes are hashable
        for name in calls.in_order:
            try:
                child = module.get_submodule(name)
            except AttributeError:
                continue
            where = f"{path}.{name}" if path else name
            if where in self.met or not isinstance(child, nn.Module):
                continue
            self.met.add(where)
            if where in self.by_module:
                yield self.by_module[where]
            elif type(child) is nn.Linear:
                linear = self.linear(child, where)
                if linear is not None and name not in calls.read:
                    yield linear
            elif where not in self.replaced:
                yield from self.units(child, where)

    def linear(self, module: nn.Linear, path: str, table: EmbeddingLayer | None = None) -> LinearLayer | None:
        """Return the linear layer at `path`; None where its weight is another one's affair than that of `table`."""
        is_named = path.rpartition(".")[2] in self.initialised
        weight = f"{path}.weight"
        is_shared = table is not None and frozenset((weight, table.weight)) in self.names
        if path in self.replaced or is_named or not (is_shared or weight in self.once):
            return None
        return LinearLayer(
            table=table.module if table is not None and is_shared else "",
            module=path,
            num_inputs=module.in_features,
            num_outputs=module.out_features,
            has_bias=module.bias is not None,
        )


def _initialised_by_name(cls: type[PreTrainedModel]) -> frozenset[str]:
    """Return the names of layers whose weights a family fills by name before loading, through the module around them."""
    try:
        source = inspect.getsource(cls._init_weights)
    except (OSError, TypeError):
        return frozenset()
    # Through its weight, or by a function of the family's own that is given the layer.
    found = re.findall(r"\.(\w+)\.weight|(?<![\w.])\w+\(\s*module\.(\w+)", source)
    return frozenset(name for names in found for name in names if name)


def _output_layer(model: PreTrainedModel, walk: _Walk, table: EmbeddingLayer | None) -> Iterator[LinearLayer]:
    """Yield the output layer, where it is one that can be streamed."""
    output: Any = model.get_output_embeddings()
    name = next((name for name, module in model.named_children() if module is output), None)
    if name is None or type(output) is not nn.Linear:
        return
    calls = called_children(type(model))  # type: ignore[arg-type]  # classes are hashable
    linear = walk.linear(output, name, table)
    if linear is not None and name in calls.in_order and name not in calls.read:
        yield linear


@dataclass(frozen=True)
class Calls:
    """What a module's forward does with its children.

    Attributes:
        in_order: Names of those that it calls, in the order of the first calls.
        read: Names of linear layers whose weight it uses beside calling them.
    """

    in_order: tuple[str, ...]
    read: frozenset[str]


@cache
def called_children(cls: type[nn.Module]) -> Calls:
    """Return which children the forward of `cls` calls, in the order of evaluation, as its source says."""
    reader = _ForwardReader(cls)
    reader.follow("forward")
    return Calls(tuple(dict.fromkeys(reader.called)), frozenset(reader.read))


class _ForwardReader(ast.NodeVisitor):
    """Walks a forward, and the methods that it calls, in the order in which Python evaluates them."""

    def __init__(self, cls: type[nn.Module]) -> None:
        self._cls = cls
        self._followed: set[str] = set()
        self.called: list[str] = []
        self.read: set[str] = set()

    def follow(self, method: str) -> None:
        """Walk a method of the class, once."""
        function = getattr(self._cls, method, None)
        if method in self._followed or not inspect.isfunction(function):
            return
        self._followed.add(method)
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):  # no source, or one that does not stand alone
            return
        definition = tree.body[0]
        if isinstance(definition, ast.FunctionDef):
            for statement in definition.body:
                self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Visit the value before the targets."""
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)

    def visit_Call(self, node: ast.Call) -> None:
        """Note a call of a child once its arguments, which may be calls, are done."""
        for part in (*node.args, *node.keywords):
            self.visit(part)
        name = _own_name(node.func)
        if name is None:
            self.visit(node.func)
        elif "." not in name and inspect.isfunction(getattr(self._cls, name, None)):
            self.follow(name)
        else:
            self.called.append(name)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Note the use of a child's weight, but for what it says of itself."""
        inner = node.value
        if node.attr in _HARMLESS and isinstance(inner, ast.Attribute) and inner.attr == "weight":
            return
        name = _own_name(node)
        if name is not None and re.search(r"\.weight$", name):
            self.read.add(name.removesuffix(".weight"))
            return
        self.generic_visit(node)


def _own_name(node: ast.expr) -> str | None:
    """Return `a.b` of `self.a.b`; None of anything else."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return ".".join(reversed(names)) if names and isinstance(node, ast.Name) and node.id == "self" else None
