"""A file appears whole, or stays as it was."""

import stat
from pathlib import Path

import pytest

from hf_layerfuse.evaluation.whole_file import write_whole


def test_files_are_written_whole(tmp_path, monkeypatch):
    """A written file has normal permissions. If writing fails, the earlier file stays and nothing else is left."""
    plain, target = tmp_path / "plain", tmp_path / "page"
    plain.touch()
    write_whole(target, "old")
    assert stat.S_IMODE(target.stat().st_mode) == stat.S_IMODE(plain.stat().st_mode)

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="disk full"):
        write_whole(target, "new")
    assert target.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == [target, plain]
