"""Exports are complete or not there, and say why not."""

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from exporting_models import (
    STARTER,
    make_base,
    some_tokens,
    verify_gguf,
    verify_safetensors,
    write_safetensors,
)

from dora_mlx.errors import UserError
from dora_mlx.exporting import staging
from dora_mlx.exporting.gguf import write_gguf
from dora_mlx.exporting.logits import VerificationError
from dora_mlx.exporting.merge import MergedWeights
from dora_mlx.exporting.staging import staged_file, staged_folder

WRITERS = [write_safetensors, write_gguf]


@pytest.fixture
def base(tmp_path):
    return tmp_path / "base"


@pytest.fixture
def weights(base):
    return MergedWeights(make_base(base))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("write", WRITERS)
def test_missing_parents_are_created(write, weights, base, tmp_path):
    write(weights, base, tmp_path / "a" / "b" / "model")
    assert names(tmp_path / "a" / "b") == {"model"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interruption_leaves_nothing(write, error, weights, base, tmp_path):
    def interrupt(done, total):
        if done > total / 2:
            # The half-written output exists by now, under another name.
            assert len(names(tmp_path)) == 2
            raise error

    with pytest.raises(error):
        write(weights, base, tmp_path / "model", progress=interrupt)
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, "filled up.*Free some space"),
        (errno.EDQUOT, "filled up.*Free some space"),
        (errno.EROFS, "cannot be opened or written: .*belongs to you"),
    ],
)
def test_errors_of_the_disk_become_sentences(write, code, message, weights, base, tmp_path):
    def fail(done, total):
        if done:
            raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=message):
        write(weights, base, tmp_path / "model", progress=fail)
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("write", WRITERS)
def test_a_disk_that_fills_up_while_writing(write, weights, base, tmp_path):
    # A limit on file sizes is the full disk that needs no privileges: write() really fails.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
    try:
        with pytest.raises(UserError, match=r"filled up while .*model was written"):
            write(weights, base, tmp_path / "model")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("write", WRITERS)
def test_too_little_space_is_said_before_any_work(write, weights, base, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=123_456)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(MergedWeights, "__getitem__", lambda self, name: pytest.fail("computed"))
    with pytest.raises(UserError, match=r"needs 1\.\d MB and its disk has 123 kB free"):
        write(weights, base, tmp_path / "model")
    assert names(tmp_path) == {"base"}


@pytest.mark.parametrize("write", WRITERS)
def test_an_existing_target_is_replaced_only_when_allowed(write, weights, base, tmp_path):
    target = tmp_path / "model"
    write(weights, base, target)
    old = target.stat().st_ino
    with pytest.raises(UserError, match=r"exists already. Choose another name, or add --overwrite"):
        write(weights, base, target)

    def interrupt(done, total):
        if done == total:
            raise KeyboardInterrupt

    # Not before the end: the old export survives an interrupted replacement.
    with pytest.raises(KeyboardInterrupt):
        write(weights, base, target, progress=interrupt, overwrite=True)
    assert target.stat().st_ino == old
    write(weights, base, target, overwrite=True)
    assert target.stat().st_ino != old
    assert names(tmp_path) == {"base", "model"}


def test_an_output_that_fails_its_check_never_gets_its_name(base, tmp_path):
    # With overwriting allowed, the old export has to survive a new one that is wrong.
    model = make_base(base)
    verify = {
        write_safetensors: lambda path: verify_safetensors(path, model, some_tokens()),
        write_gguf: lambda path: verify_gguf(path, model, base, "f16", some_tokens()),
    }
    for write in WRITERS:
        target = tmp_path / write.__name__
        write(MergedWeights(model), base, target, check=verify[write])
        old = target.stat().st_ino
        weights = MergedWeights(make_base(tmp_path / "other", seed=1))
        with pytest.raises(VerificationError, match="does not hold the merged weights"):
            write(weights, base, target, check=verify[write], overwrite=True)
        assert target.stat().st_ino == old
    assert names(tmp_path) == {"base", "other", "write_safetensors", "write_gguf"}


@pytest.mark.parametrize("stage", [staged_file, staged_folder])
def test_a_folder_that_may_not_be_written(stage):
    place = Path(tempfile.mkdtemp(dir="/tmp"))
    place.chmod(0o555)
    user = os.geteuid()
    if user == 0:
        # Root may write anywhere; the permissions apply to everyone else.
        os.seteuid(65534)
    try:
        for target in (place / "model", place / "missing" / "model"):
            with (
                pytest.raises(UserError, match="cannot be opened or written: Permission denied"),
                stage(target, 10),
            ):
                pytest.fail("the block must not run")
    finally:
        os.seteuid(user)
        place.chmod(0o755)
        shutil.rmtree(place)


def test_a_target_that_appears_in_the_meantime_is_kept(tmp_path):
    target = tmp_path / "model"
    for stage in (staged_file, staged_folder):
        with pytest.raises(UserError, match="exists already"), stage(target, 10):
            shutil.copytree(STARTER, target)
        assert names(tmp_path) == {"model"}
        shutil.rmtree(target)


def test_everything_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    # A crash after the rename must not leave a complete name on incomplete data.
    flushed = []
    monkeypatch.setattr(
        staging, "flush_to_disk", lambda path: flushed.append((path.name, names(tmp_path)))
    )
    with staged_folder(tmp_path / "model", 10) as folder:
        (folder / "config.json").write_text("{}")
    partial = f".model.partial-{os.getpid()}"
    assert flushed == [
        ("config.json", {partial}),
        (partial, {partial}),
        (tmp_path.name, {"model"}),
    ]


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "model", tmp_path / "file" / "a" / "model"):
        with pytest.raises(UserError, match="cannot be written"), staged_file(target, 10):
            pytest.fail("the block must not run")


def test_only_a_model_folder_is_replaced(tmp_path):
    # ``--output ~/Documents`` with overwriting allowed must not cost anyone their documents.
    documents = tmp_path / "documents"
    documents.mkdir()
    (documents / "letter.txt").write_text("dear")
    with (
        pytest.raises(UserError, match="something other than a model"),
        staged_folder(documents, 10, overwrite=True),
    ):
        pytest.fail("the block must not run")
    with (
        pytest.raises(UserError, match="is a folder and will not be replaced"),
        staged_file(documents, 10, overwrite=True),
    ):
        pytest.fail("the block must not run")
    assert (documents / "letter.txt").read_text() == "dear"


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    rename = os.rename

    def fail_for_the_new_one(source, destination):
        if ".partial-" in str(source):
            raise KeyboardInterrupt
        rename(source, destination)

    monkeypatch.setattr(os, "rename", fail_for_the_new_one)
    with pytest.raises(KeyboardInterrupt), staged_folder(target, 10, overwrite=True) as folder:
        (folder / "config.json").write_text("new")
    assert (target / "config.json").read_text() == "old"
    assert names(tmp_path) == {"model"}


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    left = tmp_path / f".model.partial-{dead}"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"x" * 100)
    # Process 1 always runs: an export that is still at work keeps its files.
    running = tmp_path / ".model.partial-1"
    running.touch()
    with staged_file(tmp_path / "model", 10) as partial:
        partial.write_text("done")
    assert names(tmp_path) == {"model", ".model.partial-1"}
