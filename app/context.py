"""What the tabs share: folders and processes of the server, and state of one page."""

from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

import gradio as gr

from app.clock import Clock
from app.exports import Exports
from app.run_watch import RunWatch
from app.trainings import Trainings
from app.workers import Worker
from dora_mlx import list_runs


@dataclass(frozen=True)
class Context:
    """One for each server.

    Attributes:
        runs_dir: The runs; the app's own things are in its folder ``.app``.
        exports_dir: What was exported, and what may be downloaded.
        is_local: Whether the page can only be open on this machine.
        trainings: Starts trainings and finds the one that is under way.
        watch: What there is to see of each run.
        data: Worker for data files and memory plans.
        chat: Worker that holds the model one talks to.
        export: Worker that merges and writes models.
        inspection: Worker that measures what a run changed.
    """

    runs_dir: Path
    exports_dir: Path
    is_local: bool
    trainings: Trainings
    watch: RunWatch
    data: Worker = field(default_factory=lambda: Worker("data"))
    chat: Worker = field(default_factory=lambda: Worker("chat"))
    export: Worker = field(default_factory=lambda: Worker("export"))
    inspection: Worker = field(default_factory=lambda: Worker("inspection"))

    @cached_property
    def exports(self) -> Exports:
        """The export that is under way, or was last."""
        return Exports(self.exports_dir, self.export)

    def close(self) -> None:
        """End all workers for good."""
        for worker in (self.data, self.chat, self.export, self.inspection):
            worker.close()

    def now(self) -> tuple[str, str]:
        """What a page shows, as two fingerprints: (what there is, how far it is).

        The first differs when a run comes, ends, goes or has something new to use; the second
        also with every step of a training and every part of an export.
        """
        runs = list_runs(self.runs_dir)
        active = [self.watch.look(run.name).version for run in runs if run.is_active]
        there = [
            (run.name, run.status, run.has_adapter, run.best_validation, run.is_active or run.step)
            for run in runs
        ]
        activity = self.trainings.status()
        done = self.exports.names(), self.exports.job
        return _fingerprint(there, activity), _fingerprint(there, activity, active, done)

    @property
    def last_data_file(self) -> Path:
        """What was chosen last on the tab Data."""
        return self.runs_dir / ".app" / "data.json"

    @property
    def uploads_dir(self) -> Path:
        """Data files that were uploaded; runs refer to them, so they stay."""
        return self.runs_dir / ".app" / "data"


def _fingerprint(*facts: Any) -> str:
    return blake2b(repr(facts).encode(), digest_size=12).hexdigest()


@dataclass(frozen=True)
class Page:
    """Components that belong to no single tab.

    Attributes:
        blocks: The page; ``connect(page.blocks.load, ...)`` runs when a browser opens it.
        clock: Tells when there is something new to show.
        data: Options of ``TrainConfig`` that the Data tab decides, as a dictionary: ``data``,
            ``columns`` and so on. Empty until there is data.
        run: Name of the run that the page looks at, or ``None``. What sets it goes through
            Gradio's queue, or nobody would be told.
    """

    blocks: gr.Blocks
    clock: Clock
    data: gr.State
    run: gr.State
