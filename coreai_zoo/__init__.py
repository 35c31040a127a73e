"""Turns a Hugging Face checkpoint into a Core AI LanguageBundle.

A plugin decorates its hooks with `hookimpl`; what they return is in `coreai_zoo.overlay`.
"""

from coreai_zoo.hookspecs import hookimpl

__version__ = "0.1.0"

__all__ = ["__version__", "hookimpl"]
