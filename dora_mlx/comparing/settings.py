"""What a comparison is made of: contenders, seeds, learning rates and the budget."""

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

from dora_mlx.config import TrainConfig
from dora_mlx.errors import UserError

Method = Literal["dora", "lora", "full"]
METHODS = get_args(Method)

_BUDGET = re.compile(r"(\d+(?:\.\d+)?) ?(steps?|minutes?)")
# Around a method's usual rate, for a sweep.
_SWEEP = (0.5, 1.0, 2.0)
# Validations of a run, unless the options say otherwise: a curve of a few points.
_VALIDATIONS = 5


@dataclass(frozen=True)
class Contender:
    """A method with the rank it is tried at; ``rank`` is that of the options if ``None``."""

    method: Method
    rank: int | None = None

    @property
    def name(self) -> str:
        """``dora``, or ``dora-r4`` with a rank of its own."""
        return self.method if self.rank is None else f"{self.method}-r{self.rank}"


@dataclass(frozen=True)
class Budget:
    """How long every run trains: ``amount`` optimizer steps, or minutes of the clock."""

    amount: float
    unit: Literal["steps", "minutes"]


@dataclass(frozen=True)
class Settings:
    """A whole comparison; equal settings are the same comparison.

    ``learning_rates`` holds the rates to try for each contender: an empty tuple means the method's
    default, and several are swept over on the first seed.
    """

    config: TrainConfig
    contenders: tuple[Contender, ...]
    seeds: int
    budget: Budget
    learning_rates: dict[str, tuple[float, ...]]
    general_data: str | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)

    def config_of(self, contender: Contender, seed: int, rate: float, steps: int) -> TrainConfig:
        """The options of one run.

        A rank of its own changes alpha with it, so that the scale of the update stays the same.
        """
        rank = contender.rank or self.config.rank
        between = self.config.steps_per_eval
        if between == TrainConfig().steps_per_eval:
            between = max(1, steps // _VALIDATIONS)
        return replace(
            self.config,
            method=contender.method,
            rank=rank,
            alpha=self.config.alpha * rank / self.config.rank,
            seed=self.config.seed + seed,
            learning_rate=rate,
            steps=steps,
            steps_per_eval=between,
        )


def parse_contenders(text: str) -> tuple[Contender, ...]:
    """``dora,lora,dora:4`` -> contenders.

    Raises:
        UserError: For every part that is no method, or comes twice.
    """
    found: list[Contender] = []
    wrong: list[str] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        method, colon, rank = part.partition(":")
        ranked = rank.isdecimal() and int(rank) > 0 and method != "full"
        known = method in METHODS and (ranked or not colon)
        contender = Contender(cast(Method, method), int(rank) if known and colon else None)
        if not known or contender in found:
            wrong.append(part)
        else:
            found.append(contender)
    if wrong or not found:
        raise UserError(
            f"--methods takes {', '.join(METHODS)}, each once, with commas between them and maybe "
            f"a rank as in dora:4; not {', '.join(wrong) or repr(text)}."
        )
    return tuple(found)


def parse_budget(text: str) -> Budget:
    """``200steps`` or ``5minutes``.

    Raises:
        UserError: For anything else.
    """
    match = _BUDGET.fullmatch(text.strip())
    amount, unit = (float(match[1]), match[2].rstrip("s") + "s") if match else (0.0, "")
    if amount <= 0 or (unit == "steps" and amount != int(amount)):
        raise UserError(f"--budget takes 200steps or 5minutes, not {text!r}.")
    return Budget(amount, cast(Literal["steps", "minutes"], unit))


def parse_learning_rates(
    text: str | None, contenders: tuple[Contender, ...]
) -> dict[str, tuple[float, ...]]:
    """``dora=1e-3/2e-3,lora=1e-3`` -> the rates of each contender.

    A method's rates are those of its contenders of other ranks too, unless they have their own.

    Raises:
        UserError: For a name that is not compared or a value that is no rate.
    """
    names = {contender.name for contender in contenders} | {c.method for c in contenders}
    given: dict[str, tuple[float, ...]] = {}
    wrong = []
    for part in filter(None, (text or "").split(",")):
        name, _, values = part.partition("=")
        try:
            rates = tuple(float(value) for value in values.split("/"))
        except ValueError:
            rates = ()
        name = name.strip().replace(":", "-r")
        if name not in names or not rates or not all(0 < rate <= 1 for rate in rates):
            wrong.append(part)
        given[name] = rates
    if wrong:
        raise UserError(
            f"--learning-rates takes METHOD=RATE, or METHOD=RATE/RATE to try several, for "
            f"{', '.join(sorted(names))}, with rates between 0 and 1; not {', '.join(wrong)}."
        )
    return {c.name: given.get(c.name, given.get(c.method, ())) for c in contenders}


def swept(rate: float) -> tuple[float, ...]:
    """The rates of a sweep around ``rate``."""
    return tuple(rate * factor for factor in _SWEEP)
