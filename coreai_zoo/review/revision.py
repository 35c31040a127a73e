"""Builds with the code of another revision, from a git worktree that is there for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

from coreai_zoo.disk import temporary_folder
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError, listing, near_names
from coreai_zoo.plugins import Plugins

# Refuses to run a package of the repository from anywhere but the tree: a build of the wrong code must not pass for one
# of the right.
_BUILD = """
import importlib.util, json, pathlib, sys
for name, file in json.loads(sys.argv.pop(1)).items():
    spec = importlib.util.find_spec(name)
    place = str(pathlib.Path(spec.origin).resolve()) if spec and spec.origin else "no place"
    if place != file:
        sys.exit(f"error: {name} is found at {place}, not at {file}.")
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
    with temporary_folder("zoo-revision-") as folder:
        tree = folder / "tree"
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


def displaced(packages: Iterable[str]) -> dict[str, Path]:
    """Packages of this repository that Python finds somewhere else, by name: what runs is not what is there."""
    try:
        top = repository()
    except ZooError:
        return {}
    found = {name: place for name in packages if (place := _place_of(name)) is not None}
    return {name: place for name, place in found.items() if not is_source(place, top) and _begins_in(top, name)}


def _place_of(package: str) -> Path | None:
    """The file that a package or module begins with, where Python finds it."""
    spec = find_spec(package)
    return Path(spec.origin).resolve() if spec and spec.origin else None


def is_source(place: Path, top: Path) -> bool:
    """Whether a file is one of a repository, and not of what is installed in an environment that lies there."""
    return place.is_relative_to(top.resolve()) and "site-packages" not in place.parts


def _begins_in(tree: Path, package: str) -> list[Path]:
    """The files in a tree that git knows and that a package of that name may begin with."""
    patterns = [f":(glob)**/{package}{end}" for end in ("/__init__.py", ".py")]
    listed = _git("-C", str(tree), "ls-files", "-z", "--", *patterns) or ""
    return [(tree / name).resolve() for name in listed.split("\0") if name]


def _packages_in(tree: Path, packages: Iterable[str], label: str) -> dict[str, Path]:
    """The packages that this repository has in a tree, by name: the file that each begins with.

    It is where this process has it from, or else the only one of that name.

    Raises:
        BadInput: when the tree has none of them, lacks one that runs from this repository, or has several of a name.
    """
    top, tree = repository().resolve(), tree.resolve()
    own: dict[str, Path] = {}
    for name in packages:
        place = _place_of(name)
        same = tree / place.relative_to(top) if place is not None and is_source(place, top) else None
        there = [same] if same is not None and same.is_file() else _begins_in(tree, name)
        if len(there) > 1:
            shown = listing([str(file.relative_to(tree)) for file in there])
            raise BadInput(
                f"At {label} the repository has {name} {len(there)} times: {shown}.",
                "Install the one that is meant with `pip install -e .`.",
            )
        if same is not None and not there:
            raise BadInput(f"At {label} the repository has no package {name}.", "It was not there yet.")
        if there:
            own[name] = there[0]
    if not own:
        raise BadInput(
            f"At {label} the repository has none of the packages that a build runs: {listing([*packages])}.",
            "Run it in the repository of the zoo or of a plugin.",
        )
    return own


# What git sets for a hook, and what would have other commands work on the hook's repository and index.
_OF_A_HOOK = ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


def _git(*arguments: str) -> str | None:
    """The output of a git command; None when it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in _OF_A_HOOK}
    command = ["git", *arguments]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
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
    own = _packages_in(tree, plugins.packages(), label)
    command = [sys.executable, "-c", _BUILD, json.dumps({name: str(file) for name, file in own.items()})]
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


def _search_path(tree: Path, own: Mapping[str, Path]) -> list[str]:
    """The folders that Python finds modules in, those of this repository replaced by the same of `tree`."""
    top = repository()
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = [Path(entry).resolve() for entry in sys.path if entry]
    # An installer may have copied a package, or have it found without naming its folder.
    roots = [str(file.parent.parent if file.name == "__init__.py" else file.parent) for file in own.values()]
    moved = [str(tree / path.relative_to(top)) for path in found if path.is_relative_to(top)]
    # What the interpreter finds by itself it finds again, after these.
    return list(dict.fromkeys([*roots, *moved, *(str(path) for path in given if not path.is_relative_to(top))]))
