"""Where a run came from: the checkout and the data, as its manifest names them."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, Image, List

from rlsd_lib.runs import provenance


def _rows(keys: list[str], picture: bytes) -> Dataset:
    images = [[{"bytes": picture, "path": None}] for _ in keys]
    rows = Dataset.from_dict({"prompt": ["1+1?"] * len(keys), "images": images, "key": keys})
    return rows.cast_column("images", List(Image()))


def test_a_key_stands_for_the_images_of_a_row_and_none_is_decoded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("an image was decoded")

    monkeypatch.setattr(Image, "decode_example", refuse)
    rows = _rows(["a", "b"], b"one")
    assert provenance.fingerprint(rows) == provenance.fingerprint(_rows(["a", "b"], b"two"))
    assert provenance.fingerprint(rows) != provenance.fingerprint(_rows(["a", "c"], b"one"))
    with pytest.raises(ValueError, match="'images' holds images, and there is no column 'key'"):
        provenance.fingerprint(rows.remove_columns("key"))
    # Rows of text count as ever, and so does an image column with nothing in it.
    texts = {"prompt": ["1+1?"], "images": [[]], "key": ["k"]}
    empty = Dataset.from_dict(texts).cast_column("images", List(Image()))
    assert provenance.fingerprint(empty) == provenance.fingerprint(Dataset.from_dict(texts))


def test_the_git_state_says_dirty_for_a_new_module_and_takes_no_lock(tmp_path: Path) -> None:
    def git(*words: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True)

    assert provenance.git_state(tmp_path) == {"commit": None, "dirty": None}
    (tmp_path / "pyproject.toml").write_text("")
    git("init")
    git("add", "pyproject.toml")
    git("commit", "-m", "one")
    # The same content at another time: a status would refresh the index, and a run that is killed
    # while it has the index lock would block its user's next commit.
    os.utime(tmp_path / "pyproject.toml", (1, 1))
    index = (tmp_path / ".git" / "index").read_bytes()
    assert provenance.git_state(tmp_path)["dirty"] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index
    (tmp_path / "rlsd_lib").mkdir()
    (tmp_path / "rlsd_lib" / "new.py").write_text("x = 1")
    assert provenance.git_state(tmp_path)["dirty"] is True
