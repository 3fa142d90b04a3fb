"""How an answer is drawn from a model, once for every program that asks for one.

The flags of ``chat`` and the controls of the app derive from the fields of ``Sampling``.
"""

from dataclasses import dataclass

from dora_mlx.config import check_bounds, knob


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """Length and randomness of one answer.

    Raises:
        UserError: On construction, listing every value that is out of bounds.
    """

    max_tokens: int = knob(256, "Longest answer in tokens.", minimum=1)
    temperature: float = knob(
        0.0,
        "0 takes the likeliest token, 1 draws from the model's distribution, more varies more.",
        minimum=0,
        maximum=10,
    )
    top_p: float = knob(
        1.0,
        "Draw from the likeliest tokens that together have this probability. 1: from all.",
        minimum=0.01,
        maximum=1,
    )
    top_k: int = knob(
        0, "Draw from this many of the likeliest tokens. 0: from all.", minimum=0, advanced=True
    )
    min_p: float = knob(
        0.0,
        "Leave out tokens below this share of the likeliest one's probability.",
        minimum=0,
        maximum=1,
        advanced=True,
    )
    repetition_penalty: float = knob(
        1.0,
        "Make the tokens of the last 64 less likely by this factor. 1: no difference.",
        minimum=0.1,
        maximum=10,
        advanced=True,
    )
    seed: int | None = knob(
        None,
        "Seed of the draws: the same one gives the same answer. Default: another one each time.",
        minimum=0,
        maximum=2**63 - 1,
        advanced=True,
    )
    stop: tuple[str, ...] = knob(
        (), "Texts that end the answer; they are not part of it.", advanced=True, metavar="TEXT"
    )

    def __post_init__(self) -> None:
        check_bounds(self)
