"""What an inspection found. Without MLX, so that a program that only shows it need not load it."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class RowChange:
    """A vector of a weight: ``row`` counts output rows (of all experts), or an embedding's columns.

    ``change`` is the length of the change as a share of ``magnitude_before``; magnitudes are in the
    units of the weight, ``direction_change`` is 1 - cos, from 0 to 2.
    """

    row: int
    change: float
    magnitude_before: float
    magnitude_after: float
    direction_change: float


@dataclass(frozen=True)
class WeightChange:
    """One weight at one state of the run.

    Attributes:
        name: Its path in the model.
        block: The transformer block it is in, from 0; ``None`` outside of the blocks.
        module: Its path within the block, such as ``self_attn.q_proj``; outside, ``name``.
        magnitude_change: dM, mean over rows of |m' - m|, in the units of the weight.
        magnitude: Mean over rows of the length before, to set ``magnitude_change`` against.
        direction_change: dD, mean over rows of 1 - cos, from 0 to 2.
        effective_rank: Of what was added to the weight; see ``decomposition.effective_rank``.
        largest_rows: The rows that changed most, the most changed first.
    """

    name: str
    block: int | None
    module: str
    magnitude_change: float
    magnitude: float
    direction_change: float
    effective_rank: float
    largest_rows: tuple[RowChange, ...]


@dataclass(frozen=True)
class WeightState:
    """All trained weights after ``step`` optimizer steps (``None``: that is not known).

    ``best`` marks the run's best adapter; ``correlation`` is Pearson's between dM and dD over the
    weights, or ``None`` where it says nothing.
    """

    step: int | None
    best: bool
    weights: tuple[WeightChange, ...]
    correlation: float | None


@dataclass(frozen=True)
class Inspection:
    """What a run did to the weights of its base model.

    ``states`` are the kept checkpoints by step, and the best adapter. ``correlation`` is
    that of all weights of all states, ``correlation_by_module`` that over one module's weights.
    """

    run: str
    model: str
    method: str
    states: tuple[WeightState, ...]
    correlation: float | None
    correlation_by_module: dict[str, float | None]

    @property
    def weights(self) -> tuple[WeightChange, ...]:
        """The weights at the best adapter, or at the one checkpoint that was asked for."""
        return next((state for state in self.states if state.best), self.states[-1]).weights

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
