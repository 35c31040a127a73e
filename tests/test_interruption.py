"""Ctrl-C at any moment: exit code 130, one line on stderr, and nothing broken or left behind."""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from attrs import frozen
from safetensors.torch import save_file

import forked
from checkpoints import tiny_checkpoint
from coreai_zoo import interruption
from coreai_zoo.build.design import BuildRequest, design
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.plugins import default_plugins
from coreai_zoo.weights.store import JOURNAL
from suite import NIGHTLY

ENTRY = "qwen3.6-27b"
ZOO = (sys.executable, "-m", "coreai_zoo")
TRIES = int(os.environ.get("ZOO_INTERRUPTIONS", "20" if NIGHTLY else "2"))
"""Of each command; more in a run that looks for what is rare."""

RESUME = "Finished weights are kept. To resume, run:"


@frozen
class Outcome:
    """How an interrupted command ended.

    Attributes:
        after: seconds after which it was interrupted, None when it had ended before.
        lines: what it said on stderr, but for empty lines.
    """

    after: float | None
    status: int
    lines: tuple[str, ...]


def started(arguments: tuple[str, ...], folder: Path, *, fresh: bool) -> subprocess.Popen[str] | forked.Process:
    """`zoo`, once it answers Ctrl-C; its temporary files are in `folder`."""
    # torch keeps a cache among the temporary files, interrupted or not.
    environment = {**os.environ, "TMPDIR": str(folder), "TORCHINDUCTOR_CACHE_DIR": str(folder.with_name("torch"))}
    process: subprocess.Popen[str] | forked.Process
    if fresh:
        process = subprocess.Popen(
            (*ZOO, *arguments),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    else:
        process = forked.Process(*arguments, env=environment)
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with contextlib.suppress(FileNotFoundError):  # it ended just now, and is no child of ours
            caught = next(line for line in status.read_text().splitlines() if line.startswith("SigCgt:"))
            if int(caught.split()[1], 16) >> (signal.SIGALRM - 1) & 1:  # the last that is installed before all imports
                break
        time.sleep(0.001)
    return process


def interrupted(arguments: tuple[str, ...], after: float, folder: Path, *, fresh: bool) -> Outcome:
    """Interrupt a command after so many seconds."""
    with started(arguments, folder, fresh=fresh) as process:
        try:
            _, said = process.communicate(timeout=after)
            return Outcome(None, process.returncode or 0, tuple(filter(None, said.splitlines())))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)
        try:
            _, said = process.communicate(timeout=120)
        finally:
            process.kill()
    assert process.returncode is not None
    finished = process.returncode == 0  # its work was done, and only the interpreter's own end was left
    return Outcome(None if finished else after, process.returncode, tuple(filter(None, said.splitlines())))


def attempts(
    command: Callable[[int], tuple[str, ...]], folder: Path, tries: int = TRIES, *, fresh: bool = NIGHTLY
) -> list[Outcome]:
    """Run a command once undisturbed, then interrupt it at moments that are spread over that time.

    That begins with the imports where the processes are `fresh`. They take most of the time of any command, and are
    the same, so by day one command shows what becomes of them, and the others have their moments where they work.
    """
    folder.mkdir()
    with started(command(0), folder, fresh=fresh) as undisturbed:
        before = time.monotonic()  # the first fork waits for the program that forks
        assert undisturbed.communicate()[1] is not None and undisturbed.returncode == 0
    seconds = time.monotonic() - before
    dice = random.Random(130)
    moments = [(number, (number + dice.random()) / tries * seconds) for number in range(tries)]
    with ThreadPoolExecutor(2) as pool:
        outcomes = list(pool.map(lambda at: interrupted(command(1 + at[0]), at[1], folder, fresh=fresh), moments))
    assert [path.name for path in folder.iterdir()] == [], "temporary files are left"
    cut_short = [outcome for outcome in outcomes if outcome.after is not None]
    assert len(cut_short) >= tries // 2  # a machine that was busy the first time lets the last ones finish
    assert {(outcome.status, outcome.lines[-1:]) for outcome in cut_short} == {(130, ("interrupted",))}, cut_short
    assert {outcome.status for outcome in outcomes if outcome.after is None} <= {0}, outcomes
    return cut_short


def files(folder: Path) -> set[str]:
    """Everything below `folder`."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything below `folder`, and what is in it where it is a file."""
    paths = {name: folder / name for name in files(folder)}
    return {name: path.read_bytes() if path.is_file() else None for name, path in paths.items()}


@pytest.fixture(scope="module")
def bundle(built: Callable[[str, str], Bundle]) -> Bundle:
    return built(ENTRY, "int8hu")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["run", "verify"])
