"""Commands in processes of their own that need not import anything: forked by a program that has imported it all.

A fresh `zoo` imports torch, the toolchain and transformers, and exports the composites of its first trace: some twelve
seconds of each command that builds or gates. Most tests that start a process want its working directory, environment,
signals or end for themselves and not its start. For those this file is run as a program, once in a run of the tests: it
imports and traces, and forks for each of them. What is about the start itself stays with `subprocess`: which
modules are imported when, seeds of hashes, the number of threads, the installed console script.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import importlib
import io
import json
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

ZOO = "coreai_zoo.__main__:main"
"""What a run calls unless it says otherwise: what `python -m coreai_zoo` does."""

# Read once in a process, by Python or what it imports: such a variable cannot be given to a fork.
_READ_AT_START = ("PYTHONHASHSEED", "OMP_NUM_THREADS", "HF_HOME", "HF_HUB_OFFLINE", "HF_ENDPOINT")

PLACE = "ZOO_TESTS_FORKS"
"""The variable that names the socket of the program that forks for all processes of one run of the tests."""

_starting = threading.Lock()


def run(
    *arguments: object,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float | None = None,
    call: str = ZOO,
    before: str | None = None,
) -> subprocess.CompletedProcess[str]:
    """`zoo` with these arguments, as by `subprocess.run(..., capture_output=True, text=True)`; see `Process`."""
    with Process(*arguments, cwd=cwd, env=env, call=call, before=before) as process:
        stdout, stderr = process.communicate(timeout)
    return subprocess.CompletedProcess(list(map(str, arguments)), process.status, stdout, stderr)


class Process:
    """A running fork; a context manager, which ends it.

    Args:
        arguments: in `sys.argv`, behind "zoo".
        cwd: the working directory, this process's unless given.
        env: all of the environment, this process's unless given.
        stdout: a descriptor that takes it; otherwise `communicate` returns it.
        stderr: the same.
        call: `module:function` that is called, without arguments.
        before: another one that is called first of all, as a `preexec_fn` is.

    Attributes:
        pid: of the fork.
        returncode: None while it runs.
    """

    def __init__(
        self,
        *arguments: object,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        call: str = ZOO,
        before: str | None = None,
    ) -> None:
        environment = dict(os.environ if env is None else env)
        job = {
            "arguments": list(map(str, arguments)),
            "cwd": os.fspath(cwd or Path.cwd()),
            "environment": environment,
            "call": call,
            "before": before,
        }
        self.returncode: int | None = None
        self._files = contextlib.ExitStack()
        self._out = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # entered
        self._err = self._files.enter_context(tempfile.TemporaryFile())  # noqa: SIM115  # entered
        self._answers, theirs = socket.socketpair()
        self._files.enter_context(self._answers)
        with theirs, Path(os.devnull).open("rb") as nothing:
            outputs = [
                self._out.fileno() if stdout is None else stdout,
                self._err.fileno() if stderr is None else stderr,
            ]
            with _starting:
                parent = _parent()
            parent.fork([theirs.fileno(), nothing.fileno(), *outputs], environment)
        self._lines = self._files.enter_context(self._answers.makefile("rb"))
        pid = b""
        with contextlib.suppress(ConnectionError):
            self._answers.sendall(json.dumps(job).encode() + b"\n")
            pid = self._lines.readline()
        assert pid, parent.log()
        self.pid = int(pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: object, _trace: TracebackType | None) -> None:
        if self.poll() is None:
            self.kill()
            self.wait()
        self._files.close()

    @property
    def status(self) -> int:
        """Its exit code, minus the signal if one ended it."""
        assert self.returncode is not None, "it is not known to have ended"
        return self.returncode

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code, once it has ended.

        Raises:
            subprocess.TimeoutExpired: when that takes longer than `timeout` seconds.
        """
        if self.returncode is None:
            waiting = select.poll()  # `select` takes no descriptor above 1,023, and tests open many
            waiting.register(self._answers, select.POLLIN)
            if not waiting.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("zoo", timeout or 0.0)
            self.returncode = int(self._lines.readline())
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Its stdout and stderr, once it has ended. Raises as `wait`."""
        self.wait(timeout)
        texts = []
        for file in (self._out, self._err):
            file.seek(0)
            texts.append(file.read().decode())
        return texts[0], texts[1]

    def send_signal(self, number: int) -> None:
        """Send it a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill it."""
        self.send_signal(signal.SIGKILL)


class _Parent:
    """The connection of one process of the tests to the program that forks.

    All of a run share one, which is started by whoever needs it first and ends with the last that is connected.
    """

    def __init__(self) -> None:
        # The seed is the same in every run of the tests, and of no fresh process but one that is given it.
        self._environment = {"PYTHONHASHSEED": "1", **os.environ, "OMP_NUM_THREADS": "1"}
        path = Path(os.environ.get(PLACE) or Path(tempfile.mkdtemp(prefix="zoo-tests-forks-"), "socket"))
        self._log = path.with_suffix(".log")
        self._process: subprocess.Popen[bytes] | None = None  # where this is the one that started it
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            self._control = _connected(path) or self._start(path)
        atexit.register(self._end)

    def _start(self, path: Path) -> socket.socket:
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(path))
            listener.listen()
            command = [sys.executable, __file__, str(listener.fileno())]
            descriptors = [listener.fileno()]
            self._process = subprocess.Popen(
                command, env=self._environment, pass_fds=descriptors, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        control = _connected(path)
        assert control is not None, self.log()
        return control

    def fork(self, descriptors: Sequence[int], environment: Mapping[str, str]) -> None:
        """Have it fork a process that has these descriptors: for answers, and its stdin, stdout and stderr."""
        unset = {"PYTHONHASHSEED": self._environment["PYTHONHASHSEED"]}
        wanted = {**unset, **environment}
        changed = [name for name in _READ_AT_START if wanted.get(name) != self._environment.get(name)]
        assert not changed, f"{changed} are read at the start of a process: start a fresh one"
        try:
            socket.send_fds(self._control, [b"!"], list(descriptors))
        except ConnectionError as error:
            raise AssertionError(self.log()) from error

    def _end(self) -> None:
        self._control.close()
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # another process of the tests needs it yet
                self._process.wait(10)

    def log(self) -> str:
        """What it said on stderr."""
        return self._log.read_text(errors="replace")


def _connected(path: Path) -> socket.socket | None:
    """A connection to the program that listens there and has answered; None where there is none."""
    control = socket.socket(socket.AF_UNIX)
    with contextlib.suppress(OSError):
        control.connect(str(path))
        if control.recv(1):
            return control
    control.close()
    return None


@functools.cache
def _parent() -> _Parent:
    return _Parent()


def command(folder: Path) -> Path:
    """A `zoo` in `folder` that is this, for scripts that call it by name, as long as this process lives."""
    _parent()
    path = folder / "zoo"
    path.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -S {shlex.quote(__file__)} zoo "$@"\n')
    path.chmod(0o755)
    return path


def execute() -> None:
    """For `call`: run the Python that is the only argument, as `python -c` does."""
    exec(sys.argv.pop(), {"__name__": "__main__"})


# ---------------------------------------------------------------------------------------------------------------------
# In the program
# ---------------------------------------------------------------------------------------------------------------------


def _function(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _import_all() -> None:
    """Import what commands do, and trace: for what is imported and cached on the way, and for `traces.inherit`."""
    import pytest
    import tqdm
    import transformers.models.qwen3_5.modeling_qwen3_5
    import transformers.models.qwen3_5_moe.modeling_qwen3_5_moe  # noqa: F401

    import coreai_zoo.cli.build
    import coreai_zoo.cli.gate
    import coreai_zoo.cli.run
    import coreai_zoo.cli.verify
    import coreai_zoo.gates.oracle  # noqa: F401
    from checkpoints import tiny_checkpoint
    from coreai_zoo.build.design import design
    from coreai_zoo.build.request import BuildRequest
    from coreai_zoo.plugins import default_plugins
    from halves import use_instructions
    from suite import NIGHTLY
    from traces import trace_once

    if not NIGHTLY:
        use_instructions()
    interval, tqdm.tqdm.monitor_interval = tqdm.tqdm.monitor_interval, 0  # or it starts a thread, which no fork has
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as monkeypatch:
        checkpoint = tiny_checkpoint(Path(folder) / "checkpoint")
        trace_once(monkeypatch)
        design(BuildRequest("qwen3.6-27b", checkpoint, custom=True), default_plugins()).trace()
    tqdm.tqdm.monitor_interval = interval
    default_plugins.cache_clear()  # a run may have others


def _be(job: Mapping[str, Any], descriptors: Sequence[int]) -> NoReturn:
    """In the fork: be the process that `job` describes."""
    # A shell that starts the tests in the background has them ignore Ctrl-C, and a fork would inherit that.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
    os.closerange(3, max(descriptors) + 1)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(io.FileIO(1, "w", closefd=False), write_through=True)  # type: ignore[misc]
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(io.FileIO(2, "w", closefd=False), write_through=True)  # type: ignore[misc]
    inherited = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["environment"])
    time.tzset()
    tempfile.tempdir = None  # TMPDIR may be another
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in inherited]
    sys.path[:0] = paths
    sys.argv[:] = ["zoo", *job["arguments"]]
    code: object = 0
    try:
        if job["before"]:
            _function(job["before"])()
        _function(job["call"])()
    except SystemExit as end:
        code = end.code
        if not isinstance(code, int | None):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:  # noqa: BLE001  # told as the end of the interpreter would tell it
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    os._exit(int(code or 0))  # type: ignore[call-overload]


def _attend(descriptors: Sequence[int]) -> NoReturn:
    """In a fork of the program: fork the process, say its pid, wait for it, and say how it ended."""
    answers = socket.socket(fileno=descriptors[0])
    job = json.loads(answers.makefile("rb").readline())
    child = os.fork()
    if not child:
        _be(job, descriptors[1:])
    for descriptor in descriptors[1:]:
        os.close(descriptor)
    answers.sendall(f"{child}\n".encode())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        answers.sendall(f"{status}\n".encode())
    os._exit(0)


def _serve(listener: socket.socket) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C at the tests is theirs to answer
    _import_all()
    threads = [task.name for task in Path("/proc/self/task").glob("*")]
    assert len(threads) <= 1, f"{len(threads)} threads would not survive the fork"
    gc.collect()
    gc.freeze()  # or each fork would copy what its collections look at
    controls: list[socket.socket] = []
    attending: set[int] = set()
    while True:
        for ready in select.select([listener, *controls], [], [])[0]:
            if ready is listener:
                controls.append(listener.accept()[0])
                controls[-1].sendall(b"+")
                continue
            message, descriptors = b"", list[int]()
            with contextlib.suppress(ConnectionError):  # it was killed
                message, descriptors, _, _ = socket.recv_fds(ready, 1, 4)
            if not message:
                ready.close()
                controls.remove(ready)
                continue
            child = os.fork()
            if not child:
                for each in (listener, *controls):
                    each.close()
                _attend(descriptors)
            attending.add(child)
            for descriptor in descriptors:
                os.close(descriptor)
        attending -= {pid for pid in attending if os.waitpid(pid, os.WNOHANG)[0]}
        if not controls:
            break
    listener.close()  # who connects from now on starts another
    for pid in attending:
        os.waitpid(pid, 0)


if __name__ == "__main__":
    if sys.argv[1] == "zoo":
        with Process(*sys.argv[2:], stdout=1, stderr=2) as process:
            sys.exit(process.wait())
    _serve(socket.socket(fileno=int(sys.argv[1])))
