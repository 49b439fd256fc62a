"""Output directories appear as a whole or not at all."""

import stat
from pathlib import Path

import pytest

from hf_layerfuse import CheckpointError
from hf_layerfuse.pipeline.output import check_output, new_directory


def test_appears_at_the_end(tmp_path):
    """Parents are created, the directory gets its name at the end of the block, and it has normal permissions."""
    target = tmp_path / "a" / "b"
    with new_directory(target) as path:
        (path / "file").write_text("new")
        assert not target.exists()
    assert (target / "file").read_text() == "new"
    plain = tmp_path / "plain"
    plain.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)
    assert list(target.parent.iterdir()) == [target]


def test_replaces_whole_when_asked(tmp_path):
    """With `overwrite`, no file of the old directory survives; an empty directory does not need it."""
    target = tmp_path / "out"
    target.mkdir()
    with new_directory(target) as path:
        (path / "old").write_text("old")
        (path / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--overwrite"), new_directory(target):
        pass
    with new_directory(target, overwrite=True) as path:
        (path / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_leaves_nothing_behind(tmp_path, error):
    """If the block ends early for any reason, the old content stays and the new one is removed."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "results.json").write_text("{}")

    def fail():
        with new_directory(target, overwrite=True) as path:
            (path / "new").write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert [path.name for path in target.iterdir()] == ["results.json"]
    assert list(tmp_path.iterdir()) == [target]


def test_interrupted_between_the_renames(tmp_path, monkeypatch):
    """Ctrl-C between moving the old directory and renaming the new one restores the old one."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "results.json").write_text("old")
    rename = Path.rename

    def interrupt(self, other):
        if self.name.endswith(".partial"):
            raise KeyboardInterrupt
        return rename(self, other)

    def write():
        with new_directory(target, overwrite=True) as path:
            (path / "results.json").write_text("new")

    monkeypatch.setattr(Path, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write()
    assert (target / "results.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_what_is_no_earlier_result_stays(tmp_path, monkeypatch):
    """Other directories, the inputs of the run and the working directory stay even with `overwrite`."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"no results\.json"), new_directory(target, overwrite=True):
        pass
    (target / "results.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"holds the input .*thesis\.txt"):
        check_output(target, True, keep=[None, "a/hub-name", str(target / "thesis.txt")])
    with pytest.raises(CheckpointError, match="holds the input"):
        check_output(tmp_path, True, keep=[str(target)])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="working directory"):
        check_output(".", True)
    with pytest.raises(CheckpointError, match="cannot be written"):
        check_output(target / "thesis.txt" / "x", False)


def test_files_are_refused(tmp_path):
    """A file with the name of the directory is never replaced."""
    (tmp_path / "out").write_text("file")
    with pytest.raises(CheckpointError, match="is a file"), new_directory(tmp_path / "out", overwrite=True):
        pass


def test_what_killed_processes_left_goes(tmp_path):
    """Leftovers of killed processes are removed after success, and only those of the same target."""
    for name in (".out-ab_cd123.partial", ".out-2-abcd1234.partial", ".out-abcd1234.unfinished", ".out-ab12cd34.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("half")
    with new_directory(tmp_path / "out") as path:
        (path / "file").write_text("whole")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"out", ".out-2-abcd1234.partial", ".out-abcd1234.unfinished"}
