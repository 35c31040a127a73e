"""The `zoo` command: the frame that every command runs in, and the commands that only look.

Answers come without torch: a command's module is imported when it runs, and its line of help stands in `COMMANDS`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import attrs
import click
from attrs import frozen

from coreai_zoo import __version__
from coreai_zoo.entry import Entry, find_entry, load_entries
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError, listing
from coreai_zoo.plugins import GROUP, Plugins, default_plugins

if TYPE_CHECKING:
    from rich.table import Table

COMMANDS: Mapping[str, tuple[str, str]] = types.MappingProxyType(
    {
        "list": ("coreai_zoo.cli:list_entries", "What there is to build."),
        "show": ("coreai_zoo.cli:show", "Everything that is known of an entry."),
        "build": ("coreai_zoo.cli_build:build", "Build a bundle."),
        "plan": ("coreai_zoo.cli_plan:plan", "What a bundle would hold, need and run at, from a config alone."),
        "new": ("coreai_zoo.cli_new:new", "Write an entry for a checkpoint."),
        "run": ("coreai_zoo.cli_build:run", "Generate text with a bundle, on the runtime of this machine."),
        "gate": ("coreai_zoo.cli_gate:gate", "Compare a bundle with Hugging Face, position by position."),
        "sensitivity": (
            "coreai_zoo.cli_sensitivity:sensitivity",
            "Rank a model's weights by what quantizing them costs for each byte that it saves.",
        ),
        "verify": (
            "coreai_zoo.cli_build:verify",
            "Check a bundle's files, hashes, metadata, signature, and, if it is small, one real step.",
        ),
        "diff": (
            "coreai_zoo.cli_diff:diff",
            "What differs between two bundles, entries, recipes or revisions of the code.",
        ),
        "check": ("coreai_zoo.cli_check:check", "Everything that has to hold before a change is merged."),
        "plugins": ("coreai_zoo.cli:list_plugins", "Which plugins are installed and what each brings."),
        "doctor": ("coreai_zoo.cli:doctor", "What this machine and installation can and cannot do."),
    }
)
"""The host's commands in the order of `zoo --help`: where each is, and its first line of help."""

_INTERRUPTED = 130

# ---------------------------------------------------------------------------------------------------------------------
# Frame
# ---------------------------------------------------------------------------------------------------------------------


