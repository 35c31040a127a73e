"""The folders of a build: where an asset is laid out, what of it a later build can use, and what is left over."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import attrs
import pytest
import torch

from coreai_zoo.build.workspace import Workspace
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.json_files import write_json
from coreai_zoo.layout import Layout
from coreai_zoo.overlay import ParameterInfo, WeightMap, WeightRule
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.weights.journal import canonical
from coreai_zoo.weights.plan import WeightPlan, plan_weights
from coreai_zoo.weights.store import JOURNAL, FillReport, Place
from disks import small_disks
from test_store import write

NAMES = ("a", "b")
ROWS = 1000
BYTES = ROWS * 64 * 2
LAYOUT = Layout("in/weights", (b"head", "a", b"-", "b", b"tail"), dict.fromkeys(NAMES, BYTES), {"meta": b"data"}, "sum")
OTHER = attrs.evolve(LAYOUT, pieces=("b", b"other", "a"))


@attrs.frozen
class Builds:
    """Builds of one checkpoint in one place."""

    checkpoint: Checkpoint
    workspace: Workspace

    @property
    def plan(self) -> WeightPlan:
        rules = WeightMap(tuple(WeightRule(name, name, "mlp") for name in NAMES))
        parameters = {name: ParameterInfo((ROWS, 64), "float16") for name in NAMES}
        return plan_weights(rules, parameters, self.checkpoint.tensors, RECIPES["fp16"])

    def run(self, layout: Layout, *, fail: BaseException | None = None, publish: bool = False) -> FillReport:
        """Lay out, fill, fail or publish."""
        with self.workspace.opened(force=True):
            store = self.workspace.store
            bundle = self.workspace.lay_out(layout, "asset", store)
            assert sorted(path.name for path in bundle.iterdir()) == ["asset"]
            file = bundle / "asset" / layout.path
            places = {name: Place(file, start) for name, start in layout.room.items()}
            filled = store.fill(self.plan, self.checkpoint, places=places)
            assert file.read_bytes() == self.expected(layout)
            assert (bundle / "asset" / "meta").read_bytes() == b"data"
            write_json(bundle / "build.json", {"schema": 2, "zoo": "of a stage that comes later", "files": {}})
            if fail is not None:
                raise fail
            if publish:
                self.workspace.publish(bundle, store)
        return filled

    def interrupted(self, layout: Layout, error: BaseException | None = None) -> None:
        error = error or KeyboardInterrupt()
        with pytest.raises(type(error)):
            self.run(layout, fail=error)

    def expected(self, layout: Layout) -> bytes:
        values = {name: self.checkpoint.read_rows(name, 0, ROWS).half().numpy().tobytes() for name in NAMES}
        return b"".join(values[piece] if isinstance(piece, str) else piece for piece in layout.pieces)

    @property
    def folders(self) -> set[str]:
        partial = self.workspace.partial
        return {path.name for path in partial.iterdir() if path.is_dir()} if partial.is_dir() else set()

    @property
    def left_over(self) -> set[str]:
        return {path.name for path in self.workspace.destination.parent.iterdir()}


@pytest.fixture
def builds(tmp_path: Path) -> Builds:
    checkpoint = write(tmp_path / "checkpoint", {name: torch.randn(ROWS, 64) for name in NAMES})
    return Builds(checkpoint, Workspace.of(tmp_path / "out", "toy", None, keep=False))


def test_an_interrupted_build_goes_on_in_the_folder_that_it_has(builds: Builds) -> None:
    builds.interrupted(LAYOUT)
    before = builds.folders
    builds.interrupted(LAYOUT, EnvironmentLacks("It lacks something."))
    assert builds.folders == before and len(before) == 1
    assert builds.run(LAYOUT, publish=True).computed == 0
    assert builds.left_over == {"toy"}
    assert (builds.workspace.destination / "asset" / "in/weights").read_bytes() == builds.expected(LAYOUT)


def test_a_build_that_failed_for_good_leaves_nothing(builds: Builds) -> None:
    builds.interrupted(LAYOUT)
    builds.interrupted(LAYOUT, BadInput("It is wrong."))
    assert builds.left_over == set()


def test_what_a_user_wants_to_keep_stays_after_a_failure(builds: Builds) -> None:
    builds = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=True))
    builds.interrupted(LAYOUT, BadInput("It is wrong."))
    assert builds.run(LAYOUT).computed == 0


def test_finished_weights_are_taken_along_into_another_layout(builds: Builds) -> None:
    builds.interrupted(LAYOUT)
    (first,) = builds.folders
    builds.interrupted(OTHER)
    assert first in builds.folders and len(builds.folders) == 2, "until the next build nothing is sure of the copy"
    assert builds.run(OTHER).computed == 0
    assert first not in builds.folders
    assert builds.run(LAYOUT, publish=True).computed == 0
    assert builds.left_over == {"toy"}


def test_a_file_that_was_cut_off_or_replaced_is_laid_out_anew(builds: Builds) -> None:
    builds.interrupted(LAYOUT)
    (file,) = builds.workspace.partial.rglob("weights")
    os.truncate(file, LAYOUT.size - 10)
    assert builds.run(LAYOUT).computed == 2, "nothing is known of it any more"
    shutil.rmtree(builds.workspace.partial)
    assert builds.run(LAYOUT).computed == 2


def test_a_copy_of_an_interrupted_build_is_a_build_of_its_own(builds: Builds, tmp_path: Path) -> None:
    """What is written in one of them afterwards is not taken for what the other one wrote."""
    values = {name: torch.randn(ROWS, 64) for name in NAMES}
    builds.interrupted(LAYOUT)
    shutil.copytree(tmp_path / "out", tmp_path / "copy")
    other = attrs.evolve(builds, checkpoint=write(tmp_path / "another", values))
    other.interrupted(LAYOUT)
    copied = attrs.evolve(builds, workspace=Workspace.of(tmp_path / "copy", "toy", None, keep=False))
    assert copied.run(LAYOUT, publish=True).computed == 0
    assert other.run(LAYOUT, publish=True).computed == 0


def test_two_checkpoints_in_turns_in_one_folder_are_not_mixed(builds: Builds, tmp_path: Path) -> None:
    other = attrs.evolve(builds, checkpoint=write(tmp_path / "another", {n: torch.randn(ROWS, 64) for n in NAMES}))
    for each in (builds, other, builds):
        each.interrupted(LAYOUT)  # which compares the file with what it has to be
    assert builds.run(LAYOUT, publish=True).computed == 0


def test_what_is_no_part_of_a_bundle_is_not_in_it(builds: Builds) -> None:
    builds.interrupted(LAYOUT)
    (weights,) = builds.workspace.partial.rglob("weights")
    asset = weights.parents[1]
    for path in (asset / ".DS_Store", asset / "in" / "more", asset / "extra" / "file", asset.parent / "extra" / "file"):
        path.parent.mkdir(exist_ok=True)
        path.write_text("foreign")
    (asset / "meta").unlink()
    (asset / "meta").mkdir()
    assert builds.run(LAYOUT, publish=True).computed == 0
    found = {
        path.relative_to(builds.workspace.destination).as_posix() for path in builds.workspace.destination.rglob("*")
    }
    assert found == {"asset", "asset/meta", "asset/in", "asset/in/weights", "build.json"}


def test_a_link_to_the_weights_is_not_published(builds: Builds, tmp_path: Path) -> None:
    builds.interrupted(LAYOUT)
    (weights,) = builds.workspace.partial.rglob("weights")
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    builds.run(LAYOUT, publish=True)
    assert not (builds.workspace.destination / "asset" / "in" / "weights").is_symlink()


@pytest.mark.parametrize("name", ["toy", ".toy.partial"])
def test_what_is_no_folder_is_not_taken_for_one(builds: Builds, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "empty").mkdir()
    for make in (
        lambda path: path.write_text(""),
        lambda path: path.symlink_to(tmp_path),
        lambda path: path.symlink_to(tmp_path / "empty"),
    ):
        make(tmp_path / "out" / name)
        with pytest.raises(BadInput, match="exists and is no folder"):
            builds.run(LAYOUT)
        (tmp_path / "out" / name).unlink()


def test_a_kept_journal_finds_the_weights_in_the_bundle(builds: Builds) -> None:
    keeping = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=True))
    assert keeping.run(LAYOUT, publish=True).computed == 2
    assert keeping.left_over == {"toy", ".zoo-work"}
    work = keeping.workspace.work
    assert [path.name for path in work.iterdir()] == ["journal.jsonl"], "it takes no room"
    assert keeping.run(OTHER, publish=True).computed == 0
    assert (keeping.workspace.destination / "asset" / "in/weights").read_bytes() == builds.expected(OTHER)
    # Somebody else's bundle of the same length takes its place.
    (keeping.workspace.destination / "asset" / "in/weights").write_bytes(bytes(OTHER.size))
    again = keeping.run(OTHER, publish=True)
    assert (again.computed, again.repaired) == (2, ()), "nothing of ours was damaged"
    assert builds.run(OTHER, publish=True).computed == 0
    assert builds.left_over == {"toy"}, "it is not asked to be kept any more"


def test_folders_that_were_moved_or_are_reached_by_another_path_are_the_same(builds: Builds, tmp_path: Path) -> None:
    builds.interrupted(LAYOUT)
    before = builds.folders
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "out").symlink_to(tmp_path / "moved")
    assert builds.run(LAYOUT).computed == 0
    (tmp_path / "out").unlink()
    there = attrs.evolve(builds, workspace=Workspace.of(tmp_path / "moved", "toy", None, keep=False))
    assert there.run(LAYOUT).computed == 0
    assert there.folders == before


@pytest.mark.parametrize("keep", [False, True])
def test_the_store_of_an_older_zoo_is_not_believed_and_goes(builds: Builds, keep: bool) -> None:
    builds = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=keep))
    work = builds.workspace.work
    work.mkdir(parents=True)
    entry = {"name": "a", "fingerprint": "f", "files": {"data": {"bytes": 5, "sha256": "0" * 64}}}
    check = hashlib.sha256(canonical(entry)).hexdigest()
    (work / JOURNAL).write_bytes(canonical({**entry, "check": check}) + b"\n")
    (work / "a.data").write_bytes(b"large")
    report = builds.run(LAYOUT, publish=True)
    assert (report.computed, report.repaired) == (2, ())
    assert builds.left_over == {"toy", *([".zoo-work"] if keep else [])}
    assert not keep or [path.name for path in work.iterdir()] == [JOURNAL]


def test_a_work_folder_that_cannot_be_is_refused_before_anything_else(builds: Builds) -> None:
    builds = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=True))
    builds.workspace.work.parent.mkdir(parents=True)
    builds.workspace.work.write_text("a file")
    with pytest.raises(BadInput, match=r"work directory .* cannot be used"), builds.workspace.opened(force=False):
        pytest.fail("it was opened")
    assert builds.workspace.work.read_text() == "a file"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for an asset and a half."""
    with small_disks(tmp_path / "disk") as make:
        yield make(str(3 * BYTES))


