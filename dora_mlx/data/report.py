"""Everything wrong with a data file, in one report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dora_mlx.errors import UserError

Severity = Literal["error", "warning"]

# Kept per severity; what comes after is only counted, so that a report has a bounded size.
_KEPT = 1000
_SHOWN = 200
_SPANS = 50


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one row.

    ``kind`` sums up alike problems (plural: "duplicates"); ``line`` and ``column`` count from 1.
    """

    line: int
    message: str
    severity: Severity
    kind: str
    column: int | None = None


@dataclass
class Report:
    """The problems of one file; rows of Parquet and Hub data have no lines but row numbers.

    Attributes:
        source: What was read.
        unit: What ``Problem.line`` counts: ``line`` or ``row``.
        problems: At most a thousand of each severity.
        kinds: How many there are of every kind, of each severity.
        bad_rows: Rows with at least one error.
        rows: Rows read, bad ones included.
        notices: Things to know that belong to no single row.
    """

    source: Path | str
    unit: str = "line"
    problems: list[Problem] = field(default_factory=list)
    kinds: dict[str, dict[str, int]] = field(default_factory=lambda: {"error": {}, "warning": {}})
    bad_rows: int = 0
    rows: int = 0
    notices: list[str] = field(default_factory=list)

    def error(
        self, line: int, messages: list[str], column: int | None = None, kind: str = "bad rows"
    ) -> None:
        """Note what is wrong with one bad row."""
        self.bad_rows += 1
        for message in messages:
            self._add(Problem(line, message, "error", kind, column))

    def warning(self, line: int, message: str, kind: str) -> None:
        """Note something odd about a row that stays."""
        self._add(Problem(line, message, "warning", kind))

    def notice(self, message: str) -> None:
        """Note something about the whole file, once."""
        if message not in self.notices:
            self.notices.append(message)

    def count(self, severity: Severity) -> int:
        """Number of problems of a severity, those not kept included."""
        return sum(self.kinds[severity].values())

    def raise_errors(self) -> None:
        """Raise one ``UserError`` with every error, if there is any."""
        if self.bad_rows:
            bad = f"{self.source} has {self.bad_rows} bad {self.unit}{'s'[: self.bad_rows > 1]}"
            advice = "mend or remove them, or leave them out with --skip-bad-rows"
            if self.bad_rows == self.rows:
                bad, advice = f"{bad} and no good one", "mend them"
            raise UserError(f"{bad}; {advice}:\n{self.listing('error')}")

    def listing(self, severity: Severity) -> str:
        """The ``sentences`` of a severity, each on an indented line."""
        return "\n".join(f"  {sentence}" for sentence in self.sentences(severity, _SHOWN))

    def sentences(self, severity: Severity, most: int) -> list[str]:
        """What is wrong and in which lines, by the first of them: ``lines 2 to 61 and 70: ...``.

        Above ``most`` different problems the last sentence says how many there are beside them.
        """
        alike: dict[tuple[str, int | None], list[int]] = {}
        for problem in sorted(self.problems, key=lambda problem: problem.line):
            if problem.severity == severity:
                alike.setdefault((problem.message, problem.column), []).append(problem.line)
        shown = list(alike.items())[:most]
        sentences = [
            f"{self._places(lines)}{'' if column is None else f', column {column}'}: {message}"
            for (message, column), lines in shown
        ]
        more = self.count(severity) - sum(len(lines) for _, lines in shown)
        return [*sentences, f"and {more:,} more"] if more > 0 else sentences

    def summary(self, severity: Severity) -> str:
        """How many there are of every kind, such as ``duplicates: 2, control characters: 1``."""
        return ", ".join(f"{kind}: {number:,}" for kind, number in self.kinds[severity].items())

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON values."""
        values = dict(vars(self))
        return values | {
            "source": str(self.source),
            "problems": [vars(problem) for problem in self.problems],
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Report":
        """The report that ``to_dict`` wrote."""
        return cls(**values | {"problems": [Problem(**entry) for entry in values["problems"]]})

    def _add(self, problem: Problem) -> None:
        kinds = self.kinds[problem.severity]
        if sum(kinds.values()) < _KEPT:
            self.problems.append(problem)
        kinds[problem.kind] = kinds.get(problem.kind, 0) + 1

    def _places(self, lines: list[int]) -> str:
        """``lines 2 to 61 and 70`` for ascending numbers."""
        spans: list[list[int]] = []
        for line in lines:
            if spans and line <= spans[-1][-1] + 1:
                spans[-1].append(line)
            else:
                spans.append([line])
        named = [f"{span[0]} to {span[-1]}" if len(span) > 1 else f"{span[0]}" for span in spans]
        if more := sum(map(len, spans[_SPANS:])):
            named[_SPANS:] = [f"{more:,} more"]
        *first, last = named
        unit = f"{self.unit}s" if len(lines) > 1 else self.unit
        return f"{unit} {', '.join(first)} and {last}" if first else f"{unit} {last}"
