"""`zoo` and `python -m coreai_zoo`: the command line, with Ctrl-C answered in one line from the first import on."""

from __future__ import annotations

from coreai_zoo import interruption


def main() -> None:
    """Entry point of `zoo`."""
    with interruption.answered():
        from coreai_zoo.cli import app

        app.main()


if __name__ == "__main__":
    main()
