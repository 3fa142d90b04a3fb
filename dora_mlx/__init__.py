"""Fine-tune quantized language models with DoRA on Apple Silicon.

The names below are the public API: the app and other programs use these and nothing else.
They are imported on first use, so that ``import dora_mlx`` and every ``--help`` stay fast.
"""

from importlib import import_module
from typing import Any

from dora_mlx.blas import load_openblas

__version__ = "0.1.0"

# Has to happen before anything imports mlx.core, and this line runs before every module here.
blas_notice: str | None = load_openblas()

_EXPORTS = {
    "EXPORT_FORMATS": "dora_mlx.exporting.formats",
    "ExportReport": "dora_mlx.exporting.report",
    "TrainConfig": "dora_mlx.config",
    "UserError": "dora_mlx.errors",
    "adapters_disabled": "dora_mlx.adapters.attach",
    "default_export_path": "dora_mlx.export",
    "export_run": "dora_mlx.export",
    "export_size": "dora_mlx.export",
    "finetune": "dora_mlx.training.finetune",
    "MemoryPlan": "dora_mlx.training.memory_plan",
    "inspect_run": "dora_mlx.analysis.inspection",
    "list_models": "dora_mlx.registry",
    "load_run": "dora_mlx.adapters.trained",
    "plan_memory": "dora_mlx.training.memory_plan",
    "read_export_report": "dora_mlx.exporting.report",
    "read_events": "dora_mlx.training.events",
    "stream_answer": "dora_mlx.chat",
}

__all__ = ["__version__", "blas_notice", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dora_mlx' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
