"""A bundle on the hub: what of its folder is uploaded, whether it may be, and the upload.

`huggingface_hub` 2 has no `upload_large_folder` any more. Its `upload_folder` took that one's place (read in 2.4): with
hf_xet it hashes while it uploads and commits as it goes, and run again it sends nothing twice.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import frozen

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.card import CARD, with_measurements
from coreai_zoo.bundle.layout import GATE_FOLDER, REPORT, TRANSCRIPT
from coreai_zoo.checkpoint.hub import Repository
from coreai_zoo.checkpoint.hub_client import quieten
from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, CheckFailed, EnvironmentLacks, ZooError
from coreai_zoo.json_files import read_object

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

MAIN = "main"

Verdict = Literal["passed", "failed", "none", "damaged", "of another build"]

_GATE_FILES = (TRANSCRIPT, REPORT, "logits-*.npz")  # the last ones are for the script of a bundle that brings one

_LOG_IN = (
    "Log in with `hf auth login`, or set HF_TOKEN, with a token that can write: "
    "https://huggingface.co/settings/tokens makes one."
)


# ---------------------------------------------------------------------------------------------------------------------
# What is published, and whether it may be
# ---------------------------------------------------------------------------------------------------------------------


@frozen
class Target:
    """Where a bundle goes.

    Attributes:
        repository: `owner/name`.
        revision: the branch.
    """

    repository: str
    revision: str = MAIN

    @classmethod
    def parse(cls, text: str, revision: str | None) -> Target:
        """The target that was typed.

        Raises:
            BadInput: when `text` is not the name of a repository, or the revision is not that of a branch.
        """
        repository = Repository.parse(f"{text}@{revision}" if revision is not None else text)
        if repository is None or "@" in text or (revision is None and repository.revision is not None):
            wanted = text if revision is None else f"{text} with the branch {revision}"
            raise BadInput(
                f"A bundle cannot be published to {wanted!r}: a repository is called owner/name.",
                "Both parts have letters, digits, '-', '_' and '.'; a branch is given with --revision.",
            )
        return cls(repository.id, repository.revision or MAIN)

    def __str__(self) -> str:
        return self.repository if self.revision == MAIN else f"{self.repository}, branch {self.revision}"


@frozen
class Publication:
    """What of a bundle's folder is published.

    Attributes:
        bundle: the bundle.
    """

    bundle: Bundle

    @cached_property
    def verdict(self) -> Verdict:
        """What the gate found of these very bytes; a verdict on others counts as none."""
        path = self.bundle.directory / GATE_FOLDER / TRANSCRIPT
        if not path.is_file():
            return "none"
        try:
            transcript = read_object(path)
            judged, passed = transcript["bundle"]["build_sha256"], transcript["verdict"]["passed"]
        except (ZooError, KeyError, TypeError):
            return "damaged"
        if judged != hashlib.sha256((self.bundle.directory / "build.json").read_bytes()).hexdigest():
            return "of another build"
        return "passed" if passed is True else "failed"

    def require_passed(self) -> None:
        """Refuse a bundle that has not passed its gate.

        Raises:
            CheckFailed: saying why not.
        """
        name = self.bundle.directory.name
        problem = {
            "none": f"{name} has no verdict of a gate in its folder.",
            "damaged": f"The transcript of the gate of {name} is damaged.",
            "of another build": f"The verdict of the gate of {name} is on another build of it.",
            "failed": f"{name} did not pass its gate: {GATE_FOLDER}/{REPORT} in it says why.",
        }
        if self.verdict != "passed":
            raise CheckFailed(
                problem[self.verdict],
                "Run `zoo gate` on it, without -o; --ungated publishes it as it is, and its card says so.",
            )

    @property
    def _is_judged(self) -> bool:
        return self.verdict in {"passed", "failed"}

    @cached_property
    def files(self) -> Mapping[str, Path]:
        """What is uploaded, by relative path: the files that the record names, the record, and the gate's report."""
        folder = self.bundle.directory
        names = sorted([*self.bundle.build["files"], "build.json"])
        if self._is_judged:
            names += [name for name in self._found if self._is_of_gate(name)]
        return {name: folder / name for name in names}

    @cached_property
    def skipped(self) -> tuple[str, ...]:
        """Files in the folder that are not uploaded, by relative path."""
        return tuple(name for name in self._found if name not in self.files)

    @cached_property
    def _found(self) -> list[str]:
        folder = self.bundle.directory
        paths = sorted(path for path in folder.rglob("*") if path.is_file() or path.is_symlink())
        return [path.relative_to(folder).as_posix() for path in paths]

    @staticmethod
    def _is_of_gate(name: str) -> bool:
        return any(fnmatchcase(name, f"{GATE_FOLDER}/{pattern}") for pattern in _GATE_FILES)

    @property
    def card(self) -> bytes:
        """The card as it is uploaded: where no gate judged these bytes, it says so instead of what another one did."""
        card = (self.bundle.directory / CARD).read_bytes()
        if self._is_judged:
            return card
        return with_measurements(
            card,
            "**Not gated.** It was published with `--ungated`: nothing says yet that it computes what its checkpoint "
            "computes. `zoo gate`, with the folder of this bundle and its checkpoint, finds out.",
        )