def test_a_command_that_reads_a_bundle_can_be_interrupted_anywhere(
    bundle: Bundle, tmp_path: Path, command: str
) -> None:
    options = ("-p", "def main(", "-n", "40") if command == "run" else ()
    before = contents(bundle.directory)  # sound: a build verifies what it has built

    outcomes = attempts(
        lambda _: (command, str(bundle.directory), *options),
        tmp_path / "temporary",
        fresh=NIGHTLY or command == "run",
    )

    assert {outcome.lines for outcome in outcomes} == {("interrupted",)}
    assert contents(bundle.directory) == before


@pytest.mark.slow
def test_a_gate_can_be_interrupted_anywhere(bundle: Bundle, tmp_path: Path) -> None:
    options = ("--prompts", "code", "--positions", "12", "--json")
    before = contents(bundle.directory)  # sound: a build verifies what it has built

    outcomes = attempts(
        lambda number: ("gate", str(bundle.directory), *options, "-o", str(tmp_path / f"gate-{number}")),
        tmp_path / "temporary",
    )

    assert {outcome.lines for outcome in outcomes} == {("interrupted",)}
    assert contents(bundle.directory) == before
    whole = files(tmp_path / "gate-0")
    assert all(files(report) <= whole for report in tmp_path.glob("gate-*"))


@pytest.mark.slow
def test_a_build_can_be_interrupted_anywhere(tmp_path: Path) -> None:
    checkpoint = str(tiny_checkpoint(tmp_path / "checkpoint"))  # does all that the sample does, in half of the time

    def command(number: int) -> tuple[str, ...]:
        where = ("--checkpoint", checkpoint, "--custom", "--json", "-o", str(tmp_path / f"output-{number}"))
        return ("build", ENTRY, *where)

    outcomes = attempts(command, tmp_path / "temporary")

    for outcome in outcomes:
        if outcome.lines != ("interrupted",):  # before there was anything to resume
            assert (outcome.lines[0], outcome.lines[2:]) == (RESUME, ("interrupted",)), outcome
            assert f" build qwen3.6-27b --checkpoint {checkpoint} --custom --json -o " in outcome.lines[1]
    assert any(RESUME in outcome.lines for outcome in outcomes)
    whole = files(tmp_path / "output-0")
    assert "build.json" in {Path(path).name for path in whole}
    for output in tmp_path.glob("output-*"):
        # A bundle is there whole or not at all; beside it only what the next build goes on from.
        found = {path for path in files(output) if not re.match(r"\.zoo-work/|\..*\.partial/", path)}
        kept = {path.name for path in output.glob(".*.partial") if (path / JOURNAL).is_file()}
        assert found in (kept, whole), output


# ---------------------------------------------------------------------------------------------------------------------
# What waits
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored() -> Iterator[None]:
    """Whatever a test does to the handler of SIGINT, afterwards it is what it was."""
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, handler)


@pytest.mark.usefixtures("restored")
def test_an_interruption_waits_for_the_outermost_block_that_defers_it() -> None:
    reached = []

    def twice_deferred() -> None:
        with interruption.deferred():
            with interruption.deferred():
                signal.raise_signal(signal.SIGINT)
                reached.append("inner")
            reached.append("outer")

    with pytest.raises(KeyboardInterrupt):
        twice_deferred()
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("restored")
def test_an_error_of_a_block_that_was_interrupted_is_not_lost() -> None:
    def fails() -> None:
        with interruption.deferred():
            signal.raise_signal(signal.SIGINT)
            raise ValueError("of the block")

    with pytest.raises(KeyboardInterrupt) as caught:
        fails()
    assert isinstance(caught.value.__context__, ValueError)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("backend", ["coreai", "coreml"])
