"""Builds with the code of another revision, from a git worktree that is there for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path

from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError, listing, near_names
from coreai_zoo.plugins import Plugins

# Refuses to run a package of the repository from anywhere but the tree: a build of the wrong code must not pass for one
# of the right.
_BUILD = """
import importlib.util, json, pathlib, sys
for name, files in json.loads(sys.argv.pop(1)).items():
    spec = importlib.util.find_spec(name)
    place = str(pathlib.Path(spec.origin).resolve()) if spec and spec.origin else "no place"
    if place not in files:
        sys.exit(f"error: {name} is found at {place}, not at {files[0]}.")
try:
    from coreai_zoo.cli.app import main
except ImportError:  # before the commands had a folder
    from coreai_zoo.cli import main
main()
"""


@contextlib.contextmanager
def worktree(revision: str | None) -> Iterator[Path]:
    """A folder with the code at `revision`, removed afterwards, also when interrupted; with None, the working tree.

    Raises:
        BadInput: when this is no git repository, or it has no such revision.
        EnvironmentLacks: when git is not installed.
    """
    top = repository()
    if revision is None:
        yield top
        return
    commit = _git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{revision}^{{commit}}")
    if commit is None:
        names = (_git("for-each-ref", "--format=%(refname:short)") or "").split()
        hint = near_names(revision, ["HEAD", *names]) or "Name a commit, a tag or a branch: `git log` lists."
        raise BadInput(f"The repository {top} has no revision {revision!r}.", hint)
    with tempfile.TemporaryDirectory(prefix="zoo-revision-") as folder:
        tree = Path(folder) / "tree"
        try:
            if _git("worktree", "add", "--quiet", "--detach", str(tree), commit) is None:
                raise BadInput(f"git cannot check out {revision!r} into {tree}.")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def repository() -> Path:
    """The top folder of the repository that the working directory is in.

    Raises:
        BadInput: when it is in none.
    """
    top = _git("rev-parse", "--show-toplevel")
    if top is None:
        raise BadInput(
            f"{Path.cwd()} is not in a git repository, and --rev compares revisions of one.",
            "Run it in the repository whose change is to be reviewed.",
        )
    return Path(top)


def base_revision() -> str:
    """The revision that a change is most often compared with, as a command takes it."""
    try:
        branches = [name for name in ("main", "master") if _git("rev-parse", "--verify", "--quiet", name)]
    except EnvironmentLacks:
        branches = []
    return (branches or ["HEAD"])[0]


def displaced(packages: Iterable[str]) -> dict[str, str]:
    """Packages of this repository that Python finds somewhere else, by name: what runs is not what is there."""
    try:
        own = _packages_in(repository(), packages)
    except ZooError:
        return {}
    specs = {name: find_spec(name) for name in own}
    places = {name: str(Path(spec.origin).resolve()) for name, spec in specs.items() if spec and spec.origin}
    return {name: place for name, place in places.items() if place not in own[name]}


def _packages_in(tree: Path, packages: Iterable[str]) -> dict[str, list[str]]:
    """The packages that a repository has in a tree, by name: the files that they begin with."""
    own = {}
    for name in packages:
        patterns = [f"{folder}{name}{end}" for folder in ("", "*/") for end in ("/__init__.py", ".py")]
        listed = _git("-C", str(tree), "ls-files", "--cached", "--others", "--exclude-standard", "--", *patterns)
        if listed:
            own[name] = [str((tree / line).resolve()) for line in listed.splitlines()]
    return own


def _git(*arguments: str) -> str | None:
    """The output of a git command; None when it fails."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)  # noqa: S607  # on PATH
    except FileNotFoundError as error:
        raise EnvironmentLacks("git is not installed.", "Install it: --rev checks out revisions with it.") from error
    return done.stdout.strip() if done.returncode == 0 else None


def build_sample(
    entry: str,
    recipe: str | None,
    tree: Path,
    output: Path,
    label: str,
    plugins: Plugins,
    *,
    backend: str | None = None,
    contract: str | None = None,
) -> Path:
    """Build the sample of `entry` with the code in `tree`; the folder of the bundle.

    Args:
        entry: name of the entry, or the path of its file.
        recipe: name of a recipe; None for the entry's.
        tree: top folder of the code.
        output: folder in which the bundle's folder is made.
        label: names the code in an error.
        plugins: what is installed: a package of theirs that the repository has is taken from the tree.
        backend: name of a backend; None for the default.
        contract: name of a contract; None for the entry's.

    Raises:
        BadInput: when the code there does not build it, with the reason.
    """
    packages = plugins.packages()
    own = _packages_in(tree, packages)
    if not own:
        raise BadInput(
            f"At {label} the repository has none of the packages that a build runs: {listing(packages)}.",
            "Run it in the repository of the zoo or of a plugin.",
        )
    command = [sys.executable, "-c", _BUILD, json.dumps(own)]
    for left_out in plugins.without:
        command += ["--without", left_out]
    command += ["build", entry, "--sample", "--json", "-o", str(output)]
    command += ["--recipe", recipe] if recipe else []
    command += ["--backend", backend] if backend else []
    command += ["--contract", contract] if contract else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path(tree, own))}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BadInput(
            f"The code at {label} does not build the sample of {entry}: {reason[0].removeprefix('error: ')}",
            "The code there has to build with the packages that are installed now.",
        )
    return Path(json.loads(done.stdout)["path"])


def _search_path(tree: Path, own: Mapping[str, Sequence[str]]) -> list[str]:
    """The folders that Python finds modules in, those of this repository replaced by the same of `tree`."""
    top = repository()
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = [Path(entry).resolve() for entry in sys.path if entry]
    # An installer may have copied a package, or have it found without naming its folder.
    begins = [Path(file) for files in own.values() for file in files[:1]]
    roots = [str(file.parent.parent if file.name == "__init__.py" else file.parent) for file in begins]
    moved = [str(tree / path.relative_to(top)) for path in found if path.is_relative_to(top)]
    # What the interpreter finds by itself it finds again, after these.
    return list(dict.fromkeys([*roots, *moved, *(str(path) for path in given if not path.is_relative_to(top))]))
