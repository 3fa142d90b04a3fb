"""What the tabs share: folders and processes of the server, and state of one page."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import gradio as gr

from app.exports import Exports
from app.run_watch import RunWatch
from app.trainings import Trainings
from app.workers import Worker


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

    @property
    def last_data_file(self) -> Path:
        """What was chosen last on the tab Data."""
        return self.runs_dir / ".app" / "data.json"

    @property
    def uploads_dir(self) -> Path:
        """Data files that were uploaded; runs refer to them, so they stay."""
        return self.runs_dir / ".app" / "data"


@dataclass(frozen=True)
class Page:
    """Components that belong to no single tab.

    Attributes:
        blocks: The page; ``connect(page.blocks.load, ...)`` runs when a browser opens it.
        tick: Fires every second; connect it with ``queue=False``.
        data: Options of ``TrainConfig`` that the Data tab decides, as a dictionary: ``data``,
            ``columns`` and so on. Empty until there is data.
        run: Name of the run that the page looks at, or ``None``.
    """

    blocks: gr.Blocks
    tick: gr.Timer
    data: gr.State
    run: gr.State