class ZooGroup(click.Group):
    """Imports a command when it runs, adds those of plugins, and turns errors into one paragraph and an exit code."""

    # Commands that must answer when a plugin is broken, because they say what is broken.
    without_plugins = frozenset({"doctor"})

    debug = False

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  # click's signature
        """The host's commands in their order, then the plugins'."""
        return [*COMMANDS, *sorted(self.commands)]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now if it is one of the host's."""
        if cmd_name not in COMMANDS:
            return super().get_command(ctx, cmd_name)
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click does, with plugins' commands added first."""
        if args[0] not in self.without_plugins:
            self._add_plugin_commands(ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands; only plugins' are loaded for it."""
        try:
            self._add_plugin_commands(ctx)
        except ZooError as error:  # help is still help
            click.echo(f"warning: {error}", err=True)
        rows = [(name, help_line) for name, (_target, help_line) in COMMANDS.items()]
        rows += [(name, self.commands[name].get_short_help_str(limit=80)) for name in sorted(self.commands)]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def _add_plugin_commands(self, ctx: click.Context) -> None:
        # The host's commands are not in `self.commands`, so that holds plugins' only, from this run on.
        self.commands.clear()
        plugins_of(ctx).register_commands(self)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run and exit: 0 fine, 1 a check failed, 2 bad usage or input, 3 the environment lacks something.

        130 stands for an interruption, as in a shell.
        """
        self.debug = False
        try:
            result = super().main(args, prog_name, complete_var, standalone_mode=False, **extra)
        except (ZooError, click.ClickException, click.Abort) as error:
            if not standalone_mode or (self.debug and isinstance(error, ZooError)):
                raise
            _exit_with(error)
        if not standalone_mode:
            return result
        # Without standalone mode, click hands back the code of `ctx.exit(code)`.
        sys.exit(result if isinstance(result, int) else 0)


def _exit_with(error: Exception) -> NoReturn:
    if isinstance(error, click.UsageError):
        error.show()
        sys.exit(2)
    if isinstance(error, click.ClickException):
        click.echo(f"error: {error.format_message()}", err=True)
        sys.exit(2)
    if isinstance(error, ZooError):
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    click.echo("interrupted", err=True)  # click turns KeyboardInterrupt into Abort
    sys.exit(_INTERRUPTED)


def plugins_of(ctx: click.Context) -> Plugins:
    """The installed plugins, or those that a test passed as `obj`."""
    given = ctx.find_object(Plugins)
    return given if given is not None else default_plugins()


def _set_debug(ctx: click.Context, _option: click.Parameter, debug: bool) -> None:
    if isinstance(ctx.command, ZooGroup):
        ctx.command.debug = debug


@click.group(
    cls=ZooGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120},
    epilog="Example: zoo build qwen3.6-27b --sample",
)
@click.option("--debug", is_flag=True, is_eager=True, expose_value=False, callback=_set_debug, help="Show tracebacks.")
@click.version_option(__version__, prog_name="zoo")
def cli() -> None:
    """Turn Hugging Face checkpoints into verified Core AI bundles."""


def main() -> NoReturn:
    """Entry point of `zoo`."""
    cli.main(prog_name="zoo")
    raise AssertionError("main exits by itself in standalone mode")


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def print_json(value: object) -> None:
    """Print `value` for a program; what JSON does not know is printed as text."""
    click.echo(json.dumps(value, indent=2, default=str))


def new_table(*columns: str, title: str | None = None) -> Table:
    """An empty table in the style of every command."""
    from rich import box
    from rich.table import Table

    table = Table(*columns, title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    if table.columns:
        table.columns[0].no_wrap = True  # the name that the row is about is never cut
    return table


def print_table(table: Table) -> None:
    """Print a table: as wide as the terminal, or as it wants where there is none."""
    from rich.console import Console

    # A pipe has no width: give the table what it wants rather than cut a line that a program will read.
    width = None if sys.stdout.isatty() else 200
    # Names, paths and messages are printed as they are: "[...]" in them is no markup.
    Console(width=width, highlight=False, markup=False, emoji=False).print(table)


def _rows(rows: Sequence[tuple[str, object]], title: str | None = None) -> None:
    table = new_table("", "", title=title)
    table.show_header = False
    for name, value in rows:
        table.add_row(name, str(value))
    print_table(table)


# ---------------------------------------------------------------------------------------------------------------------
# zoo list, zoo show
# ---------------------------------------------------------------------------------------------------------------------


def _billions(parameters: int | None) -> str:
    return "unknown" if parameters is None else f"{parameters / 1e9:.1f} B"


@click.command("list")
@json_option
@click.pass_context
def list_entries(ctx: click.Context, as_json: bool) -> None:
    """What there is to build.

    \b
    Example:
        zoo list
        zoo list --json | jq '.[].name'
    """
    entries = load_entries(plugins_of(ctx))
    if as_json:
        print_json(
            [
                {
                    "name": entry.name,
                    "ffn": entry.facts.ffn,
                    "parameters": entry.facts.parameters,
                    "recipe": entry.recipe,
                    "contract": entry.contract,
                    "status": entry.status,
                    "plugin": plugin,
                }
                for entry, plugin in entries.values()
            ]
        )
        return
    table = new_table("entry", "FFN", "parameters", "recipe", "contract", "status", "plugin")
    table.columns[2].justify = "right"
    for entry, plugin in entries.values():
        row = (entry.facts.ffn, _billions(entry.facts.parameters), entry.recipe, entry.contract, entry.status, plugin)
        table.add_row(entry.name, *row)
    print_table(table)


def _recipe_by_role(entry: Entry) -> dict[str, str | None]:
    from coreai_zoo.quantize import RECIPES

    if entry.recipe not in RECIPES:
        raise BadInput(
            f"entry {entry.name!r} asks for the recipe {entry.recipe!r}, which does not exist.",
            f"There are: {listing([*RECIPES])}.",
        )
    return {role: None if spec is None else str(spec) for role, spec in RECIPES[entry.recipe].roles.items()}


@click.command("show")
@click.argument("name", metavar="ENTRY")
@json_option
@click.pass_context
def show(ctx: click.Context, name: str, as_json: bool) -> None:
    """Everything that is known of an entry.

    What is not known is not shown, nor guessed; an entry is `unverified` until its facts and revision were compared
    with the published checkpoint. The recipe's table says how a weight of each role is stored; a plugin may have a
    policy of its own for the head, which is known once a checkpoint is there.

    \b
    Example:
        zoo show qwen3.6-27b
    """
    entry, plugin = find_entry(name, plugins_of(ctx))
    recipe = _recipe_by_role(entry)
    if as_json:
        described = attrs.asdict(entry) | {"facts": entry.facts.stated, "plugin": plugin, "recipe_by_role": recipe}
        print_json(described)
        return
    rows: list[tuple[str, object]] = [
        ("title", entry.title),
        ("summary", entry.summary),
        ("checkpoint", f"{entry.hf_id} at {entry.hf_revision or 'an unknown revision'}" if entry.hf_id else "local"),
        ("model types", ", ".join(entry.model_type)),
        ("licence", entry.licence or "unknown"),
        ("status", entry.status),
        ("recipe", entry.recipe),
        ("contract", entry.contract),
        ("max context", entry.bundle.max_context),
        ("sample", f"{entry.sample.path} in {entry.sample.package}" if entry.sample else "none"),
        ("plugin", plugin),
    ]
    _rows(rows, title=entry.name)
    facts = [
        (fact, f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value)
        for fact, value in entry.facts.stated.items()
    ]
    _rows(facts, title="facts")
    _rows([(role, spec or "not quantized") for role, spec in recipe.items()], title=f"recipe {entry.recipe}")


# ---------------------------------------------------------------------------------------------------------------------
# zoo plugins
# ---------------------------------------------------------------------------------------------------------------------


@click.command("plugins")
@json_option
@click.pass_context
def list_plugins(ctx: click.Context, as_json: bool) -> None:
    """Which plugins are installed and what each brings.

    \b
    Example:
        zoo plugins
    """
    plugins = plugins_of(ctx)
    entries: dict[str, list[str]] = {}
    for entry, plugin in load_entries(plugins).values():
        entries.setdefault(plugin, []).append(entry.name)
    backends: dict[str, list[str]] = {}
    for plugin, backend in plugins.backends_by_plugin():
        backends.setdefault(plugin, []).append(backend.name)
    described = [
        attrs.asdict(info) | {"entries": entries.get(info.name, []), "backends": backends.get(info.name, [])}
        for info in plugins.info()
    ]
    if as_json:
        print_json(described)
        return
    table = new_table("plugin", "from", "entries", "backends", "hooks")
    for row in described:
        source = f"{row['distribution']} {row['version']}" if row["distribution"] else row["module"]
        table.add_row(row["name"], source, *("\n".join(row[key]) for key in ("entries", "backends", "hooks")))
    print_table(table)
    if not described:
        click.echo(f"No package advertises a plugin in the entry-point group {GROUP!r}.")


# ---------------------------------------------------------------------------------------------------------------------
# zoo doctor
# ---------------------------------------------------------------------------------------------------------------------


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
    try:
        names = plugins_of(ctx).names()
        load_entries(plugins_of(ctx))
    except ZooError as error:
        return Finding("plugins", None, "all load", ok=False, note=str(error))
    return Finding("plugins", ", ".join(names) or "none", "all load", ok=True)


def _memory_gib() -> float | None:
    if not hasattr(os, "sysconf"):  # Windows
        return None
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / _GIB, 1)


def _machine() -> dict[str, Any]:
    return {
        "platform": platform.platform(),
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
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
        table = new_table("required", "found", "wanted", "")
        for finding in findings:
            verdict = "ok" if finding.ok else finding.note or ("missing" if finding.found is None else "wrong version")
            table.add_row(finding.name, finding.found or "-", finding.wanted, verdict)
        print_table(table)
        _rows([(name.replace("_gib", " (GiB)").replace("_", " "), value) for name, value in machine.items()], "machine")
        _rows([(name, f"{'yes' if able else 'no'}: {why}") for name, (able, why) in abilities.items()], "it can")
    bad = [finding.name for finding in findings if not finding.ok]
    if bad:
        raise EnvironmentLacks(f"not as required: {listing(bad)}. The table says what is wanted.")
