"""What to do next with a bundle."""

from __future__ import annotations

from pathlib import Path

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.find import checkpoint_of, fetch_command
from coreai_zoo.bundle.publish import Publication
from coreai_zoo.commands import say_next
from coreai_zoo.errors import ZooError, argument, zoo_command
from coreai_zoo.plugins import Plugins


def say_what_is_next(bundle: Bundle, called: str | Path, plugins: Plugins, checkpoint: Path | None = None) -> None:
    """End a command about a bundle: gate it, and when it has passed, publish it; of a sample, talk to it.

    Args:
        bundle: the bundle.
        called: what the user calls it.
        plugins: bring the entry of a sample.
        checkpoint: the folder that the user has named.
    """
    called = argument(called)
    if Publication(bundle).verdict != "passed":
        given: list[str | Path] = ["--checkpoint", checkpoint] if checkpoint else []
        fetching = None
        try:
            checkpoint_of(bundle, plugins, checkpoint)
        except ZooError:  # it is not where it could be found: nothing stays of one that was streamed
            fetching = fetch_command(bundle)
            given = [] if fetching else ["--checkpoint", "DIR"]
        gate = zoo_command("gate", called, *given)
        if fetching:
            say_next("fetch the whole checkpoint, and compare it with that", f"{fetching} && {gate}")
        else:
            say_next("compare it with Hugging Face", gate)
    elif bundle.build.get("sample"):
        say_next("talk to it", zoo_command("chat", called))
    else:
        say_next("publish it", zoo_command("publish", called, "OWNER/NAME", "--dry-run"))
