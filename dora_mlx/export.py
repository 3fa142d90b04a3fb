"""``python -m dora_mlx.export``: write a trained model with the adapter merged into its weights."""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dora_mlx.command_line import add_runs_dir_flag, parser_for, run_command
from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder, find_run

if TYPE_CHECKING:
    import mlx.core as mx

    from dora_mlx.exporting.verify import LogitReport
    from dora_mlx.loading import LoadedModel

DESCRIPTION = """\
Write a trained model as plain weights, the adapter merged into them in float32.

  safetensors   a folder in Hugging Face layout, for Transformers, mlx-lm and others
  gguf          one file for llama.cpp, Ollama, LM Studio and others

The result is read back and compared with the adapted model before the command says it is done.
"""

EXAMPLES = """\
examples:
  python -m dora_mlx.export --run demo --format safetensors
  python -m dora_mlx.export --run demo --format gguf --output pirate.gguf
"""

# What --quant accepts for a format; the first is the default.
QUANTS = {"safetensors": ("bf16", "f16"), "gguf": ("f16", "bf16", "f32")}
_SAFETENSORS_DTYPES = {"bf16": "bfloat16", "f16": "float16"}

# Long enough that a wrong rotary frequency or a lost tensor shows in the logits.
_PROBE = "Tell me in a few sentences what you can do, and name three things you like."

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Exported:
    """What was written and how its logits differ from the adapted model's.

    ``logits`` is ``None`` for a GGUF file when llama.cpp is not installed; its tensors were
    compared all the same.
    """

    output: Path
    size: int
    logits: "LogitReport | None"


def export_run(
    folder: RunFolder,
    output_format: str,
    output: Path,
    *,
    quant: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Merge the adapter of a run, write the model and compare it with the adapted one.

    Args:
        folder: The run.
        output_format: ``safetensors`` or ``gguf``.
        output: Folder or file to write; it appears when it is complete.
        quant: ``bf16``, ``f16`` or (GGUF only) ``f32``.
        overwrite: Replace an output that is there.
        progress: Called with bytes written and bytes in all.

    Raises:
        UserError: If this model cannot be exported so, before any work; or the disk is full.
    """
    from dora_mlx.adapters.trained import load_run
    from dora_mlx.exporting.gguf.write import check_gguf_base, write_gguf
    from dora_mlx.exporting.merge import MergedWeights
    from dora_mlx.exporting.safetensors import check_safetensors_base, write_safetensors
    from dora_mlx.exporting.verify import verify_gguf, verify_safetensors
    from dora_mlx.registry import resolve

    quant = _quant_for(output_format, quant)
    if output.exists() and not overwrite:
        raise UserError(f"{output} exists already. Replace it by --overwrite, or name another.")
    base_dir = resolve(folder.read_config()["options"]["model"])
    refuse = check_gguf_base if output_format == "gguf" else check_safetensors_base
    refuse(base_dir)
    base = load_run(folder).base
    weights = MergedWeights(base.model)
    reports: list[LogitReport | None] = []

    def check_gguf(file: Path) -> None:
        reports.append(verify_gguf(file, base.model, base_dir, quant, _probe(base)).logits)

    def check_safetensors(written: Path) -> None:
        reports.append(verify_safetensors(written, base.model, _probe(base)))

    if output_format == "gguf":
        write_gguf(
            weights, base_dir, output, quant, progress, overwrite=overwrite, check=check_gguf
        )
    else:
        write_safetensors(
            weights,
            base_dir,
            output,
            _SAFETENSORS_DTYPES[quant],
            progress,
            overwrite=overwrite,
            check=check_safetensors,
        )
    return Exported(output, _size(output), reports[0])


def main(argv: list[str] | None = None) -> int:
    """Parse the flags and export; returns the exit code."""
    arguments = build_parser().parse_args(argv)
    return run_command(lambda: _export(arguments))


def build_parser() -> argparse.ArgumentParser:
    """The flags of this command."""
    parser = parser_for("export", DESCRIPTION, EXAMPLES)
    parser.add_argument("--run", metavar="NAME", required=True, help="The run to export.")
    add_runs_dir_flag(parser)
    parser.add_argument("--format", required=True, choices=QUANTS, help="What to write.")
    parser.add_argument(
        "--quant",
        metavar="TYPE",
        help="Type of the weights: bf16 (default) or f16 for safetensors; f16 (default), bf16 or "
        "f32 for gguf.",
    )
    parser.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        help="Folder (safetensors) or file (gguf) to write. "
        "Default: exports/RUN-safetensors or exports/RUN-TYPE.gguf.",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="Replace the output if it is there."
    )
    return parser


def _export(arguments: argparse.Namespace) -> int:
    quant = _quant_for(arguments.format, arguments.quant)
    folder = find_run(arguments.run, arguments.runs_dir)
    suffix = "-safetensors" if arguments.format == "safetensors" else f"-{quant}.gguf"
    output = arguments.output or Path("exports") / f"{folder.name}{suffix}"
    with _progress_bar() as progress:
        exported = export_run(
            folder,
            arguments.format,
            output,
            quant=quant,
            overwrite=arguments.overwrite,
            progress=progress,
        )
    print(f"Wrote {exported.output} ({exported.size / 1e6:.1f} MB).")
    if exported.logits is None:
        print(
            "Read back: every tensor equals the merged weight. Its logits were not compared: "
            "install dora-mlx[gguf-verify] to load it in llama.cpp as well."
        )
    else:
        program = "llama.cpp" if arguments.format == "gguf" else "mlx-lm"
        print(
            f"Read back by {program}: largest logit difference to the adapted model "
            f"{exported.logits.max_abs_logit_difference:.2g}, same likeliest token at "
            f"{exported.logits.top1_agreement:.0%} of the positions."
        )
    return 0


def _quant_for(output_format: str, quant: str | None) -> str:
    choices = QUANTS[output_format]
    if quant is None:
        return choices[0]
    if quant not in choices:
        raise UserError(
            f"--quant {quant} is not available for {output_format}; choose {' or '.join(choices)}."
        )
    return quant


def _probe(base: "LoadedModel") -> "mx.array":
    """Token ids ``[1, length]`` of a conversation to compare logits on."""
    import mlx.core as mx

    messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
    return mx.array([base.tokenizer.apply_chat_template(messages)])


def _size(path: Path) -> int:
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


@contextmanager
def _progress_bar() -> Iterator[Progress]:
    from tqdm import tqdm

    bar: tqdm[Any]
    with tqdm(
        unit="B", unit_scale=True, desc="Merging and writing", leave=False, disable=None
    ) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show


if __name__ == "__main__":
    sys.exit(main())
