"""`zoo doctor`: what this machine and installation can and cannot do."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shlex
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from attrs import frozen

from coreai_zoo.catalogue import load_entries
from coreai_zoo.commands import (
    Column,
    json_option,
    new_table,
    plugins_of,
    print_json,
    print_rows,
    print_table,
    say_next,
)
from coreai_zoo.errors import EnvironmentLacks, ZooError, listing, zoo_command
from coreai_zoo.machine import cores, physical_memory
from coreai_zoo.plugins import Plugins

if TYPE_CHECKING:
    from packaging.requirements import Requirement


@frozen
class Finding:
    """One thing that is required or of use.

    Attributes:
        name: what it is.
        found: what was found, None where it is not there.
        wanted: what is wanted.
        ok: whether that fits.
        note: what is to be said of it.
        mend: the command that brings what is wanted.
        needed: whether nothing can be built without it.
    """

    name: str
    found: str | None
    wanted: str
    ok: bool
    note: str = ""
    mend: str = ""
    needed: bool = True

    @property
    def verdict(self) -> str:
        """In a few words."""
        return "ok" if self.ok else self.note or ("missing" if self.found is None else "wrong version")


_TOOLCHAIN = ("torch", "transformers", "coreai", "coreai_torch", "coreai_opt", "coremltools")
_NEW_PYTHON = "python3.11 -m venv .venv && . .venv/bin/activate && pip install coreai-zoo"
_EXTRAS = {"cluster": "`zoo sensitivity --scheduler`"}
_GIB = 2**30


def _requirements() -> list[Finding]:
    """Python and every package that this distribution requires, from its own metadata: there is no second list.

    The packages of an extra come last, with what it is for.
    """
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        metadata = importlib.metadata.metadata("coreai-zoo")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentLacks("coreai-zoo runs but is not installed.", "Install it: pip install -e .") from error
    python = SpecifierSet(metadata["Requires-Python"])
    version = platform.python_version()
    fits = python.contains(version, prereleases=True)
    findings = [Finding("python", version, str(python), fits, mend=_NEW_PYTHON)]
    requirements = [Requirement(text) for text in importlib.metadata.requires("coreai-zoo") or ()]
    findings += [_package(each) for each in requirements if _asked_for(each, "")]
    for extra, use in _EXTRAS.items():
        of_it = [each for each in requirements if _asked_for(each, extra) and not _asked_for(each, "")]
        findings += [attrs.evolve(_package(each), note=f"not needed but by {use}", needed=False) for each in of_it]
    return findings


def _asked_for(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _package(requirement: Requirement) -> Finding:
    wanted = str(requirement.specifier)
    mend = f"pip install {shlex.quote(requirement.name + wanted)}"
    try:
        found = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return Finding(requirement.name, None, wanted, ok=False, mend=mend)
    return Finding(requirement.name, found, wanted, requirement.specifier.contains(found, prereleases=True), mend=mend)


def _imports() -> list[Finding]:
    findings = []
    for name in _TOOLCHAIN:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  # a broken binary can raise anything, and saying so is the point
            note = f"{type(error).__name__}: {error}"
            findings.append(Finding(f"import {name}", None, "", ok=False, note=note, mend=_reinstall(name)))
        else:
            findings.append(Finding(f"import {name}", "fine", "", ok=True))
    return findings


def _reinstall(module: str) -> str:
    """The command that installs the package of a module once more, as it is wanted."""
    from packaging.requirements import Requirement

    package = (importlib.metadata.packages_distributions().get(module) or [module])[0]
    texts = map(Requirement, importlib.metadata.requires("coreai-zoo") or ())
    (wanted, *_) = [str(each.specifier) for each in texts if each.name == package] or [""]
    return f"pip install --force-reinstall {shlex.quote(package + wanted)}"


def _plugin_finding(ctx: click.Context) -> Finding:
    plugins = plugins_of(ctx)
    for load in (load_entries, Plugins.recipes, Plugins.contracts, Plugins.tokenizer_classes, Plugins.backends):
        load(plugins)
    for model_type in {each for entry, _ in load_entries(plugins).values() for each in entry.model_type}:
        with suppress(ZooError):  # two claims, or none: `zoo check` says that of its entry
            plugins.claim_overlay(model_type, {"model_type": model_type}, of_entry=True)
    problems = " ".join(str(problem) for problem in plugins.problems)
    names = None if problems else ", ".join(plugins.names()) or "none"
    return Finding("plugins", names, "all load", ok=not problems, note=problems, mend="zoo --without PLUGIN COMMAND")


def _machine() -> dict[str, Any]:
    memory = physical_memory()
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_gib": None if memory is None else round(memory / _GIB, 1),
        "free_disk_gib": round(shutil.disk_usage(Path.cwd()).free / _GIB, 1),
    }


def _abilities(system: str, macos: str, *, toolchain: bool) -> dict[str, tuple[bool, str]]:
    """What this platform can do and why: a table from name to (whether, reason)."""
    lacking = "needs the packages above at the versions that are wanted"
    mac_version = int(macos.partition(".")[0] or 0)
    if system == "Darwin" and mac_version >= 27:
        gpu = (True, "macOS 27 or later; the bundle's card says what its contract needs besides")
    elif system == "Darwin":
        gpu = (False, f"needs macOS 27, this is {macos}")
    else:
        gpu = (False, f"needs a Mac with macOS 27, this is {system}; bundles made here are meant for it")
    known = system in ("Linux", "Darwin")
    return {
        "build": (toolchain and known, "converts and writes bundles" if toolchain else lacking),
        "gate": (
            toolchain and known,
            "runs bundles on the Core AI CPU runtime: slow, right for samples and slices" if toolchain else lacking,
        ),
        "run on the GPU": gpu,
    }


@click.command("doctor")
@click.option("--deep", is_flag=True, help="Also import torch and the toolchain (takes seconds).")
@json_option
@click.pass_context
def doctor(ctx: click.Context, deep: bool, as_json: bool) -> None:
    """What this machine and installation can and cannot do.

    Exits with 3 when something that is required is missing, or is another version than the one that was tested.

    \b
    Example:
        zoo doctor
        zoo doctor --deep
    """
    findings = [*_requirements(), *(_imports() if deep else ()), _plugin_finding(ctx)]
    packages_fit = all(finding.ok for finding in findings if finding.needed and finding.name != "plugins")
    abilities = _abilities(platform.system(), platform.mac_ver()[0], toolchain=packages_fit)
    machine = _machine()
    if as_json:
        print_json(
            {
                "requirements": [attrs.asdict(finding) for finding in findings],
                "machine": machine,
                "abilities": {name: {"able": able, "why": why} for name, (able, why) in abilities.items()},
            }
        )
    else:
        table = new_table("required", "found", Column("wanted", drop=1), "")
        for finding in findings:
            table.add_row(finding.name, finding.found or "-", finding.wanted, finding.verdict)
        print_table(table)
        print_rows(
            [(name.replace("_gib", " (GiB)").replace("_", " "), value) for name, value in machine.items()], "machine"
        )
        print_rows([(name, f"{'yes' if able else 'no'}: {why}") for name, (able, why) in abilities.items()], "it can")
        to_mend = [(finding.name, finding.mend) for finding in findings if not finding.ok]
        if to_mend:
            print_rows(to_mend, "what to type")
    bad = [finding.name for finding in findings if finding.needed and not finding.ok]
    if bad:
        raise EnvironmentLacks(f"not as required: {listing(bad)}. The table says what is wanted, and what to type.")
    sample = next((entry.name for entry, _ in load_entries(plugins_of(ctx)).values() if entry.sample), None)
    if not as_json and sample:
        say_next("build what ships, to see it all work", zoo_command("build", sample, "--sample"))
