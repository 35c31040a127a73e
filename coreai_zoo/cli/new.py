"""`zoo new`: an entry for a checkpoint."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import NoReturn

import click

from coreai_zoo import hookspecs
from coreai_zoo.build.source import Source
from coreai_zoo.commands import json_option, new_table, plugins_of, print_json, print_rows, print_table
from coreai_zoo.errors import BadInput, listing, zoo_command
from coreai_zoo.planning.scaffold import (
    ENTRIES,
    NEEDED_HOOKS,
    USUAL_HOOKS,
    Draft,
    draft,
    is_claimed,
    locate,
    write_draft,
)
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter


@click.command("new")
@click.argument("name")
@click.option("--from", "source", required=True, metavar="DIR|HF_ID", help="A checkpoint; its config.json will do.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help=f"Folder for NAME.toml. Default: {ENTRIES} where there is one, else this folder.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@json_option
@click.pass_context
def new(ctx: click.Context, name: str, source: str, output: Path | None, force: bool, as_json: bool) -> None:
    """Write an entry for a checkpoint.

    Reads config.json, and the headers of the weights or their index if they are there; of a repository on the hub
    only these are fetched. Says which overlay claims the architecture, what it made of the config, and what it did
    not look at. The entry is a file of facts to be read and completed: what is not known is left out. An
    architecture that no plugin claims needs an overlay first; then this says which hooks to write.

    \b
    Example:
        zoo new my-finetune --from ~/my-finetune
        zoo new qwen3.6-27b-copy --from Qwen/Qwen3.6-27B -o my_plugin/entries
        zoo build ./my-finetune.toml --checkpoint ~/my-finetune
    """
    plugins = plugins_of(ctx)
    found, like = locate(source, plugins, Reporter(silent=as_json))
    if not is_claimed(found.hf_config, plugins):
        _explain_unclaimed(str(found.hf_config.get("model_type")), as_json=as_json)
    made = draft(name, found, plugins, like)
    path = write_draft(made, output, force=force)
    if as_json:
        print_json(
            {
                "entry": name,
                "path": str(path),
                "overlay": made.model.overlay.name,
                "plugin": made.model.plugin,
                "model_type": made.model.model_type,
                "facts": dict(made.model.facts),
                "not_looked_at": list(made.unread),
                "weights": {"fit": made.fits, "detail": made.weights} if made.weights else None,
                "same_facts_as": made.twin.name if made.twin else None,
                "not_known": list(made.unknown),
            }
        )
    else:
        _print(made, found, path, plugins)


def _print(made: Draft, source: Source, path: Path, plugins: Plugins) -> None:
    model = made.model
    rows: list[tuple[str, object]] = [
        ("overlay", f"{model.overlay.name} of plugin {model.plugin} claims {model.model_type}"),
        ("recognised", ", ".join(f"{fact} {value}" for fact, value in model.facts.items())),
        ("not looked at", ", ".join(made.unread) or "nothing"),
        ("weights", made.weights or "none here; a build compares them with the overlay's table"),
        ("not known", f"{listing([*made.unknown])}: add what you can name a source for"),
    ]
    if made.twin:
        rows.append(("same facts as", f"{made.twin.name}: a fine-tune of it can be built as that entry, too"))
    print_rows(rows)
    brought = any(path.resolve() == other.resolve() for _, other in plugins.entries())
    entry = path.stem if brought else path
    click.echo(f"\nWrote {path}. Read it, then:\n    {zoo_command('plan', entry)}")
    if source.hub is not None or source.directory is None:
        click.echo(f"    {zoo_command('build', entry)}")
    else:
        if made.weights is None:
            click.echo(
                f"A build needs weights and tokenizer, which are not in {source.directory}; put them there, then:"
            )
        click.echo(f"    {zoo_command('build', entry, '--checkpoint', source.directory)}")
    if not brought:
        click.echo("A plugin that lists the file in zoo_entries makes the name alone enough.")


def _explain_unclaimed(model_type: str, *, as_json: bool) -> NoReturn:
    """Say what it takes to bring an architecture in, then fail."""
    if not as_json:
        click.echo(f"No plugin claims {model_type!r}. A plugin that brings it implements:\n")
        table = new_table("hook", "", "what it does")
        for hooks, need in ((NEEDED_HOOKS, "needed"), (USUAL_HOOKS, "usual")):
            for hook in hooks:
                table.add_row(hook, need, (inspect.getdoc(getattr(hookspecs, hook)) or "").splitlines()[0])
        print_table(table)
        click.echo(
            "\nThe overlay that zoo_claim_overlay returns is the decoder, re-authored for export, with what the host\n"
            "has to know of it: coreai_zoo.overlay.Overlay. If the architecture differs from a claimed one in a\n"
            "layer, a subclass of that overlay and a LayerRewrite may be all.\n"
        )
    raise BadInput(
        f"The architecture {model_type!r} is claimed by no plugin, so no entry was written.",
        f"Write the hooks {listing([*NEEDED_HOOKS])}, and {listing([*USUAL_HOOKS])} as needed: "
        "docs/tutorial.md, docs/hooks.md and docs/overlay.md (Writing one) show how.",
    )