def test_an_earlier_layout_makes_room_where_there_is_none_for_both(builds: Builds, small_disk: Path) -> None:
    there = attrs.evolve(builds, workspace=Workspace.of(small_disk, "toy", None, keep=False))
    there.interrupted(LAYOUT)
    report = there.run(OTHER, publish=True)
    assert (report.computed, report.repaired) == (2, ()), "nothing was damaged"
    assert there.left_over == {"toy"}


def test_room_is_taken_before_a_weight_is_computed(builds: Builds, small_disk: Path) -> None:
    there = attrs.evolve(builds, workspace=Workspace.of(small_disk, "toy", None, keep=False))
    large = attrs.evolve(LAYOUT, sizes={"a": BYTES, "b": 3 * BYTES})
    with pytest.raises(EnvironmentLacks) as refused:
        there.run(large)
    partial, free = there.workspace.partial, shutil.disk_usage(small_disk).free
    assert re.match(
        rf"There is no space left for {partial}\S* \(No space left on device; [\d,]+ bytes are free\)",
        str(refused.value),
    )
    assert int(re.findall(r"([\d,]+) bytes", str(refused.value))[0].replace(",", "")) <= free
    assert "run the same command again to go on" in refused.value.hint
    assert there.left_over == set()


def test_a_work_folder_without_room_is_named_and_the_build_goes_on_elsewhere(builds: Builds, small_disk: Path) -> None:
    (small_disk / "full").write_bytes(bytes(shutil.disk_usage(small_disk).free - 4096))  # for the lock
    there = attrs.evolve(
        builds, workspace=Workspace.of(builds.workspace.destination.parent, "toy", small_disk, keep=True)
    )
    with pytest.raises(BadInput, match=rf"work directory {small_disk}\S* cannot be used: No space left.*--work-dir"):
        there.run(LAYOUT, publish=True)
    again = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=True))
    assert again.run(LAYOUT, publish=True).computed == 0