# ---------------------------------------------------------------------------------------------------------------------
# The upload
# ---------------------------------------------------------------------------------------------------------------------


def require_token() -> None:
    """Refuse to go on without a token.

    Raises:
        EnvironmentLacks: when this machine has none.
    """
    import huggingface_hub

    if not huggingface_hub.get_token():
        raise EnvironmentLacks("This machine has no token of the Hugging Face hub, which an upload needs.", _LOG_IN)


def require_access(target: Target) -> None:
    """Refuse a token that the hub does not know, before gigabytes are hashed.

    Raises:
        EnvironmentLacks: when there is no token, the hub does not know it, or cannot be asked.
    """
    import huggingface_hub

    require_token()
    quieten()
    with _explained(target):
        huggingface_hub.HfApi().whoami()


def upload(publication: Publication, target: Target, *, private: bool) -> str:
    """Upload a bundle; the repository and the branch are made where they are not there.

    Args:
        publication: what is uploaded.
        target: where to.
        private: make the repository private.

    Returns:
        The address of the page.

    Raises:
        BadInput: when the repository is to be private, and is there and public.
        CheckFailed: when the hub does not take the card.
        EnvironmentLacks: when the hub does not let this machine write, or the connection fails.
    """
    import huggingface_hub

    api = huggingface_hub.HfApi()
    with _explained(target):
        api.create_repo(target.repository, private=private or None, exist_ok=True)
        if private and not api.model_info(target.repository).private:
            raise BadInput(
                f"{target.repository} is there already, and public.",
                "Make it private on its page, or leave out --private.",
            )
        _make_branch(api, target)
        with _staged(publication) as folder:
            api.upload_folder(
                repo_id=target.repository,
                folder_path=folder,
                revision=target.revision,
                commit_message=f"{publication.bundle.build['name']}, by zoo publish",
            )
    page = f"{api.endpoint}/{target.repository}"
    return page if target.revision == MAIN else f"{page}/tree/{target.revision}"


def _make_branch(api: HfApi, target: Target) -> None:
    if target.revision != MAIN and not target.revision.startswith("refs/"):  # those are of pull requests
        api.create_branch(target.repository, branch=target.revision, exist_ok=True)


@contextlib.contextmanager
def _staged(publication: Publication) -> Iterator[Path]:
    """A folder with links to the files, and the card as it is uploaded: nothing else can get in."""
    with temporary_folder("zoo-publish-") as folder:
        for name, path in publication.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if name == CARD:
                (folder / name).write_bytes(publication.card)
            else:
                (folder / name).symlink_to(path.resolve())
        yield folder


@contextlib.contextmanager
def _explained(target: Target) -> Iterator[None]:
    """Within the block what the client raises becomes an error in one paragraph."""
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled  # type: ignore[attr-defined]

    again = "Run the same command again: what has arrived is not sent twice."
    try:
        yield
    except HfHubHTTPError as error:
        raise _refusal(error, target, again) from error
    except OfflineModeIsEnabled as error:
        raise EnvironmentLacks("HF_HUB_OFFLINE is set, so nothing can be uploaded.", "Unset it.") from error
    except ValueError as error:  # what the client raises when the hub does not take the front matter
        raise CheckFailed(f"{target.repository} does not take the bundle: {' '.join(str(error).split())}") from error
    except (HTTPError, OSError, RuntimeError) as error:  # hf_xet raises the last one
        said = " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
        raise EnvironmentLacks(f"The connection to the hub fails ({said}).", again) from error


def _refusal(error: HfHubHTTPError, target: Target, again: str) -> ZooError:
    """What an answer with an error status means."""
    status = error.response.status_code
    said = " ".join((error.server_message or "").split())[:200].rstrip(".")
    if status == 401:
        return EnvironmentLacks("The hub does not accept the token of this machine.", _LOG_IN)
    if status in {403, 404}:  # of what is private to others the hub says that it is not there
        owner = target.repository.partition("/")[0]
        return EnvironmentLacks(
            f"The token of this machine may not write to {target.repository} ({status}{said and ': '}{said}).",
            f"Publish under a name of your own, or log in with `hf auth login` and a token that may write for {owner}.",
        )
    return EnvironmentLacks(f"The hub does not take the upload ({status}{said and ': '}{said}).", again)
