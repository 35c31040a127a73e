"""The host's own plugin: the backends that come with it."""

from __future__ import annotations

from collections.abc import Iterable

from coreai_zoo import hookimpl
from coreai_zoo.backend import Backend


@hookimpl
def zoo_backends() -> Iterable[Backend]:
    """Core AI and Core ML."""
    from coreai_zoo.backends.coreai.backend import CoreAIBackend
    from coreai_zoo.backends.coreml.backend import CoreMLBackend

    return (CoreAIBackend(), CoreMLBackend())
