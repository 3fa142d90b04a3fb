"""Rules about the code itself: which part may import which, and that every option is used."""

import ast
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from dora_mlx.__main__ import VERBS
from dora_mlx.config import TrainConfig

PACKAGE = Path(__file__).parent.parent / "dora_mlx"

# A module may import from its own layer and from those above it, never from one below.
LAYERS = [
    ("errors", "blas", "atomic", "config", "model_config", "sampling"),
    ("registry", "run_folder", "command_line"),
    ("kernels",),
    ("layers", "loading", "skeleton"),
    ("adapters", "data"),
    ("training", "exporting", "chat_model", "server"),
    ("analysis", "comparing", "readers"),
    ("inspect_command", *VERBS),
    ("__main__",),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
# Siblings that share a layer and still may not know each other.
SEPARATE = [{"adapters", "data"}, {"training", "exporting"}]
ONLY_IN_COMMANDS = {"tqdm", "rich", "gradio"}


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"))


def part_of(dotted):
    """``dora_mlx.layers.dora`` -> ``layers``; the package itself -> ``None``."""
    parts = dotted.split(".")
    return parts[1] if len(parts) > 1 else None


def imports(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def test_every_part_has_a_layer():
    parts = {path.relative_to(PACKAGE).parts[0].removesuffix(".py") for path, _ in modules()}
    assert parts - {"__init__"} == set(RANK)


def test_imports_never_point_back():
    wrong = []
    for path, tree in modules():
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        for name in imports(tree):
            if not name.startswith("dora_mlx."):
                continue
            other = part_of(name)
            if RANK[other] > RANK[part] or {part, other} in SEPARATE:
                wrong.append(f"{path.name} imports {name}")
    assert not wrong


def test_library_never_imports_the_app_or_draws():
    commands = VERBS.keys() - {"inspect"} | {"inspect_command"}
    for path, tree in modules():
        names = {name.split(".")[0] for name in imports(tree)}
        assert "app" not in names, path
        if path.stem not in commands | {"progress_bar"}:
            assert not names & ONLY_IN_COMMANDS, path


def test_app_uses_the_public_api_only():
    import dora_mlx

    for path in sorted((PACKAGE.parent / "app").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not [name for name in imports(tree) if name.startswith("dora_mlx.")], path
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "dora_mlx":
                assert {alias.name for alias in node.names} <= set(dora_mlx.__all__), path


@pytest.mark.parametrize("option", [field.name for field in dataclasses.fields(TrainConfig)])
def test_every_option_is_read_and_explained(option):
    # An option that is accepted and ignored is the commonest bug of training programs.
    readers = [
        path
        for path, tree in modules()
        if path.name not in ("config.py", "command_line.py")
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr == option
    ]
    assert readers, option
    field = TrainConfig.__dataclass_fields__[option]
    assert field.metadata["help"].endswith((".", ")"))


def test_public_names_exist_and_import_lazily():
    code = (
        "import sys, dora_mlx\n"
        "assert 'mlx.core' not in sys.modules, 'importing dora_mlx imports MLX'\n"
        "for name in dora_mlx.__all__: getattr(dora_mlx, name)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("verb", VERBS)
def test_help_needs_no_heavy_import(verb):
    # What makes help slow is what it imports: MLX, transformers and the like take seconds.
    code = (
        f"import sys\nfrom dora_mlx.{verb} import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert not end.code\n"
        "heavy = {'mlx', 'mlx_lm', 'transformers', 'numpy', 'huggingface_hub', 'gguf', 'tqdm'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "usage:" in result.stdout


def test_no_file_of_the_package_is_over_400_lines():
    long = {p.name: n for p, _ in modules() if (n := len(p.read_text().splitlines())) > 400}
    assert not long
