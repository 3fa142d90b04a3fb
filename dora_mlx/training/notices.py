"""What there is to say about a run's data before it starts."""

from dora_mlx.config import TrainConfig
from dora_mlx.data.examples import ExampleSet
from dora_mlx.data.preparation import PreparedData


def data_notices(data: PreparedData, config: TrainConfig, packing_refused: str | None) -> list[str]:
    """What the reports of the data say, one sentence for each kind."""
    messages: list[str] = []
    for report in data.reports:
        if report.bad_rows:
            rows = "bad row of" if report.bad_rows == 1 else "bad rows of"
            are = "is" if report.bad_rows == 1 else "are"
            messages.append(
                f"{report.bad_rows} {rows} {report.source} {are} left out (--skip-bad-rows)"
            )
        if report.count("warning"):
            messages.append(
                f"{report.source} may deserve a look ({report.summary('warning')}); "
                f"`python -m dora_mlx.check {report.source}` names each"
            )
        messages += [f"{report.source}: {notice}" for notice in report.notices]
    sets = (("training", data.train), ("validation", data.valid))
    for kind, examples in sets:
        messages += _length_notices(kind, examples, config)
    if packing_refused is not None:
        messages.append(f"examples are not packed: {packing_refused}")
    return messages


def _length_notices(kind: str, examples: ExampleSet, config: TrainConfig) -> list[str]:
    """How many examples were longer than the limit, and what was done about it."""
    ways = {
        "cut": "were cut at the start of the prompt"
        if config.long_examples == "truncate-prompt"
        else "were cut at the end",
        "split": "were split",
        "dropped": "are left out",
    }
    messages = [
        f"{examples.counts[way]} {kind} examples are longer than --max-seq-length "
        f"{config.max_seq_length} and {done}"
        for way, done in ways.items()
        if examples.counts.get(way)
    ]
    if examples.dropped:
        messages.append(
            f"{examples.dropped} {kind} examples have no answer within that length and are left out"
        )
    return messages
