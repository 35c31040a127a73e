"""Turns a Hugging Face checkpoint into a Core AI LanguageBundle.

A plugin decorates its hooks with `hookimpl`; what they return is in `coreai_zoo.overlay`.
"""

TYPE_CHECKING = False  # the one of `typing`, which takes longer to import than everything up to there
if TYPE_CHECKING:
    from coreai_zoo.hookspecs import hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "hookimpl"]


def __getattr__(name: str) -> object:
    # `hookimpl` is imported when it is asked for: `zoo` answers Ctrl-C as soon as this package is imported.
    if name == "hookimpl":
        from coreai_zoo.hookspecs import hookimpl

        return hookimpl
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
