"""The commands of the README do what it says."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.S)
COMMANDS = [
    shlex.split(line, comments=True)
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith(("python -m dora_mlx", "dora-mlx"))
]
QUICK = ["--steps", "2", "--steps-per-eval", "2", "--num-layers", "1"]


def run(words):
    """Run a command of the README in this process, made short; returns its exit code."""
    if words[0] == "dora-mlx":
        return import_module("dora_mlx.__main__").main(words[1:])
    verb, flags = words[2], words[3:]
    if verb.endswith(".train") and "--resume" not in flags:
        flags = [*flags, *QUICK]
    if verb.endswith(".compare"):
        flags = [*flags, "--budget", "2steps"]
    if verb.endswith(".chat"):
        flags = ["--prompt", "Hi", *flags, "--max-tokens", "3"]
    return import_module(verb).main(flags)


def test_every_command_works_in_the_order_of_the_readme(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (example,) = [block for language, block in BLOCKS if language == "json"]
    # A single line would all land on one side of the split.
    lines = [example.replace("Hi!", f"Hi number {number}!") for number in range(20)]
    Path("chat.jsonl").write_text("".join(lines))
    assert len(COMMANDS) >= 12
    for words in COMMANDS:
        # Its model cannot be downloaded in a test; the embedded one stands in.
        words = ["starter" if word == "mistral-7b-4bit" else word for word in words]
        words = [word.replace("mistral-7b-4bit", "starter") for word in words]
        assert run(words) == 0, (words, capsys.readouterr().err)


def test_drawn_run_folder_is_what_a_run_leaves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (drawing,) = [block for _, block in BLOCKS if block.startswith("runs/first/")]
    drawn = {line.split()[0].rstrip("/") for line in drawing.splitlines()[1:]}
    assert run(["python", "-m", "dora_mlx.train", "--run", "first"]) == 0
    assert {path.name for path in Path("runs/first").iterdir()} == drawn | {"lock"}


@pytest.mark.parametrize("target", ["demo", "test", "check"])
def test_make_targets_that_are_named_exist(target):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert f"make {target}" in README
    assert re.search(rf"^{target}:", makefile, flags=re.M)


def test_files_that_are_named_exist():
    tree = next(block for _, block in BLOCKS if block.startswith("dora_mlx/"))
    root, folder = Path(__file__).parent.parent, Path()
    for line in tree.splitlines():
        names = line.strip().split("  ")[0].split()
        if not line.startswith(" "):
            folder = root / names[0]
            names = ["."]
        for name in names:
            assert (folder / name).exists(), line
