"""Files in the cache: whole or not there, and imported only from where nobody else may write."""

from __future__ import annotations

from pathlib import Path

import pytest

from tilewright.ir.program import CacheError
from tilewright.runtime.files import require_private, write_atomically
from tilewright.runtime.kernel_modules import load_launchers, write_module

TEXT = "LAUNCH = {}\nSTORED_DIMS = ()\n"


def test_a_file_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file"
    write_atomically(path, "first")
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "second \ud800")
    assert path.read_text() == "first"
    assert list(path.parent.iterdir()) == [path]
    write_atomically(path, "second")
    assert path.read_text() == "second"


def test_new_folders_are_private(tmp_path: Path) -> None:
    write_atomically(tmp_path / "new" / "file", "x")
    require_private(tmp_path / "new")
    require_private(tmp_path / "new" / "file")
    (tmp_path / "new").chmod(0o770)
    with pytest.raises(CacheError, match="not yours alone"):
        require_private(tmp_path / "new")


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o702])
def test_modules_are_not_imported_from_a_folder_of_others(tmp_path: Path, mode: int) -> None:
    folder = tmp_path / "triton"
    kept = write_module(folder, TEXT)
    assert kept.parent == folder
    folder.chmod(mode)
    with pytest.warns(UserWarning, match="not yours alone.*TILEWRIGHT_CACHE"):
        path = write_module(folder, TEXT)
    assert path.parent != folder
    require_private(path.parent)
    assert load_launchers(path).of == {}


def test_modules_that_others_may_write_are_not_imported(tmp_path: Path) -> None:
    kept = write_module(tmp_path / "triton", TEXT)
    kept.chmod(0o666)
    with pytest.warns(UserWarning, match="not yours alone"):
        assert write_module(tmp_path / "triton", TEXT) != kept
