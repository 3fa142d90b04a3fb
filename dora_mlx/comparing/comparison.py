"""Train every contender on the same batches from the same start, one run folder each.

``comparison.json`` is rewritten after every run, so an interrupted comparison goes on where it
was: finished runs are read from it, and the one that was interrupted resumes from its checkpoint.
"""

import gc
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx

from dora_mlx.adapters.adapter_folder import WEIGHTS_FILE
from dora_mlx.adapters.trained import load_run
from dora_mlx.atomic import write_text
from dora_mlx.comparing.general import GeneralSet
from dora_mlx.comparing.settings import Contender, Settings, swept
from dora_mlx.config import SMALL_MODEL, TrainConfig
from dora_mlx.errors import UserError
from dora_mlx.kernels.frozen_weight import is_quantized, parameter_count
from dora_mlx.loading import load_base, load_lazily
from dora_mlx.registry import resolve
from dora_mlx.run_folder import RunFolder
from dora_mlx.training.events import Listener, read_events
from dora_mlx.training.finetune import default_learning_rate, finetune
from dora_mlx.training.loop import DivergedError
from dora_mlx.training.memory_plan import plan_memory

RESULTS_FILE = "comparison.json"
# Steps before the time of one is settled, and steps to take it from.
_WARM_UP, _TIMED = 2, 6


@dataclass(frozen=True)
class RunResult:
    """What one run came to.

    ``step_seconds`` and ``tokens_per_second`` (trained tokens) are medians over its steps;
    ``peak_memory_bytes`` is that of this run alone; losses are means over trained tokens, and
    ``validations`` pairs of step and loss, from step 0, without those that are not finite. A run
    that diverged has no ``best_validation`` and no ``general_loss``: what it was before is no
    result of its learning rate.
    """

    run: str
    contender: str
    seed: int
    learning_rate: float
    steps: int
    trainable_parameters: int
    total_parameters: int
    step_seconds: float
    tokens_per_second: float
    peak_memory_bytes: int
    best_validation: float | None
    general_loss: float | None
    adapter_bytes: int
    validations: list[tuple[int, float]]


@dataclass
class Comparison:
    """A comparison as far as it is: ``comparison.json``.

    ``notes`` are sentences for the reader of the report; ``learning_rates`` are those chosen, by
    contender; ``steps`` too; ``results`` has every finished run, sweeps included.
    """

    settings: dict[str, Any]
    notes: list[str] = field(default_factory=list)
    general_before: float | None = None
    contenders: list[str] = field(default_factory=list)
    learning_rates: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)
    results: list[RunResult] = field(default_factory=list)

    def of(self, contender: str) -> list[RunResult]:
        """The runs of a contender at its chosen learning rate, by seed."""
        rate = self.learning_rates[contender]
        own = [r for r in self.results if (r.contender, r.learning_rate) == (contender, rate)]
        return sorted(own, key=lambda result: result.seed)

    def tried(self, contender: str) -> list[RunResult]:
        """The runs of a contender on the first seed, at every rate that was tried."""
        own = [result for result in self.results if result.contender == contender]
        return [result for result in own if result.seed == own[0].seed]


@dataclass(frozen=True)
class Watch:
    """How a comparison is followed and ended from outside.

    ``starting`` is called with the name of a run, its number and how many there will be at most,
    ``listener`` with every event of the runs, and ``should_stop`` is asked before every step.
    """

    starting: Callable[[str, int, int], None] = lambda name, number, total: None
    listener: Listener | None = None
    should_stop: Callable[[], bool] = lambda: False


class Stopped(Exception):
    """The comparison was told to stop; everything so far is kept."""


def run_comparison(settings: Settings, folder: Path, watch: Watch) -> Comparison:
    """Run what is missing of the comparison in ``folder``.

    Raises:
        UserError: If ``folder`` holds another comparison, or anything a run cannot go on with.
        Stopped: When ``should_stop`` said so.
    """
    comparison = _open(settings, folder)
    return _Runner(settings, folder, watch, comparison).run()


def read_comparison(folder: Path) -> Comparison:
    """The comparison kept in ``folder``.

    Raises:
        UserError: If there is none, or it is damaged.
    """
    path = folder / RESULTS_FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        saved["results"] = [
            RunResult(**{**result, "validations": [tuple(v) for v in result["validations"]]})
            for result in saved["results"]
        ]
        return Comparison(**saved)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no comparison: {error}. Remove its folder.") from error


