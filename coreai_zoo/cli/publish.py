"""`zoo publish`: a bundle on the Hugging Face hub."""

from __future__ import annotations

import contextlib
import shlex
import sys
from collections.abc import Iterator
from typing import Any

import attrs
import click

from coreai_zoo.backend import Check
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import find_bundle
from coreai_zoo.bundle.publish import Publication, Target
from coreai_zoo.cli.completion import complete_bundle
from coreai_zoo.commands import Column, json_option, new_table, plugins_of, print_json, print_table, say_next
from coreai_zoo.dtypes import size
from coreai_zoo.errors import CheckFailed, EnvironmentLacks, argument, zoo_command
from coreai_zoo.progress import Reporter


@click.command("publish")
@click.argument("bundle", metavar="BUNDLE", shell_complete=complete_bundle)
@click.argument("repo")
@click.option("--private", is_flag=True, help="Make the repository private.")
@click.option("--revision", metavar="R", help="Branch to upload to; made if it is not there. Default: main.")
@click.option("--ungated", is_flag=True, help="Publish a bundle that has not passed its gate; its card says so.")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded and what would be refused; upload nothing.")
@json_option
@click.pass_context
def publish(
    ctx: click.Context,
    /,
    bundle: str,
    repo: str,
    private: bool,
    revision: str | None,
    ungated: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload a bundle to the Hugging Face hub, with its card.

    BUNDLE is a path or a name, as for `zoo gate`. REPO is owner/name; it is made where it is not there. The bundle is
    verified first, and refused unless `zoo gate` has passed these very bytes. The files that its record names are
    uploaded, and the gate's report, and nothing else that lies in the folder. An upload that broke off goes on when it
    is run again.

    \b
    Example:
        zoo publish exports/qwen3_6_27b_decode_int8hu_block32_sym me/Qwen3.6-27B-coreai
        zoo publish BUNDLE me/Qwen3.6-27B-coreai --private --dry-run
    """
    from coreai_zoo.bundle import publish as publishing

    target = Target.parse(repo, revision)
    publication = Publication(Bundle.open(find_bundle(bundle, plugins_of(ctx))))
    if dry_run:
        lacks_token = _try(ctx, publication, target, ungated=ungated, private=private, as_json=as_json)
        if lacks_token and not as_json:
            say_next("log in", "hf auth login")
        elif not as_json:
            flags = [flag for flag, given in (("--private", private), ("--ungated", ungated)) if given]
            branch = ["--revision", revision] if revision else []
            say_next("upload it", zoo_command("publish", argument(bundle), repo, *flags, *branch))
        return
    if not ungated:
        publication.require_passed()
    publishing.require_access(target)  # before gigabytes are hashed
    report = Reporter(silent=as_json)
    with report.stage("verify", publication.bundle.directory.name):
        _require(_checks(ctx, publication))
    if publication.skipped:
        report.note(f"not uploaded: {', '.join(publication.skipped)}")
    try:
        detail = f"{len(publication.files)} files, {size(sum(_sizes(publication).values()))}, to {target}"
        with report.stage("upload", detail), _clients_bars(shown=not as_json):
            page = publishing.upload(publication, target, private=private)
    except KeyboardInterrupt:
        command = shlex.join([str(ctx.find_root().info_name), *sys.argv[1:]])
        click.echo(f"\nWhat has arrived is kept. To go on, run:\n    {command}", err=True)
        raise
    if as_json:
        print_json(_described(publication, target, private=private) | {"page": page})
    else:
        click.echo(page)
        words = ["hf", "download", target.repository, *(["--revision", revision] if revision else [])]
        words += ["--local-dir", publication.bundle.directory.name]
        say_next("fetch it where it is to run", shlex.join(words))


def _try(
    ctx: click.Context, publication: Publication, target: Target, *, ungated: bool, private: bool, as_json: bool
) -> bool:
    """Print what would be uploaded, and fail as the upload would; whether a token is lacking, which is not needed."""
    from coreai_zoo.bundle.publish import require_token

    refusals: list[CheckFailed] = []
    token: str | None = None
    try:
        if not ungated:
            publication.require_passed()
    except CheckFailed as error:
        refusals.append(error)
    try:
        _require(_checks(ctx, publication))
    except CheckFailed as error:
        refusals.append(error)
    try:
        require_token()
    except EnvironmentLacks as error:
        token = str(error)
    if as_json:
        refused = [str(refusal) for refusal in refusals]
        print_json(
            _described(publication, target, private=private) | {"refused": refused, "token": token, "page": None}
        )
    else:
        table = new_table("file", Column("bytes", number=True))
        sizes = _sizes(publication)
        for name, count in sizes.items():
            table.add_row(name, f"{count:,}")
        print_table(table)
        kind = "private repository" if private else "repository"
        click.echo(f"\n{len(sizes)} files, {size(sum(sizes.values()))}, to the {kind} {target}; nothing was uploaded.")
        if publication.skipped:
            click.echo(f"Would not be uploaded: {', '.join(publication.skipped)}.")
        for said in [*map(str, refusals[1:]), *([token] if token else [])]:
            click.echo(f"Would be refused: {said}")
    if refusals:
        raise refusals[0]
    return token is not None


def _checks(ctx: click.Context, publication: Publication) -> list[Check]:
    from coreai_zoo.bundle.verify import verify

    plugins = plugins_of(ctx)
    return verify(
        publication.bundle,
        plugins.backends(),
        plugins.tokenizer_classes(),
        recipes=plugins.recipes(),
        recorded_only=True,
    )


def _require(checks: list[Check]) -> None:
    from coreai_zoo.bundle.verify import require

    require(checks)


def _sizes(publication: Publication) -> dict[str, int]:
    """Bytes of each file that is uploaded, by relative path; 0 of one that is missing."""
    return {name: path.stat().st_size if path.is_file() else 0 for name, path in publication.files.items()}


def _described(publication: Publication, target: Target, *, private: bool) -> dict[str, Any]:
    return {
        "bundle": publication.bundle.build["name"],
        **attrs.asdict(target),
        "private": private,
        "gate": publication.verdict,
        "files": _sizes(publication),
        "skipped": list(publication.skipped),
    }


@contextlib.contextmanager
def _clients_bars(*, shown: bool) -> Iterator[None]:
    """Within the block the client shows its progress, or does not."""
    from huggingface_hub import utils

    if shown or utils.are_progress_bars_disabled():  # type: ignore[attr-defined]  # these are exported lazily
        yield
        return
    utils.disable_progress_bars()  # type: ignore[attr-defined]
    try:
        yield
    finally:
        utils.enable_progress_bars()  # type: ignore[attr-defined]
