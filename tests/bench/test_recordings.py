"""Recordings are read from clones, without a class being looked up."""

import pickle
import subprocess

import pytest

from bench import recordings


def entry(action, addr, size):
    return {"action": action, "addr": addr, "size": size, "stream": 0, "frames": [{"name": "getNewWorkspace"}] if size == 512 else []}


SNAPSHOT = {"segments": [], "device_traces": [[entry("segment_alloc", 4096, 2 << 20), entry("alloc", 4096, 512), entry("alloc", 8192, 512)]]}


@pytest.fixture
def clone(tmp_path):
    path = tmp_path / "owner" / "name"
    path.mkdir(parents=True)
    (path / "snapshot.pickle").write_bytes(pickle.dumps(SNAPSHOT))

    def git(*words):
        return subprocess.run(["git", "-C", str(path), *words], check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    git("add", ".")
    git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "one")
    return tmp_path, git("rev-parse", "HEAD")


def test_a_clone_that_is_there_is_read_and_replayed(clone):
    clones, commit = clone
    path = recordings.clone_of("owner/name", clones)
    row = recordings.replayed(recordings._git(path, "cat-file", "blob", f"{commit}:snapshot.pickle"))
    assert (row["num_requests"], row["num_placed_alike"]) == (2, 1)  # 512 bytes further on, the card would have served the second one
    assert row["recorded_peak_reserved_bytes"] == row["simulated_peak_reserved_bytes"] == 2 << 20
    assert row["recorded_peak_allocated_bytes"] is None  # not to be told where requests were served elsewhere
    assert row["workspaces_bytes"] == [512, 512]


def test_what_is_not_there_is_cloned_without_its_files_which_come_when_asked_for(clone, tmp_path_factory, monkeypatch):
    origin, commit = clone
    subprocess.run(["git", "-C", str(origin / "owner" / "name"), "config", "uploadpack.allowFilter", "true"], check=True)
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", f"url.file://{origin}/.insteadOf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "https://github.com/")
    path = recordings.clone_of("owner/name", tmp_path_factory.mktemp("clones"))
    missing = recordings._git(path, "rev-list", "--objects", "--missing=print", commit).decode()
    assert "?" in missing
    content = recordings._git(path, "cat-file", "blob", f"{commit}:snapshot.pickle")
    assert recordings.replayed(content)["num_requests"] == 2


def test_a_pickle_that_looks_up_a_class_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="no business with builtins.print"):
        recordings.replayed(pickle.dumps(print))


def test_what_git_cannot_do_is_told(tmp_path, monkeypatch, capsys):
    (tmp_path / "Wedsonlin" / "assignment2-systems").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["recordings", "--clones", str(tmp_path)])
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: name)
    assert recordings.main() == 6 and "cat-file" in capsys.readouterr().err


def test_what_the_traced_program_needs_is_told(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["recordings"])
    monkeypatch.setattr(recordings.importlib.util, "find_spec", lambda name: None)
    assert recordings.main() == 2 and "pip install einops einx jaxtyping" in capsys.readouterr().err
