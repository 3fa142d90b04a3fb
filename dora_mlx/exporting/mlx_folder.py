"""The ``mlx`` format: a folder for mlx-lm, quantized as the base is or in another way."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from dora_mlx.errors import UserError
from dora_mlx.exporting.folder import FolderWriter
from dora_mlx.exporting.formats import BASE_QUANT, DENSE_QUANT, MLX_PACKINGS
from dora_mlx.exporting.merge import Weights
from dora_mlx.exporting.stored import Spec, Stored
from dora_mlx.exporting.writer import ExportSource
from dora_mlx.kernels.frozen_weight import is_quantized


@dataclass(frozen=True)
class Packing:
    """How a weight is quantized: arguments of ``mx.quantize``."""

    group_size: int
    bits: int
    mode: str = "affine"

    @classmethod
    def of(cls, layer: nn.Module) -> "Packing":
        """That of a quantized layer."""
        return cls(layer.group_size, layer.bits, layer.mode)


class MlxWriter(FolderWriter):
    """See ``Writer``."""

    source_format = "mlx"

    def tensors(self, source: ExportSource, quant: str) -> list[Stored]:
        """What the folder holds, in order; computes nothing."""
        packings = _packings(source.base.model, quant)
        types = _types(source.base.model, quant)
        stored = []
        for name in source.weights:
            layer = name.removesuffix(".weight")
            packing = packings.get(layer) if name.endswith(".weight") else None
            if packing is None:
                stored.append(_dense(source.weights, name, types[name]))
            else:
                stored.append(_quantized(source.weights, layer, packing, types[name]))
        return stored

    def config(self, source: ExportSource, quant: str) -> dict[str, Any]:
        """The base's, with what ``quant`` says about quantization."""
        model = source.base.model
        config = {k: v for k, v in source.base.config.items() if not k.startswith("quantization")}
        packings = _packings(model, quant)
        if packings:
            general, _ = Counter(packings.values()).most_common(1)[0]
            own = {path: asdict(p) for path, p in packings.items() if p != general}
            # The second is the name that Transformers knows; mlx-lm writes both.
            config["quantization"] = config["quantization_config"] = {**asdict(general), **own}
        elif quant in MLX_PACKINGS:
            raise UserError(
                f"No layer of this model has a width that {MLX_PACKINGS[quant][0]}, the size of a "
                f"group of --quant {quant}, divides. Choose a smaller group, or --quant none."
            )
        if "torch_dtype" in config and quant != BASE_QUANT:
            config["torch_dtype"] = _name(_half(model))
        return config

    def precision(self, source: ExportSource, quant: str) -> mx.Dtype | None:
        """The type of the weights, ``None`` if they are quantized anew."""
        if _packings(source.base.model, quant):
            return None
        return min(_types(source.base.model, quant).values(), key=lambda dtype: dtype.size)


def _packings(model: nn.Module, quant: str) -> dict[str, Packing]:
    """Path and packing of every layer that is quantized."""
    if quant == DENSE_QUANT:
        return {}
    modules = model.named_modules()
    if quant == BASE_QUANT:
        return {path: Packing.of(layer) for path, layer in modules if is_quantized(layer)}
    general = Packing(*MLX_PACKINGS[quant])
    # Some architectures keep some layers at more bits, or as they are.
    predicate = getattr(model, "quant_predicate", None)
    packings = {}
    for path, layer in modules:
        if not (is_quantized(layer) or hasattr(layer, "to_quantized")):
            continue
        wanted = True if predicate is None else predicate(path, layer)
        packing = Packing(**wanted) if isinstance(wanted, dict) else general
        if wanted and _width(layer) % packing.group_size == 0:
            packings[path] = packing
    return packings


def _width(layer: nn.Module) -> int:
    if is_quantized(layer):
        width: int = layer.scales.shape[-1] * layer.group_size
        return width
    return int(layer.weight.shape[-1])


def _types(model: nn.Module, quant: str) -> dict[str, mx.Dtype]:
    """Type of every tensor, for a quantized weight that of its scales where they are floats.

    As in the base, but a base that is float32 throughout becomes bfloat16 unless it is asked for
    as it is.
    """
    arrays = _arrays(model)
    half = _half(model)
    types = {}
    for name, array in arrays.items():
        scales = arrays.get(f"{name.removesuffix('weight')}scales", array)
        dtype = scales.dtype if mx.issubdtype(scales.dtype, mx.floating) else half
        types[name] = dtype
    if quant != BASE_QUANT and set(types.values()) == {mx.float32}:
        return dict.fromkeys(types, mx.bfloat16)
    return types


def _half(model: nn.Module) -> mx.Dtype:
    """The 16-bit type of the model, bfloat16 if it has none."""
    types = {array.dtype for array in _arrays(model).values()}
    return mx.float16 if mx.float16 in types and mx.bfloat16 not in types else mx.bfloat16


def _arrays(model: nn.Module) -> dict[str, mx.array]:
    return cast(dict[str, mx.array], tree_flatten(model.parameters(), destination={}))


def _name(dtype: mx.Dtype) -> str:
    return str(dtype).removeprefix("mlx.core.")


def _dense(weights: Weights, name: str, dtype: mx.Dtype) -> Stored:
    def chunks() -> Iterator[tuple[str, mx.array]]:
        for block in weights.blocks(name):
            yield name, block

    return Stored({name: Spec(weights.shapes()[name], dtype)}, chunks)


def _quantized(weights: Weights, layer: str, packing: Packing, dtype: mx.Dtype) -> Stored:
    """The parts of a quantized weight: packed words, scales and, for affine, biases."""
    *leading, width = weights.shapes()[f"{layer}.weight"]
    affine = packing.mode == "affine"
    groups = (*leading, width // packing.group_size)
    specs = {
        f"{layer}.weight": Spec((*leading, width * packing.bits // 32), mx.uint32),
        f"{layer}.scales": Spec(groups, dtype if affine else mx.uint8),
    }
    if affine:
        specs[f"{layer}.biases"] = Spec(groups, dtype)

    def chunks() -> Iterator[tuple[str, mx.array]]:
        there = weights.packed(f"{layer}.weight")
        if there is not None and Packing.of(there) == packing and "global_scale" not in there:
            # Untouched by the training, and not rounded a second time.
            for name in specs:
                yield name, there[name.rsplit(".", 1)[1]]
            return
        for block in weights.blocks(f"{layer}.weight"):
            parts = mx.quantize(block, packing.group_size, packing.bits, mode=packing.mode)
            yield from zip(specs, parts, strict=True)

    return Stored(specs, chunks)


WRITER = MlxWriter()
