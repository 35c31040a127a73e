"""The versions that a backend is written against, because its toolchain is a beta or it uses private parts of it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from coreai_zoo.errors import EnvironmentLacks


def checked_versions(required: Mapping[str, str]) -> dict[str, str]:
    """The installed versions by distribution, which are those that are required.

    Raises:
        EnvironmentLacks: naming the first that is missing or another version, with the command that installs it.
    """
    found: dict[str, str] = {}
    for distribution, version in required.items():
        install = f"Install it with: pip install {distribution}=={version}"
        try:
            found[distribution] = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            raise EnvironmentLacks(f"{distribution} is not installed.", install) from None
        if found[distribution] != version:
            raise EnvironmentLacks(
                f"{distribution} is {found[distribution]}, and this version of the zoo is written against {version}.",
                install,
            )
    return found
