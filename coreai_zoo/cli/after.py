"""What to do next with a bundle."""

from __future__ import annotations

from pathlib import Path

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.publish import Publication
from coreai_zoo.commands import say_next
from coreai_zoo.errors import zoo_command


def say_what_is_next(bundle: Bundle, called: str | Path, checkpoint: Path | None = None) -> None:
    """End a command about a bundle: gate it, and when it has passed, publish it; of a sample, talk to it.

    Args:
        bundle: the bundle.
        called: what the user calls it.
        checkpoint: the folder that the user has named.
    """
    if Publication(bundle).verdict != "passed":
        given = ["--checkpoint", checkpoint] if checkpoint else []
        say_next("compare it with Hugging Face", zoo_command("gate", called, *given))
    elif bundle.build.get("sample"):
        say_next("talk to it", zoo_command("chat", called))
    else:
        say_next("publish it", zoo_command("publish", called, "OWNER/NAME", "--dry-run"))
