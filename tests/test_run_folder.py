"""Run folders appear whole or not at all, whenever their maker is killed."""

import pytest

from dora_mlx.errors import UserError
from dora_mlx.run_folder import RunFolder, find_run


def a_run(path):
    path.mkdir(parents=True)
    (path / "config.json").write_text("{}")
    return path


def abandoned(path):
    """As a process leaves it that was killed while it read data or loaded the model."""
    path.mkdir(parents=True)
    (path / "lock").write_text("999999999")


def test_a_run_that_was_being_replaced_is_there_again(tmp_path):
    a_run(tmp_path / ".zz.replaced")
    abandoned(tmp_path / "zz")
    assert find_run("zz", tmp_path).read_config() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["zz"]


def test_the_name_of_an_abandoned_run_is_free(tmp_path):
    abandoned(tmp_path / "zz")
    with pytest.raises(UserError, match="There is no run 'zz'"):
        find_run("zz", tmp_path)
    abandoned(tmp_path / "other")
    folder = RunFolder(tmp_path / "other")
    with folder.creating(overwrite=False):
        folder.write_config({"options": {}})
    assert folder.read_config() == {"options": {}}


@pytest.mark.parametrize("lock", [None, ""])
def test_a_folder_that_is_being_made_this_moment_is_left_alone(tmp_path, lock):
    (tmp_path / "zz").mkdir()
    if lock is not None:
        (tmp_path / "zz" / "lock").write_text(lock)
    with pytest.raises(UserError, match="There is no run 'zz'"):
        find_run("zz", tmp_path)
    assert (tmp_path / "zz").is_dir()


def test_a_run_in_preparation_is_nobody_elses(tmp_path):
    folder = RunFolder(tmp_path / "zz")
    with folder.creating(overwrite=False):
        for other in (False, True):
            with (
                pytest.raises(UserError, match=r"exists already|is being trained"),
                RunFolder(tmp_path / "zz").creating(overwrite=other),
            ):
                pass
        folder.write_config({})
    assert folder.read_config() == {}


def test_what_a_failed_run_was_to_replace_is_back(tmp_path):
    a_run(tmp_path / "zz")
    folder = RunFolder(tmp_path / "zz")
    with pytest.raises(ZeroDivisionError), folder.creating(overwrite=True):
        raise ZeroDivisionError
    assert folder.read_config() == {}
    assert [path.name for path in tmp_path.iterdir()] == ["zz"]


def test_a_folder_of_other_things_is_left_alone(tmp_path):
    (tmp_path / "zz").mkdir()
    (tmp_path / "zz" / "notes.txt").write_text("mine")
    with (
        pytest.raises(UserError, match="exists already"),
        RunFolder(tmp_path / "zz").creating(overwrite=False),
    ):
        pass
    with pytest.raises(UserError, match="There are none"):
        find_run("zz", tmp_path)
    assert (tmp_path / "zz" / "notes.txt").read_text() == "mine"


def test_runs_that_are_being_replaced_are_not_offered(tmp_path):
    a_run(tmp_path / ".old.replaced")
    a_run(tmp_path / "good")
    with pytest.raises(UserError, match=r"The newest there are: good\.$"):
        find_run("zz", tmp_path)
