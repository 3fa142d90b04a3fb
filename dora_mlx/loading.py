"""A model folder -> the model and tokenizer that mlx-lm builds from it, checked.

mlx-lm fills what a configuration leaves out with defaults of its own. A RoPE base that is read
wrongly gives a model that runs, answers badly and trains worse, so it is settled here.
"""

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.errors import UserError
from dora_mlx.model_config import Config, read_json, rope_base, rope_parameters, rope_scaling

if TYPE_CHECKING:
    from mlx.nn.layers.base import Module
    from mlx_lm.tokenizer_utils import TokenizerWrapper

# Published configurations of these types leave the base to the class default of Transformers,
# which equals mlx-lm's.
_BASE_LEFT_TO_DEFAULT = {"gemma3_text"}

# Their sliding-window layers take the base but never the scaling.
_SLIDING_UNSCALED = {"olmo3"}

_SAMPLES = 16
_SAMPLE_BYTES = 1 << 16
_LISTED = 8


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to adapt; ``config`` is what it was built from, both RoPE forms settled."""

    model: "Module"
    tokenizer: "TokenizerWrapper"
    config: Config
    path: Path

    @property
    def vocabulary(self) -> int:
        """Number of logits of a position: configurations nest it or leave it to a default."""
        import mlx.core as mx

        logits = self.model(mx.array([[0]]))
        # Adapted layers keep what they computed, which another thread could not compute for them.
        mx.eval(logits)
        return int(logits.shape[-1])


def load_base(
    path: Path, *, lazy: bool = False, tokenizer: "TokenizerWrapper | None" = None
) -> LoadedModel:
    """Load the model in a folder and make sure that all of it arrived.

    On a CPU device every floating parameter, scale and bias becomes float32, exactly: 16-bit
    products are slow there.

    Args:
        path: The folder.
        lazy: Leave every array as it is stored, to be read when it is asked for: what a model
            is made of, for no memory. Such a model is for looking at, not for computing.
        tokenizer: The folder's own, if it is loaded already: a large one takes seconds.

    Raises:
        UserError: If a file is missing, broken or cut short, the architecture is not one of
            mlx-lm's, the RoPE base is unknown, or tensors are missing or left over.
    """
    model, config = load_lazily(path)
    if not lazy:
        _make_ready(model)
    if tokenizer is None:
        tokenizer = _load_tokenizer(path, config)
    return LoadedModel(model, tokenizer, config, path)


def load_lazily(path: Path) -> "tuple[Module, Config]":
    """Only the model of a folder, every array as it is stored, and what it was built from.

    Raises:
        UserError: As ``load_base`` does.
    """
    config = read_json(path / "config.json")
    for file in _weight_files(path):
        _read_header(file)
    arguments, overrides = settled_arguments(config, path)
    _check_arguments(arguments, {**config, **overrides}, path)
    return _build(path, overrides)


def settled_arguments(config: Config, path: Path) -> tuple[type, Config]:
    """mlx-lm's ``ModelArgs`` class for a configuration, and what has to be added to it.

    Raises:
        UserError: If mlx-lm has no such architecture, or the RoPE base is unknown.
    """
    arguments = _arguments_class(config, path)
    return arguments, mlx_lm_overrides(config, arguments, path)


def load_tokenizer(path: Path) -> "TokenizerWrapper":
    """Load only the tokenizer of a model folder, which takes no time and memory for weights.

    Raises:
        UserError: If a file is missing or broken.
    """
    return _load_tokenizer(path, read_json(path / "config.json"))


def fingerprint(path: Path) -> str:
    """SHA-256 that identifies the weights and architecture in a model folder, in hex.

    Covers the bytes of config.json and, for every weight file, its name, size, safetensors
    header (names, types and shapes of the tensors) and 16 blocks of 64 KiB spread evenly over
    its data, the first and the last included. A change of a few bytes between the blocks goes
    unseen; a re-trained, re-quantized or re-shaped model does not. The tokenizer is not covered.
    """
    digest = hashlib.sha256()
    read_json(path / "config.json")
    digest.update((path / "config.json").read_bytes())
    for file in _weight_files(path):
        header, start = _read_header(file)
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size, header], sort_keys=True).encode())
        last = max(start, size - _SAMPLE_BYTES)
        with open(file, "rb") as stream:
            for sample in range(_SAMPLES):
                stream.seek(start + (last - start) * sample // (_SAMPLES - 1))
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _weight_files(path: Path) -> list[Path]:
    # The pattern is mlx-lm's: it loads nothing else.
    files = sorted(path.glob("model*.safetensors"))
    if not files:
        raise UserError(f"{path} is not a model folder: it has no weights (model*.safetensors).")
    return files


def _read_header(file: Path) -> tuple[Config, int]:
    """The header of a safetensors file and where its data begin; the file must be complete."""
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        text = stream.read(length) if length <= size - 8 else b""
    try:
        header: Config = json.loads(text)
        end = max(
            (header[name]["data_offsets"][1] for name in header if name != "__metadata__"),
            default=0,
        )
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{file} is not a readable safetensors file ({size} bytes): copy or download it again."
        ) from error
    start = 8 + length
    if size < start + end:
        raise UserError(
            f"{file} is cut short: {size} of {start + end} bytes. Copy or download it again."
        )
    return header, start


def _arguments_class(config: Config, path: Path) -> type:
    """The mlx-lm ``ModelArgs`` class for a configuration."""
    from mlx_lm.utils import _get_classes

    if "model_type" not in config:
        raise UserError(f"{path / 'config.json'} names no model_type, so it cannot be loaded.")
    if config.get("model_file"):
        raise UserError(
            f"{path} needs its own code ({config['model_file']}), which dora-mlx does not run. "
            "Choose a model that mlx-lm knows."
        )
    try:
        _, arguments = _get_classes(config)
    except ValueError as error:
        raise UserError(
            f"{path}: mlx-lm has no architecture {config['model_type']!r}. "
            "Choose another model, or update mlx-lm (pip install -U mlx-lm)."
        ) from error
    return arguments


def mlx_lm_overrides(config: Config, arguments: type, path: Path) -> Config:
    """What has to be added to a configuration so that mlx-lm builds the model it describes.

    Transformers 5 keeps the RoPE base and scaling under ``rope_parameters`` only, per layer type
    for some models, and renames ``num_experts``; mlx-lm reads the older names.

    Raises:
        UserError: If the model has a RoPE base but the configuration does not say which.
    """
    fields = set(getattr(arguments, "__dataclass_fields__", ()))
    overrides: Config = {}
    if "num_experts" in fields and "num_experts" not in config and "num_local_experts" in config:
        overrides["num_experts"] = config["num_local_experts"]
    inner = config.get("text_config")
    if isinstance(inner, dict) and "rope_theta" not in fields:
        inner_arguments = _inner_arguments_class(inner)
        if inner_arguments is not None:
            found = mlx_lm_overrides(inner, inner_arguments, path)
            overrides["text_config"] = {**inner, **found}
        return overrides
    return overrides | _rope_overrides(config, fields, path)


def _inner_arguments_class(config: Config) -> type | None:
    """The arguments of a language model inside a multimodal one, if it has a module of its own."""
    from mlx_lm.utils import _get_classes

    try:
        return _get_classes(config)[1]
    except (KeyError, ValueError):
        return None


def _rope_overrides(config: Config, fields: set[str], path: Path) -> Config:
    if "rope_theta" not in fields:
        return {}
    where = str(path / "config.json")
    full, sliding = rope_parameters(config)
    theta = rope_base(config, "rope_theta", full, where)
    if theta is None and config["model_type"] not in _BASE_LEFT_TO_DEFAULT:
        raise UserError(
            f"{path / 'config.json'} gives no RoPE base, and a guess would train a broken model: "
            'add "rope_theta" with the value from the configuration of the original model.'
        )
    found = {
        "rope_theta": theta,
        "rope_scaling": rope_scaling(full),
        "partial_rotary_factor": full.get("partial_rotary_factor"),
        "original_max_position_embeddings": full.get("original_max_position_embeddings"),
    }
    if "rope_local_base_freq" in fields:
        found["rope_local_base_freq"] = rope_base(config, "rope_local_base_freq", sliding, where)
    elif sliding and not _can_share(config["model_type"], full, sliding):
        raise UserError(
            f"{path / 'config.json'} gives full and sliding attention different RoPE parameters, "
            f"which mlx-lm's {config['model_type']} cannot express. Choose another model."
        )
    return {
        name: value
        for name, value in found.items()
        if name in fields and value is not None and config.get(name) is None
    }


def _can_share(model_type: str, full: Config, sliding: Config) -> bool:
    """Whether an architecture with one set of RoPE parameters serves both kinds of layer."""
    if full.get("rope_theta") != sliding.get("rope_theta"):
        return False
    unscaled = model_type in _SLIDING_UNSCALED and rope_scaling(sliding) is None
    return unscaled or rope_scaling(full) == rope_scaling(sliding)


def _check_arguments(arguments: Any, config: Config, path: Path) -> None:
    try:
        arguments.from_dict(config)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(
            f"{path / 'config.json'} does not fit mlx-lm's {config['model_type']}: {error}."
        ) from error


def _build(path: Path, overrides: Config) -> tuple[Any, Config]:
    from mlx_lm.utils import _get_classes, load_model

    def checked_classes(config: Config) -> tuple[Any, Any]:
        model_class, arguments = _get_classes(config)

        def build(values: Any) -> Any:
            model = model_class(values)
            _check_on_arrival(model, path)
            return model

        return build, arguments

    try:
        model, config = load_model(
            path, lazy=True, model_config=overrides, get_model_classes=checked_classes
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"mlx-lm cannot load {path}: {_first_line(error)}.") from error
    return model, config


def _make_ready(model: Any) -> None:
    import mlx.core as mx

    from dora_mlx.kernels.blocked_layers import use_blocked_products

    if mx.default_device() == mx.cpu:
        model.set_dtype(mx.float32)
        use_blocked_products(model)
    mx.eval(model.parameters())


def _check_on_arrival(model: Any, path: Path) -> None:
    """Make ``load_weights`` name everything that does not fit, not only the first kind.

    The names are comparable only there, after mlx-lm's renaming and quantizing.
    """
    load_weights = model.load_weights

    def load_checked(weights: list[tuple[str, Any]], strict: bool = True) -> Any:
        del model.load_weights
        problems = "; ".join(_differences(model, dict(weights)))
        if problems:
            raise UserError(f"{path} does not hold the whole model: {problems}.")
        return load_weights(weights, strict=strict)

    model.load_weights = load_checked


def _differences(model: Any, arrived: dict[str, Any]) -> Iterator[str]:
    from mlx.utils import tree_flatten

    expected = dict(tree_flatten(model.parameters()))
    if missing := sorted(expected.keys() - arrived.keys()):
        yield f"missing {_listed(missing)}"
    if unexpected := sorted(arrived.keys() - expected.keys()):
        yield f"unexpected {_listed(unexpected)}"
    wrong = [
        f"{name} {tuple(arrived[name].shape)} for {tuple(expected[name].shape)}"
        for name in sorted(expected.keys() & arrived.keys())
        if arrived[name].shape != expected[name].shape
    ]
    if wrong:
        yield f"wrong shape {_listed(wrong)}"


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"{len(names)} tensors ({', '.join(names[:_LISTED])}{more})"


def _load_tokenizer(path: Path, config: Config) -> "TokenizerWrapper":
    from mlx_lm.utils import load_tokenizer

    if (path / "tokenizer.json").exists():
        read_json(path / "tokenizer.json")
    try:
        return load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"The tokenizer in {path} cannot be loaded ({_first_line(error)}): "
            "copy tokenizer.json and tokenizer_config.json from the original model."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__
