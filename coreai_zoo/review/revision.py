"""Builds with the code of another revision, from a git worktree that is there for as long as it is needed."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path

from coreai_zoo.errors import BadInput, EnvironmentLacks, near_names
from coreai_zoo.plugins import Plugins

# Refuses to run code of the repository from anywhere but the tree, or none of it: a build of the wrong code must not
# pass for one of the right.
_BUILD = """
import importlib.util, pathlib, sys, sysconfig
tree, packages = pathlib.Path(sys.argv.pop(1)).resolve(), sys.argv.pop(1).split()
installed = pathlib.Path(sysconfig.get_path("purelib")).resolve()
found = {}
for spec in filter(None, map(importlib.util.find_spec, packages)):
    place = pathlib.Path(next(iter(spec.submodule_search_locations or [spec.origin]))).resolve()
    found[spec.name] = place, place.is_relative_to(tree) and not place.is_relative_to(installed)
for name, (place, ours) in found.items():
    if not ours and any([*tree.glob(f"{name}/__init__.py"), *tree.glob(f"*/{name}/__init__.py")]):
        sys.exit(f"error: {name} is found at {place}, not in {tree}.")
if not any(ours for _, ours in found.values()):
    places = [f"{name} is found at {found[name][0]}" if name in found else f"{name} is not found" for name in packages]
    sys.exit(f"error: {', '.join(places)}: nothing of {tree}.")
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


def displaced(folder: Path, packages: Iterable[str]) -> dict[str, Path]:
    """Packages of a repository that Python finds somewhere else, by name: what runs is not what is there."""
    found = {}
    for name in packages:
        spec = find_spec(name)
        here = [*folder.glob(f"{name}/__init__.py"), *folder.glob(f"*/{name}/__init__.py")]
        if spec is None or not here or spec.origin is None:
            continue
        if Path(spec.origin).resolve() not in [path.resolve() for path in here]:
            found[name] = Path(spec.origin)
    return found


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
    command = [sys.executable, "-c", _BUILD, str(tree), " ".join(plugins.packages())]
    for left_out in plugins.without:
        command += ["--without", left_out]
    command += ["build", entry, "--sample", "--json", "-o", str(output)]
    command += ["--recipe", recipe] if recipe else []
    command += ["--backend", backend] if backend else []
    command += ["--contract", contract] if contract else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(_search_path(tree, plugins.packages()))}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        reason = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise BadInput(
            f"The code at {label} does not build the sample of {entry}: {reason[0].removeprefix('error: ')}",
            "It has to run in the repository that zoo or a plugin is installed from (pip install -e .), and the code "
            "has to build.",
        )
    return Path(json.loads(done.stdout)["path"])


def _search_path(tree: Path, packages: Iterable[str]) -> list[str]:
    """The folders that Python finds modules in, these packages too, those of this repository replaced by `tree`'s."""
    top = repository()
    given = [Path(entry).resolve() for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    found = [Path(entry).resolve() for entry in sys.path if entry]
    # An installer may have one found without naming its folder there.
    for spec in filter(None, map(find_spec, packages)):
        found += [Path(place).resolve().parent for place in spec.submodule_search_locations or [spec.origin or ""]]
    moved = [str(tree / path.relative_to(top)) for path in found if path.is_relative_to(top)]
    # What the interpreter finds by itself it finds again, after these.
    return list(dict.fromkeys([*moved, *(str(path) for path in given if not path.is_relative_to(top))]))
