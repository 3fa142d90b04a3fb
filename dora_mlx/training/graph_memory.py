"""The peak memory of a graph, by playing through how MLX evaluates it.

Arrays come when their operation runs and go after the last one that reads them; views share the
memory of what they look at, and elementwise operations take over that of an input they are the
last to read. The order is that of MLX's evaluation: backwards from the results, at most
``_WIDTH`` operations side by side, and then the other way round.
"""

from collections import Counter
from dataclasses import dataclass, field

from dora_mlx.training.graph import ALIAS, Graph, Node

_WIDTH = 20

_VIEWS = {
    ALIAS, "AsStrided", "Broadcast", "BroadcastAxes", "Contiguous", "Copy", "Depends",
    "ExpandDims", "Flatten", "Reshape", "Slice", "Split", "Squeeze", "StopGradient", "Transpose",
    "Unflatten", "View",
}  # fmt: skip
_IN_PLACE = {
    "Abs", "Add", "ArcTan2", "AsType", "BitwiseBinary", "Ceil", "Compiled", "Cos", "Divide",
    "Equal", "Erf", "ErfInv", "Exp", "Expm1", "Floor", "Full", "Greater", "GreaterEqual", "Less",
    "LessEqual", "Log", "Log1p", "LogAddExp", "LogicalAnd", "LogicalNot", "LogicalOr", "Maximum",
    "Minimum", "Multiply", "Negative", "NotEqual", "Power", "Remainder", "Round", "Select",
    "Sigmoid", "Sign", "Sin", "Softmax", "Sqrt", "Square", "Subtract", "Tanh", "Scatter",
    "ScatterAxis", "SliceUpdate", "Scan",
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """The moment at which the most memory is held, without that of the graph's inputs.

    Attributes:
        total: Bytes held.
        held: Names of the arrays that hold them, with the bytes of each.
    """

    total: int
    held: dict[str, int]


def peak_of(graph: Graph) -> Peak:
    """The peak of evaluating the outputs of ``graph``, whose inputs are there before and after."""
    return _Evaluation(graph).run()


@dataclass
class _Evaluation:
    graph: Graph
    maker: dict[str, Node] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.maker = {name: node for node in self.graph.nodes for name in node.outputs}

    def run(self) -> Peak:
        tape = self._tape()
        readers = Counter(name for node in tape for name in set(node.inputs))
        kept = set(self.graph.outputs)
        # Which memory an array lives in, and how many living arrays it has.
        home: dict[str, str] = {}
        tenants: Counter[str] = Counter()
        sizes: dict[str, int] = {}
        total, best, held = 0, 0, {}

        def leave(name: str) -> None:
            nonlocal total
            place = home.get(name)
            if place is None:
                return
            tenants[place] -= 1
            if not tenants[place]:
                total -= sizes.pop(place)

        for node in tape:
            for name in node.outputs:
                place = self._place(node, name, home, tenants, readers, kept)
                if place == name:
                    sizes[name] = self.graph.sizes[name]
                    total += sizes[name]
                if place is not None:
                    home[name] = place
                    tenants[place] += 1
            if total > best:
                best, held = total, dict(sizes)
            for name in set(node.inputs):
                readers[name] -= 1
                if not readers[name] and name not in kept:
                    leave(name)
            for name in node.outputs:
                if not readers[name] and name not in kept:
                    leave(name)
        return Peak(best, held)

    def _place(
        self,
        node: Node,
        name: str,
        home: dict[str, str],
        tenants: "Counter[str]",
        readers: "Counter[str]",
        kept: set[str],
    ) -> str | None:
        """The memory of a new array: its own, that of an input, or none that counts."""
        if node.kind in _VIEWS and node.inputs:
            source = node.inputs[0]
            if node.kind in ("Reshape", "Flatten") and self._scattered(source):
                return name
            if node.kind == "Depends":
                source = node.inputs[node.outputs.index(name)]
            return home.get(source)
        if node.kind in _IN_PLACE:
            for source in node.inputs:
                place = home.get(source)
                if (
                    place is not None
                    and self.graph.sizes[source] == self.graph.sizes[name]
                    and self.graph.sizes[place] == self.graph.sizes[name]
                    and tenants[place] == 1
                    and readers[source] == 1
                    and source not in kept
                ):
                    return place
        return name

    def _scattered(self, name: str) -> bool:
        """Whether the elements of an array are out of order, so that it cannot be reshaped."""
        node = self.maker.get(name)
        while node is not None and node.kind in _VIEWS and node.inputs:
            if node.kind in ("Transpose", "Broadcast"):
                return True
            if node.kind == "Slice":
                return True
            if node.kind in ("Reshape", "Flatten"):
                return False
            node = self.maker.get(node.inputs[0])
        return False

    def _tape(self) -> list[Node]:
        """The operations in the order MLX runs them in."""
        degree: Counter[str] = Counter()
        root = Node("Root", tuple(self.graph.outputs), (), [])
        stack: list[tuple[Node, int]] = [(root, 0)]
        seen: set[str] = set()
        while stack:
            node, index = stack.pop()
            if index < len(node.inputs):
                stack.append((node, index + 1))
                made_by = self.maker.get(node.inputs[index])
                if made_by is None:
                    continue
                key = made_by.outputs[0]
                degree[key] += 1
                if key not in seen:
                    seen.add(key)
                    stack.append((made_by, 0))
        tape, position = [root], 0
        waiting: list[tuple[Node, int]] = []
        while degree and (position < len(tape) or waiting):
            if position >= len(tape):
                node, index = waiting.pop()
            else:
                node, index = tape[position], 0
                position += 1
            while index < len(node.inputs):
                made_by = self.maker.get(node.inputs[index])
                if made_by is not None and made_by.outputs[0] in degree:
                    if len(tape) - position >= _WIDTH:
                        waiting.append((node, index))
                        break
                    key = made_by.outputs[0]
                    degree[key] -= 1
                    if not degree[key]:
                        del degree[key]
                        tape.append(made_by)
                index += 1
        return tape[:0:-1]