def test_an_interruption_waits_for_a_trace(backend: str, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    built = design(BuildRequest(ENTRY, checkpoint, custom=True, backend=backend), default_plugins())
    reached = []
    pressed = iter([True])  # once: a second time would end the process, and torch runs a decoder more than once

    def press(*_: object) -> None:
        if next(pressed, False):
            signal.raise_signal(signal.SIGINT)

    for module in built.modules.values():
        module.register_forward_pre_hook(press)
        module.register_forward_hook(lambda *_: reached.append("the end"))

    with pytest.raises(KeyboardInterrupt):
        built.trace()
    assert reached


PRESS = "for _ in range({presses}):\n    signal.raise_signal(signal.SIGINT)\nprint('finished')\n"
WAITS = {
    "native call": "with interruption.deferred():\n{press}",
    "import": "with interruption.answered():\n    import press\n    time.sleep(60)",
    "end of an object": "class Object:\n    def __del__(self):\n{press}"
    "with interruption.answered():\n    Object()\n    time.sleep(60)",
    "call from torch": "import torch\nclass Object:\n    @classmethod\n"
    "    def __torch_function__(cls, function, types, args=(), kwargs=None):\n{press}"
    "with interruption.answered():\n    torch.add(Object(), 1)\n    time.sleep(60)",
}


@pytest.mark.parametrize("where", WAITS)
@pytest.mark.parametrize("presses", [1, 2])
def test_a_second_interruption_does_not_wait(tmp_path: Path, where: str, presses: int) -> None:
    press = PRESS.format(presses=presses)
    (tmp_path / "press.py").write_text(f"import signal\n{press}", encoding="utf-8")
    (tmp_path / "script.py").write_text(
        "import signal, time\nfrom coreai_zoo import interruption\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        + WAITS[where].replace("{press}", textwrap.indent(press, " " * 8)),
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    if presses == 2:
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "\ninterrupted\n")
    else:
        assert done.stdout == "finished\n"
        assert done.returncode == (-signal.SIGINT if where == "native call" else 130)


@pytest.mark.parametrize(
    ("last", "status", "said"),
    [("pass", 0, ""), ("sys.exit(3)", 3, ""), ("raise ValueError('of the command')", 1, "ValueError: of the command")],
)
def test_a_command_ends_without_the_end_of_the_interpreter(tmp_path: Path, last: str, status: int, said: str) -> None:
    (tmp_path / "script.py").write_text(
        "import atexit, os, sys\n"
        "from coreai_zoo import interruption\n"
        "class Held:\n    def __del__(self):\n        os.write(1, b'the end of the interpreter')\n"
        "held = Held()\n"
        "atexit.register(print, 'exit handlers')\n"
        "with interruption.answered():\n"
        f"    print('printed')\n    {last}\n",
        encoding="utf-8",
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (status, "printed\nexit handlers\n")
    assert done.stderr.splitlines()[-1:] == ([said] if said else [])


def test_the_shell_sees_exit_code_130(tmp_path: Path) -> None:
    script = tmp_path / "interrupts.py"
    script.write_text(
        "import signal, sys, threading\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from coreai_zoo.__main__ import main\n"
        "from coreai_zoo.cli import list as module\n"
        "import click\n"
        "@click.command()\n"
        "def press():\n"
        "    signal.raise_signal(signal.SIGINT)\n"
        "module.list_entries = press\n"
        "sys.argv[1:] = ['list']\n"
        "main()\n",
        encoding="utf-8",
    )
    shell = subprocess.run(
        ["sh", "-c", f"{sys.executable} {script}; echo $?"], capture_output=True, text=True, check=False
    )
    assert (shell.stdout, shell.stderr) == ("130\n", "\ninterrupted\n")


_READS = """
import os, signal, sys, time
from safetensors import safe_open
from coreai_zoo import interruption

def interrupt(frame, event, _argument):
    if event == "call" and frame.f_globals.get("__name__") == "torch.storage":
        sys.setprofile(None)
        print("reading", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

with interruption.answered():
    with safe_open(sys.argv[1], "pt") as file:
        rows = file.get_slice("w")
        sys.setprofile(interrupt)
        read = rows[0:2]
        print(len(read), flush=True)
        time.sleep(5)
"""


_CLEANS_UP = """
import os, signal, sys, time
from coreai_zoo import interruption
import torch
from torch.utils.weak import WeakIdKeyDictionary

def press(frame, event, _argument):
    if event == "call" and frame.f_code.co_name == "remove" and frame.f_globals["__name__"] == "torch.utils.weak":
        sys.setprofile(None)
        print("cleaning up", flush=True)
        os.kill(os.getpid(), signal.SIGINT)

with interruption.answered():
    known, key = WeakIdKeyDictionary(), torch.ones(2)
    known[key] = 1
    sys.setprofile(press)
    del key  # torch is called by the interpreter, which would swallow what is raised there
    time.sleep(5)
"""


def test_an_interruption_while_torch_cleans_up_is_not_lost() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _CLEANS_UP], capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.split(), done.stderr.split()) == (
        interruption.EXIT_CODE, ["cleaning", "up"], ["interrupted"],
    )  # fmt: skip


def test_an_interruption_while_safetensors_reads_is_none_of_its_errors(tmp_path: Path) -> None:
    save_file({"w": torch.ones(4, 8)}, tmp_path / "w.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", _READS, str(tmp_path / "w.safetensors")], capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == interruption.EXIT_CODE, done.stderr
    assert done.stdout.split() == ["reading", "2"]
    assert done.stderr.split() == ["interrupted"]
