"""The export that is under way, or was last: a job that outlives the page that asked for it."""

import threading
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from app import work
from app.workers import Worker
from dora_mlx import EXPORT_FORMATS, RunFolder, UserError, default_export_path


@dataclass(frozen=True)
class ExportJob:
    """One export.

    Attributes:
        run: Name of the run.
        format: As in ``EXPORT_FORMATS``.
        quant: Name of one of the format's quants.
        output: The file or folder it writes.
        phase: What it is doing.
        done: Bytes done in this phase.
        total: Bytes of the phase in all; 0 where there is nothing to count.
        running: Whether it goes on.
        error: What it could not be finished for; empty if nothing.
        report: The ``ExportReport``, when it is finished.
    """

    run: str
    format: str
    quant: str
    output: Path
    phase: str = "starting"
    done: int = 0
    total: int = 0
    running: bool = True
    error: str = ""
    report: Any = None


class Exports:
    """Starts exports, one at a time, and knows how far the last one is."""

    def __init__(self, exports_dir: Path, worker: Worker):
        self.exports_dir = exports_dir
        self._worker = worker
        self._starting = threading.Lock()
        self._stop = threading.Event()
        self._job: ExportJob | None = None
        self._thread: threading.Thread | None = None

    @property
    def job(self) -> ExportJob | None:
        """The export under way or the last one since the server began."""
        return self._job

    def place(self, run: str, output_format: str, quant: str) -> Path:
        """What an export is called in the folder of exports."""
        chosen = next(entry for entry in EXPORT_FORMATS if entry.name == output_format)
        return self.exports_dir / default_export_path(run, chosen, chosen.quant(quant)).name

    def names(self) -> list[str]:
        """What there is in the folder of exports, the newest first; no link leads out of it."""
        if not self.exports_dir.is_dir():
            return []
        found = [
            place
            for place in self.exports_dir.iterdir()
            if place.name[0] != "."
            and not place.is_symlink()
            and (place.is_dir() or place.suffix == ".gguf")
        ]
        return [place.name for place in sorted(found, key=lambda place: -place.stat().st_mtime)]

    def start(self, folder: RunFolder, output_format: str, quant: str, overwrite: bool) -> None:
        """Begin an export.

        Raises:
            UserError: If one is under way, or one of that name is there already.
        """
        with self._starting:
            if self._job is not None and self._job.running:
                raise UserError(f"The export of {self._job.run} is not finished yet.")
            output = self.place(folder.name, output_format, quant)
            if output.exists() and not overwrite:
                raise UserError(
                    f"{output.name} is there already. Tick “Replace it”, or delete it first."
                )
            self._stop.clear()
            self._job = ExportJob(folder.name, output_format, quant, output)
            self._thread = threading.Thread(target=self._run, args=(folder, overwrite), daemon=True)
            self._thread.start()

    def stop(self) -> None:
        """End the export under way; nothing of it stays."""
        self._stop.set()

    def wait(self) -> None:
        """Wait for the end of the export under way."""
        if self._thread is not None:
            self._thread.join()

    def _run(self, folder: RunFolder, overwrite: bool) -> None:
        job = self._job
        if job is None:
            raise RuntimeError("an export runs without having been started")
        arguments = (folder, job.format, job.output, job.quant, overwrite)
        try:
            with closing(self._worker.stream(work.export, *arguments)) as stream:
                for kind, value in stream:
                    if self._stop.is_set():
                        raise UserError("Stopped; nothing was kept.")
                    if kind == "result":
                        job = replace(job, report=value, phase="done")
                    else:
                        phase, done, total = value
                        job = replace(job, phase=phase, done=done, total=total)
                    self._job = job
        except UserError as error:
            job = replace(job, error=str(error))
        finally:
            # It holds a whole model, which others may need the memory of.
            self._worker.stop()
            self._job = replace(job, running=False)
