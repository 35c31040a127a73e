"""Fixtures that several test modules share."""

from __future__ import annotations

import atexit
import functools
import gc
import os
import shutil
import signal
import tempfile
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, settings

import forked
import halves
from coreai_zoo import hookimpl
from coreai_zoo.backends import builtin
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.cli.app import cli
from coreai_zoo.plugins import HOOKS, Plugins
from coreai_zoo_qwen36 import plugin as family
from hub import Hub
from shared import Shared
from suite import CATALOGUED, NIGHTLY, QUICK, THOROUGH, TRACED_ANEW, long_ones_first

# Before anything imports torch. A step of a miniature is over before a second thread has woken up, and with as many
# workers as cores the threads of one wait for those of the other, busily: measured, four times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# As a build has it: a traced decoder is half a million objects, and walking over them was a tenth of the time of tests
# that trace.
gc.set_threshold(50_000, 20, 100)

# What the zoo keeps for the next time, the tests keep for this run; its workers and their children inherit the folder.
if "PYTEST_XDIST_WORKER" not in os.environ:
    os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="zoo-tests-cache-")
    os.environ[forked.PLACE] = str(Path(os.environ["XDG_CACHE_HOME"], "forks.socket"))
    atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

# A shell that starts the tests in the background has them ignore Ctrl-C, and what they start inherits that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# A loaded machine is no fault of the code.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ROOT = Path(__file__).parent.parent

ENTRY = """\
name = "toy-1b"
title = "Toy 1B"
summary = "A toy."
model_type = ["toy"]
hf_id = "toys/Toy-1B"

[facts]
ffn = "dense"
layers = 2
hidden_size = 8
vocab_size = 32

[bundle]
max_context = 64
"""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="only the files of tests that tests/suite.py calls quick")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Do not even import what the quick loop leaves out."""
    name = collection_path.stem
    if config.getoption("quick") and name.startswith("test_") and name.removeprefix("test_") not in QUICK:
        return True
    return None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Have each worker begin with long tests."""
    items[:] = long_ones_first(items, lambda item: item.path.stem.removeprefix("test_"))


def pytest_sessionfinish() -> None:
    """Spare what comes after: pytest then looks through everything that is left five times, for what was not closed."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture
def entry_file(tmp_path: Path) -> Callable[..., Path]:
    """Write an entry file: the toy entry, with pieces of its text replaced."""

    def write(*replacements: tuple[str, str], name: str = "toy") -> Path:
        text = ENTRY
        for old, new in replacements:
            assert old in text, f"the toy entry has no {old!r} to replace"
            text = text.replace(old, new)
        path = tmp_path / f"{name}.toml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


@pytest.fixture
def make_plugin() -> Callable[..., types.ModuleType]:
    """Make a plugin: a real module whose hooks are the functions that are given by hook name."""

    def make(**hooks: Callable[..., Any]) -> types.ModuleType:
        module = types.ModuleType("a_plugin")
        for name, function in hooks.items():
            setattr(module, name, hookimpl(function))
        return module

    return make


@pytest.fixture
def shipped(root: Path, make_plugin: Callable[..., types.ModuleType]) -> Plugins:
    """A host with one plugin, which brings the entries of this repository."""
    plugins = Plugins()
    directory = root / "coreai_zoo_qwen36" / "zoo_entries"  # through the symlink, as it is packaged
    plugins.register(make_plugin(zoo_entries=lambda: sorted(directory.glob("*.toml"))), "shipped")
    return plugins


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Shared:
    """What all workers of this run have in common."""
    base = tmp_path_factory.getbasetemp()
    return Shared((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared")


@pytest.fixture(scope="session")
def built(shared: Shared) -> Callable[[str, str], Bundle]:
    """Build a sample once per entry and recipe, through the command line. Tests leave it as it is."""

    def fill(entry: str, recipe: str, output: Path) -> None:
        arguments = ["build", entry, "--sample", "--recipe", recipe, "-o", str(output), "--json"]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 0, result.output

    @functools.cache
    def build(entry: str, recipe: str) -> Bundle:
        (bundle,) = shared.folder(f"{entry}-{recipe}", functools.partial(fill, entry, recipe)).iterdir()
        return Bundle.open(bundle)

    return build


@pytest.fixture(scope="session")
def host_of() -> Callable[..., Plugins]:
    """A host with its own backends and the family's plugin, which brings these files of entries and no other."""

    def host(*files: Path) -> Plugins:
        module = types.ModuleType("few_entries")
        hooks = {name: getattr(family, name) for name in HOOKS if hasattr(family, name)}
        vars(module).update(hooks, zoo_entries=hookimpl(lambda: list(files)))
        plugins = Plugins()
        plugins.register(builtin, "coreai")
        plugins.register(module, "qwen36")
        return plugins

    return host


@pytest.fixture(scope="session")
def catalogue_folder(shared: Shared, host_of: Callable[..., Plugins]) -> Path:
    """What `zoo catalogue` writes, once for all tests; see `CATALOGUED`."""

    def fill(folder: Path) -> None:
        files = [ROOT / "zoo_entries" / f"{name}.toml" for name in CATALOGUED]
        plugins = None if NIGHTLY else host_of(*files)
        result = CliRunner().invoke(cli, ["catalogue", "-o", str(folder)], obj=plugins)
        assert result.exit_code == 0, result.output

    return shared.folder("catalogue", fill)


@pytest.fixture(scope="module", autouse=True)
def _traced_once(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is the same is traced and compiled once, in files of tests that are about something else.

    See `traces` and `executables`.
    """
    name = Path(str(request.fspath)).stem.removeprefix("test_")
    if name not in THOROUGH - TRACED_ANEW:
        yield
        return
    from executables import compile_once  # the toolchain and torch are not for the quick tests
    from traces import trace_once

    with pytest.MonkeyPatch.context() as monkeypatch:
        trace_once(monkeypatch)
        compile_once(monkeypatch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _halves_by_instructions(request: pytest.FixtureRequest) -> None:
    """By day, steps of the runtime take half of the time; see `halves`."""
    if not NIGHTLY and not request.config.getoption("quick"):
        halves.use_instructions()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub on this machine, which `huggingface_hub` uses in this process; see `Hub.environment` for others."""
    with Hub(tmp_path / "huggingface") as server:
        server.configure(monkeypatch)
        yield server
