"""Files and folders that exist whole or not at all."""

import errno
import os
import pwd
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from rabit_jax.atomic import publish, remove, replacing, workspace, write_tensors, write_text
from rabit_jax.errors import BadInput
from rabit_jax.workspaces import user_cache


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


def test_a_folder_that_is_replaced_is_never_away(tmp_path, monkeypatch):
    """Else a process that ends between two renames would leave neither the old nor the new one."""
    target = tmp_path / "model"
    (target / "old").mkdir(parents=True)
    monkeypatch.setattr(Path, "rename", lambda *_: pytest.fail("the folder is taken away first"))
    with replacing(target) as new:
        new.mkdir()
        write_text(new / "name", "new")
    assert [file.name for file in target.iterdir()] == ["name"]
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("kind", ["folder", "file", "nothing"])
def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path, kind):
    place, link = tmp_path / "disk" / "model", tmp_path / "link"
    if kind == "folder":
        (place / "old").mkdir(parents=True)
    elif kind == "file":
        write_text(place, "old")
    link.symlink_to("disk/model")
    with replacing(link) as new:
        if kind == "folder":
            new.mkdir()
            (new / "name").write_text("new")
        else:
            new.write_text("new")
    assert link.is_symlink() and not place.is_symlink()
    assert (place / "name" if kind == "folder" else place).read_text() == "new"
    assert list(place.parent.iterdir()) == [place] and len(list(tmp_path.iterdir())) == 2


def test_names_may_be_as_long_as_the_disk_takes(tmp_path):
    for name in ("é" * 127, "x" * 255, os.fsdecode(b"\xe9" * 255)):
        write_text(tmp_path / name, "a")
    assert len(list(tmp_path.iterdir())) == 3


def test_a_full_disk_is_told_by_the_name_of_what_was_to_be_written(tmp_path):
    target = tmp_path / "outer"
    with pytest.raises(OSError) as ended, replacing(target) as new:
        new.mkdir()
        with replacing(new / "inner"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert ended.value.filename == str(target)


def test_where_the_users_cache_lies(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert user_cache() == tmp_path / "rabit_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert user_cache() == Path("/home/me/.cache/rabit_jax")


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch):
    """A container that runs under any number has neither HOME nor a line in /etc/passwd."""
    def unknown(number):
        raise KeyError(number)

    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(BadInput, match="set XDG_CACHE_HOME"):
        user_cache()


def test_two_processes_may_make_the_same_folder_at_once(tmp_path, monkeypatch):
    target = tmp_path / "cache"

    def faster(one, other):
        monkeypatch.undo()
        write_text(target / "theirs", "whole")
        os.replace(one, other)

    with replacing(target) as new:
        new.mkdir()
        write_text(new / "ours", "whole")
        monkeypatch.setattr(os, "replace", faster)
    assert [file.name for file in target.iterdir()] == ["ours"]
    assert list(tmp_path.iterdir()) == [target]