def _open(settings: Settings, folder: Path) -> Comparison:
    # Through JSON, as what is read back has lists for tuples.
    now = json.loads(json.dumps(settings.to_dict()))
    if not (folder / RESULTS_FILE).exists():
        return Comparison(now)
    before = read_comparison(folder)
    if before.settings != now:
        raise UserError(
            f"{folder} holds a comparison with other settings: "
            f"{_difference(before.settings, now)}. Name another folder by --output, or replace "
            "this one by --overwrite."
        )
    return before


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    old, new = {**before, **before["config"]}, {**now, **now["config"]}
    names = [n for n in new if n != "config" and old.get(n) != new[n]]
    return "; ".join(f"{n} was {json.dumps(old.get(n))}, is {json.dumps(new[n])}" for n in names)


class _Runner:
    def __init__(self, settings: Settings, folder: Path, watch: Watch, comparison: Comparison):
        self._settings = settings
        self._folder = folder
        self._watch = watch
        self._comparison = comparison
        self._general: GeneralSet | None = None
        self._number, self._total = 0, 0

    def run(self) -> Comparison:
        contenders, default_rates = self._look_at_base()
        rates = {
            c.name: self._settings.learning_rates[c.name] or (default_rates[c.name],)
            for c in contenders
        }
        sweeps = sum(len(tried) - 1 for tried in rates.values())
        pilots = len(contenders) if self._settings.budget.unit == "minutes" else 0
        self._total = len(contenders) * self._settings.seeds + sweeps + pilots
        for contender in contenders:
            self._comparison.steps[contender.name] = self._steps(
                contender, rates[contender.name][0]
            )
        for contender in contenders:
            for rate in rates[contender.name]:
                self._result(contender, 0, rate)
        self._choose_rates(contenders)
        # Seed by seed, so that an interrupted comparison has all methods of the seeds it has.
        for seed in range(1, self._settings.seeds):
            for contender in contenders:
                rate = self._comparison.learning_rates[contender.name]
                self._result(contender, seed, rate)
        self._save()
        return self._comparison

    def _choose_rates(self, contenders: list[Contender]) -> None:
        """The best rate of each contender on the first seed; one that diverged is the worst."""
        failed = []
        for contender in contenders:
            tried = self._comparison.tried(contender.name)
            losses = {
                result.learning_rate: result.best_validation
                for result in tried
                if result.best_validation is not None
            }
            if losses:
                best = min(losses, key=lambda rate: losses[rate])
                self._comparison.learning_rates[contender.name] = best
            else:
                rates = ", ".join(f"{result.learning_rate:g}" for result in tried)
                failed.append(f"{contender.name} diverged at every learning rate tried ({rates})")
        if failed:
            raise UserError(f"{'; '.join(failed)}. Give lower ones by --learning-rates.")

    def _look_at_base(self) -> tuple[list[Contender], dict[str, float]]:
        """Who takes part, at which rate by default; loss of the base model on the general set."""
        config = self._settings.config
        base = load_base(resolve(config.model))
        small = parameter_count(base.model) < SMALL_MODEL
        quantized = any(is_quantized(module) for _, module in base.model.named_modules())
        notes, contenders = [], []
        for contender in self._settings.contenders:
            if contender.method == "full":
                plan = plan_memory(replace(config, method="full"))
                if plan.verdict == "does not fit":
                    notes.append(
                        f"Full fine-tuning is left out: it needs about {plan.peak / 1e9:.1f} GB, "
                        f"and this machine has {plan.limit / 1e9:.1f} GB for it."
                    )
                    continue
            contenders.append(contender)
        if quantized and any(contender.method == "full" for contender in contenders):
            notes.append(
                "The base model is quantized: full fine-tuning starts from its dequantized "
                "weights, the others train beside the quantized ones."
            )
        if not contenders:
            raise UserError(" ".join(notes))
        if self._settings.general_data is not None:
            self._general = GeneralSet.read(config, self._settings.general_data, base.tokenizer)
            if self._comparison.general_before is None:
                self._comparison.general_before = self._general.loss(base.model)
        self._comparison.notes = notes
        self._comparison.contenders = [contender.name for contender in contenders]
        rates = {c.name: default_learning_rate(c.method, small) for c in contenders}
        return contenders, rates

    def _steps(self, contender: Contender, rate: float) -> int:
        """Steps of a contender's runs: those of the budget, or what fits into its minutes."""
        budget = self._settings.budget
        known = self._comparison.steps.get(contender.name)
        if budget.unit == "steps" or known is not None:
            return known or int(budget.amount)
        name = f"pilot-{contender.name}"
        config = self._settings.config_of(contender, 0, rate, _WARM_UP + _TIMED)
        self._train(replace(config, steps_per_eval=_WARM_UP + _TIMED), name)
        seconds = _step_seconds(self._events(name))
        return max(1, round(budget.amount * 60 / seconds))

    def _result(self, contender: Contender, seed: int, rate: float) -> RunResult:
        """The result of a run, which is trained if it is not there yet."""
        name = f"{contender.name}-lr{rate:g}-seed{self._settings.config.seed + seed}"
        for result in self._comparison.results:
            if result.run == name:
                return result
        steps = self._comparison.steps[contender.name]
        converged = self._train(self._settings.config_of(contender, seed, rate, steps), name)
        result = self._read_result(contender, seed, rate, name, converged)
        self._comparison.results.append(result)
        self._save()
        return result

    def _train(self, config: TrainConfig, name: str) -> bool:
        """Train a run to its end, from its last checkpoint if it was begun; false: it diverged."""
        self._number += 1
        self._watch.starting(name, self._number, self._total)
        folder = self._run_folder(name)
        ends = [e for e in self._events(name) if e["event"] == "end"]
        if ends and ends[-1]["reason"] in ("completed", "early_stopped"):
            return True
        # The peak of a run is its own when nothing of the one before it is left.
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        begun = folder.config_file.exists()
        if begun:
            config = TrainConfig.from_file(folder.config_file)
        try:
            reason = finetune(
                config,
                folder,
                resume=begun,
                overwrite=not begun,
                listener=self._watch.listener,
                should_stop=self._watch.should_stop,
            )
        except DivergedError:
            return False
        if reason == "stopped":
            self._save()
            raise Stopped
        return True

    def _read_result(
        self, contender: Contender, seed: int, rate: float, name: str, converged: bool
    ) -> RunResult:
        folder, events = self._run_folder(name), self._events(name)
        start = next(event for event in events if event["event"] == "start")
        steps = [event for event in events if event["event"] == "step"]
        validated = [(e["step"], e["loss"]) for e in events if e["event"] == "validation"]
        if not validated:
            raise UserError(
                "There is nothing to compare by: no example is kept for validation. "
                "Give --valid-data, or a larger --valid-fraction."
            )
        validations = [(step, loss) for step, loss in validated if loss is not None]
        trained = [loss for step, loss in validations if step > 0]
        converged = converged and bool(trained)
        weights = folder.path / WEIGHTS_FILE
        return RunResult(
            name,
            contender.name,
            self._settings.config.seed + seed,
            rate,
            steps[-1]["step"],
            start["trainable_parameters"],
            start["total_parameters"],
            _step_seconds(events),
            statistics.median(event["tokens_per_second"] for event in steps[_WARM_UP:] or steps),
            max(event["peak_memory_bytes"] for event in steps),
            min(trained) if converged else None,
            self._general.loss(load_run(folder).base.model)
            if self._general and converged
            else None,
            weights.stat().st_size if weights.exists() else 0,
            validations,
        )

    def _run_folder(self, name: str) -> RunFolder:
        return RunFolder(self._folder / "runs" / name)

    def _events(self, name: str) -> list[dict[str, Any]]:
        return read_events(self._run_folder(name).path)

    def _save(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(asdict(self._comparison), indent=1) + "\n"
        write_text(self._folder / RESULTS_FILE, text)


def with_sweep(settings: Settings) -> Settings:
    """The same comparison with a sweep around the rate of every contender that has only one."""
    config = settings.config
    model, _ = load_lazily(resolve(config.model))
    small = parameter_count(model) < SMALL_MODEL
    rates = {}
    for contender in settings.contenders:
        given = settings.learning_rates[contender.name]
        centre = given or (default_learning_rate(contender.method, small),)
        rates[contender.name] = given if len(given) > 1 else swept(centre[0])
    return replace(settings, learning_rates=rates)


def _step_seconds(events: list[dict[str, Any]]) -> float:
    """Median time of an optimizer step."""
    steps = [event for event in events if event["event"] == "step"]
    before = [0, *(event["tokens"] for event in steps)]
    seconds = [
        (event["tokens"] - tokens) / event["tokens_per_second"]
        for event, tokens in zip(steps, before, strict=False)
    ]
    return cast(float, statistics.median(seconds[_WARM_UP:] or seconds))
