"""Short runs of the starter, and what is left of them."""

import mlx.core as mx

from dora_mlx.config import TrainConfig
from dora_mlx.training.events import read_events


def quick(chat_file, **options):
    """Options of a run of a few steps on two layers of the starter."""
    defaults = {
        "data": str(chat_file),
        "steps": 4,
        "batch_size": 4,
        "num_layers": 2,
        "steps_per_eval": 2,
        "steps_per_save": 1,
        "learning_rate": 1e-3,
    }
    return TrainConfig(**{**defaults, **options})


def losses(folder):
    return [e["loss"] for e in read_events(folder.path) if e["event"] == "step"]


def final_arrays(folder):
    """Adapter and optimizer of the last checkpoint."""
    newest = folder.adapter_dir("last")
    adapter, optimizer = (
        mx.load(str(newest / f"{name}.safetensors")) for name in ("adapters", "optimizer")
    )
    return adapter | {f"optimizer.{name}": array for name, array in optimizer.items()}


def same_arrays(one, other):
    return one.keys() == other.keys() and all(mx.array_equal(one[k], other[k]) for k in one)


class StopAfter:
    """Asks to stop once ``steps`` steps were asked for."""

    def __init__(self, steps):
        self.left = steps

    def __call__(self):
        self.left -= 1
        return self.left < 0
