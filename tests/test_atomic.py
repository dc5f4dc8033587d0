"""Files and folders that exist whole or not at all."""

import os
import stat

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rabit_jax.atomic import publish, remove, replacing, workspace, write_tensors, write_text


def test_a_block_that_raises_leaves_the_old_content_and_nothing_else(tmp_path):
    target = tmp_path / "state"
    write_text(target, "old")
    with pytest.raises(KeyboardInterrupt):
        with replacing(target) as new:
            new.write_text("half of the n")
            raise KeyboardInterrupt
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_takes_the_place_of_a_folder(tmp_path):
    target = tmp_path / "deep" / "model"
    for names in (("a", "b"), ("c",)):
        with replacing(target) as new:
            new.mkdir()
            for name in names:
                write_text(new / name, name)
    assert [file.name for file in target.iterdir()] == ["c"]
    assert list(target.parent.iterdir()) == [target]


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        write_text(tmp_path / "text", "a")
        write_tensors(tmp_path / "tensors", {"w": np.arange(3.0)}, {"format": "pt"})
        with replacing(tmp_path / "folder") as new:
            new.mkdir()
    finally:
        os.umask(old)
    modes = {f.name: stat.S_IMODE(f.stat().st_mode) for f in tmp_path.iterdir()}
    assert modes == {"text": 0o640, "tensors": 0o640, "folder": 0o750}
    np.testing.assert_array_equal(load_file(tmp_path / "tensors")["w"], [0, 1, 2])


def test_what_was_not_published_goes_with_its_workspace(tmp_path):
    with workspace(tmp_path / "tokens") as place:
        for name in ("kept", "left"):
            (place / name).write_text(name)
        publish(place / "kept", tmp_path / "named-later")
    assert [file.name for file in tmp_path.iterdir()] == ["named-later"]


def test_remove_takes_a_link_and_not_what_it_points_to(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "link").symlink_to(folder)
    remove(tmp_path / "link")
    assert folder.is_dir()
    remove(folder)
    remove(folder)
    assert not any(tmp_path.iterdir())


def test_the_same_tensors_and_texts_give_the_same_bytes_whatever_the_order(tmp_path):
    tensors = {f"layer.{n}.ü": np.arange(n + 1.0) for n in range(20)}
    texts = {f"text {n}": '{"a": "é\\n"}' * n for n in range(20)}
    for name, order in (("one", 1), ("other", -1)):
        write_tensors(tmp_path / name, dict(list(tensors.items())[::order]),
                      dict(list(texts.items())[::order]))
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    with safe_open(tmp_path / "one", "numpy") as file:
        assert file.metadata() == texts
    found = load_file(tmp_path / "one")
    assert set(found) == set(tensors)
    assert all((found[name] == tensors[name]).all() for name in tensors)


def test_content_is_on_the_disk_before_its_name_is(tmp_path, monkeypatch):
    """What a machine that loses its power leaves behind: the old file or the new one."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (
        events.append(os.readlink(f"/proc/self/fd/{fd}")), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("named"), replace(a, b)))
    write_text(tmp_path / "state", "new")
    assert [event.rpartition("/")[2] for event in events] == ["new", "named", tmp_path.name]
    events.clear()
    with replacing(tmp_path / "folder") as new:
        (new / "deep").mkdir(parents=True)
        (new / "deep" / "file").write_text("a")
    last = events.index("named")
    assert {event.rpartition("/")[2] for event in events[:last]} >= {"file", "deep", "new"}