@pytest.mark.parametrize("number", range(1, 5))
def test_a_disk_that_fails_is_named_and_the_next_build_goes_on(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    left, genuine = [number], os.fsync

    def failing(descriptor: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.EIO, "Input/output error")
        genuine(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(EnvironmentLacks) as failed:
            builds.run(LAYOUT)
    assert str(builds.workspace.partial) in failed.value.message and "Input/output error" in failed.value.message
    assert "run the same command again to go on" in failed.value.hint
    assert builds.run(LAYOUT, publish=True).computed <= 2 and builds.left_over == {"toy"}


def test_a_journal_that_cannot_be_read_is_told_once(builds: Builds) -> None:
    (builds.workspace.partial / JOURNAL).mkdir(parents=True)
    with pytest.raises(EnvironmentLacks, match=r"journal\.jsonl cannot be written or read: Is a directory") as failed:
        builds.run(LAYOUT)
    assert "Finished weights" not in str(failed.value)


def test_weights_that_made_room_are_not_said_to_be_kept(builds: Builds, small_disk: Path) -> None:
    there = attrs.evolve(builds, workspace=Workspace.of(small_disk, "toy", None, keep=False))
    there.interrupted(LAYOUT)
    with pytest.raises(EnvironmentLacks) as refused:
        there.run(attrs.evolve(OTHER, sizes={"a": BYTES, "b": 3 * BYTES}))
    assert "kept" not in str(refused.value)


def test_an_empty_folder_of_the_user_stays(builds: Builds, tmp_path: Path) -> None:
    (tmp_path / "mine" / ".zoo-work").mkdir(parents=True)
    workspace = Workspace.of(tmp_path / "out", "toy", tmp_path / "mine" / ".zoo-work", keep=False)
    attrs.evolve(builds, workspace=workspace).run(LAYOUT, publish=True)
    assert (tmp_path / "mine" / ".zoo-work").is_dir() and list((tmp_path / "mine" / ".zoo-work").iterdir()) == []


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("renames", range(3))
def test_a_build_that_is_killed_while_it_publishes_is_finished_or_undone(
    builds: Builds, monkeypatch: pytest.MonkeyPatch, renames: int, replaces: bool, keep: bool
) -> None:
    """At each of its renames; a kill leaves everything as it is, so what happens after one is left out here."""
    if replaces:
        builds.run(OTHER, publish=True)
    builds = attrs.evolve(builds, workspace=attrs.evolve(builds.workspace, keep=keep))
    builds.interrupted(LAYOUT)
    child = os.fork()  # which computes nothing
    if not child:
        left, genuine = [renames], os.rename

        def rename(source: Path, target: Path) -> None:
            if not left[0]:
                os._exit(9)
            left[0] -= 1
            genuine(source, target)

        monkeypatch.setattr(os, "rename", rename)
        try:
            builds.run(LAYOUT, publish=True)
            os._exit(0)
        finally:
            os._exit(3)  # whatever went wrong, this is not the process that tells it
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    total = 1 + replaces
    assert status == (9 if renames < total else 0)
    builds.workspace.tidy()

    destination = builds.workspace.destination
    assert destination.exists() == (replaces or renames >= total)
    if renames < total:
        if replaces:
            assert (destination / "asset" / "in/weights").read_bytes() == builds.expected(OTHER)
        assert builds.run(LAYOUT, publish=True).computed == 0, "all weights were finished"
    assert (destination / "asset" / "in/weights").read_bytes() == builds.expected(LAYOUT)
    assert builds.left_over == {"toy", *([".zoo-work"] if keep else [])}
