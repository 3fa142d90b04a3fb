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
    "ChatModel": "dora_mlx.chat_model",
    "DataLook": "dora_mlx.data.overview",
    "DataOverview": "dora_mlx.data.overview",
    "EXPORT_FORMATS": "dora_mlx.exporting.formats",
    "HeldOutQuestion": "dora_mlx.data.held_out",
    "EventReader": "dora_mlx.training.events",
    "ExportReport": "dora_mlx.exporting.report",
    "Machine": "dora_mlx.training.memory_plan",
    "MemoryPlan": "dora_mlx.training.memory_figures",
    "RunFolder": "dora_mlx.run_folder",
    "RunSummary": "dora_mlx.training.history",
    "Sampling": "dora_mlx.sampling",
    "TokenSpan": "dora_mlx.data.overview",
    "TrainConfig": "dora_mlx.config",
    "UserError": "dora_mlx.errors",
    "adapters_disabled": "dora_mlx.adapters.attach",
    "cached_models": "dora_mlx.registry",
    "checkpoint_steps": "dora_mlx.training.checkpoints",
    "default_export_path": "dora_mlx.export",
    "delete_run": "dora_mlx.training.history",
    "export_run": "dora_mlx.export",
    "export_size": "dora_mlx.export",
    "find_run": "dora_mlx.run_folder",
    "finetune": "dora_mlx.training.finetune",
    "fit_to_memory": "dora_mlx.training.memory_plan",
    "held_out_questions": "dora_mlx.data.held_out",
    "inspect_run": "dora_mlx.analysis.inspection",
    "list_models": "dora_mlx.registry",
    "list_runs": "dora_mlx.training.history",
    "load_run": "dora_mlx.adapters.trained",
    "lock_holder": "dora_mlx.run_folder",
    "new_run": "dora_mlx.run_folder",
    "plain_type": "dora_mlx.config",
    "plan_memory": "dora_mlx.training.memory_plan",
    "read_events": "dora_mlx.training.events",
    "read_export_report": "dora_mlx.exporting.report",
    "rename_run": "dora_mlx.training.history",
    "run_command": "dora_mlx.command_line",
    "summarize_run": "dora_mlx.training.history",
    "train_command": "dora_mlx.command_line",
}

__all__ = ["__version__", "blas_notice", *sorted(_EXPORTS)]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'dora_mlx' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
