"""The lock: one holder at a time, whoever dies and however; with real processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import asdict, evolve

from coreai_zoo.build.lock import Holder, exclusive, lock_file
from coreai_zoo.errors import BadInput

HOLD = """
import sys
from pathlib import Path
from coreai_zoo.build.lock import exclusive
with exclusive(Path(sys.argv[1]), "a test"):
    print("held", flush=True)
    sys.stdin.readline()
"""


@contextmanager
def holder(path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds `path` until it reads a line or dies."""
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def end(process: subprocess.Popen[str]) -> None:
    """Let a holder end by itself."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.wait() == 0


def test_a_second_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    with holder(tmp_path / "work") as process:
        refused = subprocess.run(
            [sys.executable, "-c", HOLD, tmp_path / "work"], check=False, capture_output=True, text=True, input="\n"
        )
        assert refused.returncode != 0 and refused.stdout == ""
        message = refused.stderr.strip().splitlines()[-1]
        assert f"work is in use by process {process.pid} (a test, since " in message
        assert "Wait until that has ended, or choose another folder." in message
        end(process)
    with exclusive(tmp_path / "work", "me"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_second_thread_of_the_same_process_is_refused(tmp_path: Path) -> None:
    with (
        exclusive(tmp_path / "work", "the first"),
        pytest.raises(BadInput, match=rf"process {os.getpid()} \(the first"),
        exclusive(tmp_path / "work", "the second"),
    ):
        pass


def test_other_paths_are_free(tmp_path: Path) -> None:
    with exclusive(tmp_path / "a", "a"), exclusive(tmp_path / "b", "b"):
        assert len(list(tmp_path.iterdir())) == 2


def test_a_killed_holder_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path / "work") as process:
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert json.loads(lock_file(tmp_path / "work").read_text())["pid"] == process.pid  # it could not tidy up
        with exclusive(tmp_path / "work", "the heir"):
            assert json.loads(lock_file(tmp_path / "work").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[1]", b"{}", b'{"pid": "x"}', b"[" * 4096, b"9" * 10_000])
def test_a_lock_file_with_any_content_is_no_obstacle_when_nobody_holds_it(tmp_path: Path, content: bytes) -> None:
    lock_file(tmp_path / "work").write_bytes(content)
    with exclusive(tmp_path / "work", "me"):
        assert json.loads(lock_file(tmp_path / "work").read_text())["what"] == "me"


def test_a_lock_file_that_names_a_living_process_is_no_obstacle_when_that_does_not_hold_it(tmp_path: Path) -> None:
    lock_file(tmp_path / "work").write_text(json.dumps(asdict(Holder.this("a pid that was used again"))))
    with exclusive(tmp_path / "work", "me"):
        assert json.loads(lock_file(tmp_path / "work").read_text())["what"] == "me"


def test_a_lock_file_of_another_machine_is_left_to_the_user(tmp_path: Path) -> None:
    other = evolve(Holder.this("a build"), host="elsewhere", boot="another", pid=7)
    file = lock_file(tmp_path / "work")
    file.write_text(json.dumps(asdict(other)))
    with (
        pytest.raises(BadInput, match=rf"process 7 on elsewhere .* delete {file} and try again"),
        exclusive(tmp_path / "work", "me"),
    ):
        pass
    assert json.loads(file.read_text())["pid"] == 7
    # Another container on this machine, and this machine before it was started again, have no secrets from us.
    for known in (evolve(other, host=socket.gethostname()), evolve(other, boot=Holder.this("").boot or "?")):
        if known.may_be_elsewhere:
            continue  # this system has no boot id
        file.write_text(json.dumps(asdict(known)))
        with exclusive(tmp_path / "work", "me"):
            pass


def test_waiting_says_for_whom_and_goes_on_when_that_ends(tmp_path: Path) -> None:
    said: list[str] = []
    with holder(tmp_path / "work") as process:

        def say(line: str) -> None:
            said.append(line)
            threading.Thread(target=end, args=[process]).start()

        with exclusive(tmp_path / "work", "me", wait=True, say=say):
            assert process.wait() == 0
    assert len(said) == 1 and said[0].startswith(f"waiting for process {process.pid} (a test, since ")


RACE = """
import os, sys
from pathlib import Path
from coreai_zoo.errors import BadInput
from coreai_zoo.build.lock import exclusive
path, done, refused = Path(sys.argv[1]), 0, 0
print("ready", flush=True)
sys.stdin.readline()
while done < 50:
    try:
        with exclusive(path, "racing"):
            # Fails when somebody else is inside: it is there only while somebody is.
            inside = os.open(path / "inside", os.O_CREAT | os.O_EXCL)
            count = int((path / "count").read_text())
            (path / "count").write_text(str(count + 1))
            os.close(inside)
            os.unlink(path / "inside")
        done += 1
    except BadInput:
        refused += 1
print(refused)
"""


def test_processes_that_race_are_never_inside_together(tmp_path: Path) -> None:
    path = tmp_path / "work"
    path.mkdir()
    (path / "count").write_text("0")
    command = [sys.executable, "-c", RACE, str(path)]
    racers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    for racer in racers:
        assert racer.stdout is not None and racer.stdout.readline() == "ready\n"
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("\n")
        racer.stdin.flush()
    results = [racer.communicate() for racer in racers]
    assert [errors for _, errors in results] == [""] * 3
    assert sum(int(refusals) for refusals, _ in results) > 0  # else they took turns by chance
    assert (path / "count").read_text() == "150"
    assert list(tmp_path.iterdir()) == [path]


def test_an_exception_inside_releases_it(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "work", "me"):
        raise KeyError
    with exclusive(tmp_path / "work", "me"):
        pass


def test_a_lock_file_that_the_user_deleted_is_not_taken_from_the_next_holder(tmp_path: Path) -> None:
    with exclusive(tmp_path / "work", "the first"):
        lock_file(tmp_path / "work").unlink()
        second = exclusive(tmp_path / "work", "the second")
        second.__enter__()
    assert json.loads(lock_file(tmp_path / "work").read_text())["what"] == "the second"
    second.__exit__(None, None, None)
    assert list(tmp_path.iterdir()) == []


def refused(path: Path, reason: str) -> None:
    with pytest.raises(BadInput, match=rf"cannot be locked: .* \({reason}\)\. Choose a folder that exists"):
        exclusive(path, "me").__enter__()


def test_a_folder_that_is_missing_or_none_is_refused(tmp_path: Path) -> None:
    refused(tmp_path / "missing" / "work", "No such file or directory")
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "work", "Not a directory")


def test_a_lock_file_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("precious")
    lock_file(tmp_path / "work").symlink_to(tmp_path / "precious")
    refused(tmp_path / "work", "Too many levels of symbolic links")
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    """A folder that nobody can write to, root included."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    if os.geteuid():
        yield folder
        return
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", folder], check=False, capture_output=True)
    if mounted.returncode:
        pytest.skip("root needs the right to mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_folder_that_cannot_be_written_to_is_refused(read_only: Path) -> None:
    refused(read_only / "work", "Permission denied|Read-only file system")
