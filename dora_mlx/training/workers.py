"""The processes that train one run together, one on each machine.

``mlx.launch -n 2 python -m dora_mlx.train ...`` starts the same command several times; without it
there is one worker and nothing here does anything. Every worker computes the gradient of its own
batches and makes the same update. The first one, the leader, does all that is done once: it keeps
the run folder and shows the progress.
"""

import json
from collections.abc import Callable
from typing import Any, TypeVar, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from dora_mlx.errors import UserError

Tree = TypeVar("Tree")


class Workers:
    """The processes that were launched together, as this one sees them.

    Every method that communicates has to be called by all workers, in the same order.

    Raises:
        UserError: From any of them, when the connection to another worker is lost.
    """

    def __init__(self) -> None:
        self._group = mx.distributed.init()

    @property
    def count(self) -> int:
        """Number of workers."""
        return self._group.size()

    @property
    def rank(self) -> int:
        """Number of this worker, from 0."""
        return self._group.rank()

    @property
    def leads(self) -> bool:
        """Whether this is the worker that writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """The sum of each value over the workers, in float64 for counts that stay whole."""
        if self.count == 1:
            return list(values)
        gathered = self._gathered(np.array(values, np.float64).view(np.uint8))
        return [float(total) for total in gathered.view(np.float64).sum(axis=0)]

    def any(self, *flags: bool) -> list[bool]:
        """Whether each flag is set for any of the workers."""
        return [total > 0 for total in self.sum(*map(float, flags))]

    def sum_gradients(self, gradients: Tree) -> Tree:
        """The sum over the workers of every array of a tree."""
        if self.count == 1:
            return gradients
        # MLX sends few large messages instead of many small ones, and divides by the workers.
        mean = self._received(lambda: nn.average_gradients(gradients, self._group))
        return cast(Tree, tree_map(lambda array: array * self.count, mean))

    def share(self, value: Any) -> Any:
        """The JSON value that the leader has; what the others pass is not looked at."""
        if self.count == 1:
            return value
        message = json.dumps(value).encode() if self.leads else b""
        (length, *_) = (int(size) for size in self.sum(len(message)))
        padded = np.zeros(length, np.uint8)
        padded[: len(message)] = np.frombuffer(message, np.uint8)
        return json.loads(self._gathered(padded)[0].tobytes())

    def share_arrays(self, tree: Tree) -> Tree:
        """The arrays that the leader has, bit for bit, in a tree shaped alike everywhere."""
        if self.count == 1:
            return tree
        # By name: a tree that was read from a file has another order than one that was made.
        arrays = sorted(
            cast(list[tuple[str, mx.array]], tree_flatten(tree)), key=lambda named: named[0]
        )

        def shared() -> list[tuple[str, mx.array]]:
            own = [a if self.leads else mx.zeros_like(a) for _, a in arrays]
            sums = [mx.distributed.all_sum(a, group=self._group, stream=mx.cpu) for a in own]
            return [(name, array) for (name, _), array in zip(arrays, sums, strict=True)]

        return cast(Tree, tree_unflatten(self._received(shared)))

    def check_same(self, value: str, what: str) -> None:
        """Refuse to go on where another worker has another ``value`` than the leader.

        Raises:
            UserError: On every worker, naming those that differ.
        """
        if self.count == 1:
            return
        leaders = self.share(value)
        different = [float(self.rank == i and value != leaders) for i in range(self.count)]
        numbers = [str(i) for i, total in enumerate(self.sum(*different)) if total]
        if numbers:
            raise UserError(
                f"Worker {', '.join(numbers)} has another {what} than worker 0. All machines need "
                "the same model and data at the same place."
            )

    def _gathered(self, data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The bytes of every worker, ``[workers, bytes]``; the same number from each."""
        own = mx.array(data)[None]
        gathered = self._received(
            lambda: mx.distributed.all_gather(own, group=self._group, stream=mx.cpu)
        )
        return np.array(gathered)

    def _received(self, communicate: Callable[[], Tree]) -> Tree:
        try:
            received = communicate()
            mx.eval(received)
        except RuntimeError as error:
            raise UserError(
                f"The connection to another worker was lost ({error}). Look for its own message, "
                "or for a machine that sleeps or was switched off. The last checkpoint is kept; "
                "go on by --resume."
            ) from error
        return received
