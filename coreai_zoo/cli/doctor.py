"""`zoo doctor`: what this machine and installation can and cannot do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import attrs
import click
from attrs import frozen

from coreai_zoo.catalogue import load_entries
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_rows, print_table
from coreai_zoo.errors import EnvironmentLacks, listing
from coreai_zoo.machine import physical_memory
from coreai_zoo.plugins import Plugins


@frozen
class Finding:
    """One thing that is required: what was found, what is wanted, and whether that fits."""

    name: str
    found: str | None
    wanted: str
    ok: bool
    note: str = ""


_TOOLCHAIN = ("torch", "transformers", "coreai", "coreai_torch", "coreai_opt", "coremltools")
_GIB = 2**30


def _requirements() -> list[Finding]:
    """Python and every package that this distribution requires, from its own metadata: there is no second list."""
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    try:
        metadata = importlib.metadata.metadata("coreai-zoo")
    except importlib.metadata.PackageNotFoundError as error:
        raise EnvironmentLacks("coreai-zoo runs but is not installed.", "Install it: pip install -e .") from error
    python = SpecifierSet(metadata["Requires-Python"])
    version = platform.python_version()
    findings = [Finding("python", version, str(python), python.contains(version, prereleases=True))]
    for text in importlib.metadata.requires("coreai-zoo") or ():
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(requirement.name, None, str(requirement.specifier), ok=False))
        else:
            fits = requirement.specifier.contains(found, prereleases=True)
            findings.append(Finding(requirement.name, found, str(requirement.specifier), fits))
    return findings


def _imports() -> list[Finding]:
    findings = []
    for name in _TOOLCHAIN:
        try:
            importlib.import_module(name)
        except Exception as error:  # noqa: BLE001  # a broken binary can raise anything, and saying so is the point
            findings.append(Finding(f"import {name}", None, "", ok=False, note=f"{type(error).__name__}: {error}"))
        else:
            findings.append(Finding(f"import {name}", "fine", "", ok=True))
    return findings


def _plugin_finding(ctx: click.Context) -> Finding:
    plugins = plugins_of(ctx)
    for load in (load_entries, Plugins.recipes, Plugins.contracts, Plugins.tokenizer_classes, Plugins.backends):
        load(plugins)
    problems = " ".join(str(problem) for problem in plugins.problems)
    names = None if problems else ", ".join(plugins.names()) or "none"
    return Finding("plugins", names, "all load", ok=not problems, note=problems)


def _machine() -> dict[str, Any]:
    memory = physical_memory()
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
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
    packages_fit = all(finding.ok for finding in findings if finding.name != "plugins")
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
            verdict = "ok" if finding.ok else finding.note or ("missing" if finding.found is None else "wrong version")
            table.add_row(finding.name, finding.found or "-", finding.wanted, verdict)
        print_table(table)
        print_rows(
            [(name.replace("_gib", " (GiB)").replace("_", " "), value) for name, value in machine.items()], "machine"
        )
        print_rows([(name, f"{'yes' if able else 'no'}: {why}") for name, (able, why) in abilities.items()], "it can")
    bad = [finding.name for finding in findings if not finding.ok]
    if bad:
        raise EnvironmentLacks(f"not as required: {listing(bad)}. The table says what is wanted.")
