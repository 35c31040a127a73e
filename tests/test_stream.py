"""`zoo build --stream`: the files of a checkpoint on the hub are fetched as they are needed, used and dropped."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load, save, save_file

from checkpoints import read_weights, tiny_checkpoint, write_json
from command import zoo
from coreai_zoo.build import pipeline
from coreai_zoo.build.design import design
from coreai_zoo.build.preflight import Preflight, preflight
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.build.workspace import Workspace
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint import hub_client as client
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.checkpoint.stream import ShardFetcher, open_on_hub
from coreai_zoo.digest import FollowingDigest
from coreai_zoo.dtypes import size
from coreai_zoo.errors import BadInput, EnvironmentLacks
from coreai_zoo.layout import Layout
from coreai_zoo.overlay import Transform, WeightRule
from coreai_zoo.plugins import default_plugins
from coreai_zoo.progress import Reporter
from coreai_zoo.weights import store as store_module
from coreai_zoo.weights.means import unusual_means
from coreai_zoo.weights.plan import PlannedTensor, WeightPlan
from coreai_zoo.weights.store import FillReport, WeightStore
from coreai_zoo.weights.stream import Schedule, Stream, schedule
from hub import Hub
from test_hub import Notes
from test_store import PARAMETERS, RULES, plan, values

ID = "toys/Toy-1B"
INDEX = "model.safetensors.index.json"


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 0.02)


# ---------------------------------------------------------------------------------------------------------------------
# The order
# ---------------------------------------------------------------------------------------------------------------------


def tensor(name: str) -> PlannedTensor:
    return PlannedTensor(name, "mlp", (1,), "float16", None, None, ())


def ordered(*files: str, here: str = "") -> Schedule:
    """The schedule of tensors t0, t1, ..., each with a letter for each file that it has a part in."""
    return schedule([(tensor(f"t{number}"), frozenset(names)) for number, names in enumerate(files)], here)


def told(made: Schedule) -> list[tuple[str, str, str]]:
    """Of each step that does something: files, tensors, files that go."""
    return [
        ("".join(sorted(step.files)), " ".join(each.name for each in step.tensors), "".join(sorted(step.last)))
        for step in made.steps
        if step.tensors
    ]


def test_files_come_in_the_order_of_the_plan_and_two_are_on_the_disk() -> None:
    made = ordered("b", "b", "a", "", "c", "a")

    assert told(made) == [("", "t3", ""), ("b", "t0 t1", "b"), ("a", "t2 t5", "a"), ("c", "t4", "c")]
    assert (made.order, made.limit) == (("b", "a", "c"), 2)
    assert made.most_bytes({"a": 1, "b": 10, "c": 100}, "") == 101
    assert made.most_bytes({"a": 100, "b": 10, "c": 1}, "") == 110


def test_a_tensor_across_two_files_needs_no_third() -> None:
    made = ordered("a", "ab", "b", "bc", "c", "d")

    assert told(made)[:3] == [("a", "t0", ""), ("ab", "t1", "a"), ("b", "t2", "")]
    assert (made.order, made.limit) == (("a", "b", "c", "d"), 2)


def test_a_tensor_in_three_files_needs_three_and_the_schedule_says_so() -> None:
    made = ordered("a", "bcd", "e")

    assert made.limit == 3
    assert made.most_bytes(dict.fromkeys("abcde", 1), "") == 3


def test_what_is_on_the_disk_already_is_used_first_and_counts() -> None:
    made = ordered("a", "b", "c", here="cx")

    assert (made.order, made.limit) == (("c", "a", "b"), 2)
    assert made.most_bytes({"a": 1, "b": 10, "c": 100, "x": 1000}, "c") == 101


def test_any_layout_is_done_with_every_file_fetched_once_and_within_its_limit() -> None:
    draw = random.Random(7)
    for _ in range(300):
        count = draw.randint(1, 7)
        files = [
            "".join(draw.sample("abcdefg"[:count], draw.randint(0, min(count, 3)))) for _ in range(draw.randint(1, 9))
        ]
        here = draw.sample("abcdefg", draw.randint(0, 2))
        made = ordered(*files, here="".join(here))
        assert len(set(made.order)) == len(made.order) == len(set("".join(files)))
        held, done, waiting = set(here) & set(made.order), [], list(made.order)
        assert len(held) <= made.limit
        for step in made.steps:
            while waiting and (waiting[0] in held or len(held) < made.limit):
                held.add(waiting.pop(0))
            assert step.files <= held, (files, here)
            done += [each.name for each in step.tensors]
            held -= step.last
        assert sorted(done) == sorted(f"t{number}" for number in range(len(files))) and not held


# ---------------------------------------------------------------------------------------------------------------------
# Filling a store
# ---------------------------------------------------------------------------------------------------------------------

MEAN = Transform("1 + weight", lambda weight: weight + 1, usual_mean=(5.0, 6.0))
MEANT = (WeightRule("norm", "norm", "norm", MEAN), *RULES[1:])
"""Rules by which the vector has another mean than usual, which is noted."""

LAYOUT = (("norm", "decay", "l.0.w"), ("l.1.w",), ("conv",))
"""Three files; the experts are spread over them by `repository`."""


def shard(number: int) -> str:
    return f"model-{number + 1:05}.safetensors"


def repository(spread: bool, padding: int = 2**14) -> dict[str, bytes]:
    """A toy checkpoint in some files: its experts in three of them, or in one, and then one has nothing of use.

    Each file also has a tensor that nothing needs, of 4 bytes times `padding`.
    """
    tensors = values()
    experts = [[f"e.{i}.{part}" for part in "ab"] for i in range(3)]
    parts = [*LAYOUT, *experts] if spread else [*LAYOUT, [*experts[0], *experts[1], *experts[2]], ("l.2.unused",)]
    names: dict[str, str] = {}
    files: dict[str, bytes] = {"config.json": b"{}"}
    for number, keys in enumerate(parts):
        held = {key: tensors.get(key, torch.ones(4)) for key in keys}
        held[f"visual.{number}"] = torch.full((padding,), float(number))
        names |= dict.fromkeys(held, shard(number))
        files[shard(number)] = save(held, {"format": "pt"})
    return {**files, INDEX: json.dumps({"weight_map": names}).encode()}


def needed(files: Mapping[str, bytes], spread: bool) -> list[str]:
    """The files that have something that is stored."""
    return sorted(name for name in files if name.endswith("tensors") and (spread or name != shard(4)))


@attrs.define
class Place:
    """Where a test fills a store."""

    store: WeightStore
    folder: Path

    @classmethod
    def of(cls, path: Path) -> Place:
        return cls(WeightStore(path / "store"), path / "shards")

    def opened(self, report: Reporter) -> tuple[HubSource, Checkpoint]:
        source = HubSource.open(Repository(ID), report)
        source.fetch_small()
        checkpoint = open_on_hub(source)
        checkpoint.check_index()
        return source, checkpoint

    def stream(self, report: Reporter) -> tuple[Stream, Checkpoint, WeightPlan]:
        source, checkpoint = self.opened(report)
        store = WeightStore(self.store.directory)  # whose journal is read anew
        return self._stream(source, checkpoint, store), checkpoint, planned(checkpoint)

    def _stream(self, source: HubSource, checkpoint: Checkpoint, store: WeightStore) -> Stream:
        return Stream(source, checkpoint, planned(checkpoint), store, self.folder)

    def fill(self, report: Reporter) -> tuple[FillReport, tuple[str, ...]]:
        """Fill the store; the notes on means as well."""
        stream, checkpoint, weights = self.stream(report)
        with report.bytes(stream.missing_bytes) as count:
            filled = WeightStore(self.store.directory).fill(weights, checkpoint, arriving=stream.arriving(count))
        return filled, stream.notes()

    def contents(self) -> dict[str, bytes]:
        return stored(self.store.directory)


def planned(checkpoint: Checkpoint) -> WeightPlan:
    return plan(attrs.evolve(checkpoint, tensors=kept(checkpoint)), rules=MEANT)


def kept(checkpoint: Checkpoint) -> dict[str, Any]:
    """The tensors but for those that pad files."""
    return {key: info for key, info in checkpoint.tensors.items() if not key.startswith(("visual", "l.2"))}


def stored(directory: Path) -> dict[str, bytes]:
    """The tensors of a store, without what says when and from where."""
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.suffix not in {".json", ".jsonl"}}


def whole(path: Path, files: Mapping[str, bytes]) -> tuple[dict[str, bytes], tuple[str, ...], Checkpoint]:
    """What the same checkpoint gives from a folder: the tensors, the notes on means, and the checkpoint."""
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    checkpoint = Checkpoint.open(path)
    WeightStore(path / "store").fill(planned(checkpoint), checkpoint)
    return stored(path / "store"), unusual_means(checkpoint, planned(checkpoint)), checkpoint


def fetched(hub: Hub, name: str) -> list[str | None]:
    """The ranges of the requests for a file, without that for its header."""
    return [asked for asked in hub.asked(name) if asked is None or asked.endswith("-")]


_watched: dict[Path, int] = {}


def _watch(event: str, given: tuple[Any, ...]) -> None:
    if event not in {"open", "os.rename", "os.remove"} or not _watched:
        return
    for folder, most in _watched.items():
        if str(given[0]).startswith(str(folder)) and folder.is_dir():
            here = {path.name.removesuffix(".incomplete") for path in folder.iterdir()}
            _watched[folder] = max(most, len(here))


sys.addaudithook(_watch)


@contextmanager
def most_files(folder: Path) -> Iterator[list[int]]:
    """How many files were in the folder at most, whole or not: looked at before each operation in it, in any thread."""
    most: list[int] = []
    _watched[folder] = 0
    try:
        yield most
    finally:
        most.append(_watched.pop(folder))


@pytest.mark.parametrize("spread", [False, True], ids=["apart", "spread"])
def test_a_store_is_the_same_and_few_files_are_on_the_disk(hub: Hub, tmp_path: Path, spread: bool) -> None:
    files = repository(spread)
    expected, notes, checkpoint = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place, report = Place.of(tmp_path), Notes()

    with most_files(place.folder) as most:
        filled, noted = place.fill(report)

    assert (filled.computed, filled.reused) == (len(PARAMETERS), 0)
    assert place.contents() == expected
    assert noted == notes and "usually between 5 and 6" in notes[0]
    assert most == [3 if spread else 2]
    assert not place.folder.exists()
    used = needed(files, spread)
    assert report.bars == report.done == [sum(len(files[name]) for name in used)]
    for name in files:
        if name.endswith("tensors"):
            assert fetched(hub, name) == ([None] if name in used else []), "of what nothing needs, the header alone"
    assert not list(hub.cache.rglob("*.safetensors")), "the cache is not for what is dropped"
    opened = place.opened(report)[1]
    assert opened.identity() == checkpoint.identity() and opened.notes == checkpoint.notes


def test_a_store_that_is_complete_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=True))
    place = Place.of(tmp_path)
    _, notes = place.fill(Notes())
    hub.requests.clear()

    filled, again = place.fill(Notes())

    assert (filled.computed, filled.reused) == (0, len(PARAMETERS)) and again == notes
    assert not [name for name in map(shard, range(6)) if fetched(hub, name)]


def test_what_was_looked_at_and_is_not_known_any_more_comes_again(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False)
    hub.add(ID, files)
    place = Place.of(tmp_path)
    _, notes = place.fill(Notes())
    (place.store.directory / "looks.json").write_text('{"torn')
    hub.requests.clear()

    filled, again = place.fill(Notes())

    assert filled.computed == 0 and again == notes
    assert [name for name in files if fetched(hub, name)] == [shard(0)], "that with the vector"


def test_the_next_file_comes_while_one_is_used(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=False))
    place = Place.of(tmp_path)
    stream, checkpoint, weights = place.stream(Notes())
    came: list[bool] = []

    def progress(done: PlannedTensor, _count: int) -> None:
        if done.name == "norm":  # of the first file, which cannot go before this ends
            end = time.monotonic() + 20
            while not fetched(hub, shard(1)) and time.monotonic() < end:
                time.sleep(0.01)
            came.append(bool(fetched(hub, shard(1))))

    place.store.fill(weights, checkpoint, progress, arriving=stream.arriving(lambda _what, _count: None))

    assert came == [True]


def test_a_file_goes_when_what_it_gave_is_on_disk_and_not_before(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = store_module.sync_path
    monkeypatch.setattr(store_module, "sync_path", lambda path: (time.sleep(0.1), sync(path)))  # a slow disk
    hub.add(ID, repository(spread=False))
    place = Place.of(tmp_path)
    stream, checkpoint, weights = place.stream(Notes())

    def watched() -> Iterator[tuple[PlannedTensor, ...]]:
        for tensors in stream.arriving(lambda _what, _count: None):
            yield tensors
            vouched = WeightStore(place.store.directory).journal.entries
            assert all(each.name in vouched for each in tensors)

    assert place.store.fill(weights, checkpoint, arriving=watched()).computed == len(PARAMETERS)


def test_two_files_with_the_same_content_are_two(hub: Hub, tmp_path: Path) -> None:
    tensors = values()
    first = save({key: tensor for key, tensor in tensors.items() if key != "conv"}, {"format": "pt"})
    same = save({"conv": tensors["conv"]}, {"format": "pt"})
    names = {key: shard(0) for key in tensors if key != "conv"} | {"conv": shard(1), "mtp.conv": shard(2)}
    files = {shard(0): first, shard(1): same, shard(2): same, "config.json": b"{}"}
    hub.add(ID, {**files, INDEX: json.dumps({"weight_map": names}).encode()})
    place = Place.of(tmp_path)
    source = HubSource.open(Repository(ID), Notes())
    source.fetch_small()
    checkpoint = open_on_hub(source)
    checkpoint.check_index(lambda key: key == "mtp.conv")  # which the index names and no file has

    stream = Stream(source, checkpoint, planned(checkpoint), place.store, place.folder)
    place.store.fill(planned(checkpoint), checkpoint, arriving=stream.arriving(lambda _what, _count: None))

    assert place.contents()["conv.data"] == tensors["conv"].half().numpy().tobytes()
    assert not place.folder.exists()


def test_files_that_an_earlier_run_left_are_used_before_others_come(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False)
    expected, _, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place = Place.of(tmp_path)
    source, _ = place.opened(Notes())
    place.folder.mkdir()
    for number in (2, 3):
        source.place_apart(shard(number), place.folder).write_bytes(files[shard(number)])

    with most_files(place.folder) as most:
        place.fill(Notes())

    assert place.contents() == expected and most == [2]
    assert [number for number in range(4) if fetched(hub, shard(number))] == [0, 1]


def test_a_file_that_is_whole_in_the_cache_is_used_from_there_and_stays(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=True)
    expected, _, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place, report = Place.of(tmp_path), Notes()
    source = HubSource.open(Repository(ID), report)
    cached = [source.shard(shard(number)) for number in (0, 4)]
    hub.requests.clear()

    with most_files(place.folder) as most:
        place.fill(report)

    assert place.contents() == expected and most == [2], "the experts need two more"
    assert all(path.read_bytes() == files[path.name] for path in cached)
    assert not hub.asked(shard(0)) and not hub.asked(shard(4)), "not even for their headers"
    assert fetched(hub, shard(5)) == [None]


def test_a_file_in_the_cache_that_is_not_what_the_hub_states_is_not_used(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False)
    expected, _, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place, report = Place.of(tmp_path), Notes()
    path = HubSource.open(Repository(ID), report).shard(shard(1))
    path.write_bytes(files[shard(1)][:-1] + b"?")

    place.fill(report)

    assert place.contents() == expected and not path.exists()
    assert f"{shard(1)} in the cache is not what the hub states; fetching it again" in report.notes


# ---------------------------------------------------------------------------------------------------------------------
# What the hub states
# ---------------------------------------------------------------------------------------------------------------------


def test_a_file_with_another_hash_is_never_used_and_named(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=False))
    hub.inject(shard(1), flip=8, times=-1, parts=False)
    place, report = Place.of(tmp_path), Notes()

    with pytest.raises(EnvironmentLacks, match=f"{shard(1)} of {ID} cannot be fetched: twice, .* another SHA-256"):
        place.fill(report)

    done = WeightStore(place.store.directory).journal.entries
    assert set(done) == {"norm", "decay", "l.0.w"}, "what came before stays"
    assert fetched(hub, shard(1)) == [None, None] and report.notes[-1].endswith("fetching it once more")
    assert not place.folder.exists() or not list(place.folder.iterdir()), "nothing of a wrong file stays"
    hub.heal()
    assert place.fill(report)[0].reused == 3
    assert fetched(hub, shard(0)) == [None]


def test_a_header_that_was_sent_otherwise_than_in_the_file_is_told(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False)
    hub.add(ID, files)
    changed = files[shard(1)].replace(b'{"format":"pt"}', b'{"format":"px"}')
    assert changed != files[shard(1)]
    hub.inject(shard(1), content=changed)

    with pytest.raises(EnvironmentLacks, match=f"The header of {shard(1)} of {ID} .* is another"):
        Place.of(tmp_path).fill(Notes())


@pytest.mark.parametrize("ranges", [True, False])
def test_a_long_header_and_a_server_without_ranges(hub: Hub, tmp_path: Path, ranges: bool) -> None:
    tensors = {f"a.tensor.with.a.long.name.{number}": torch.ones(1) for number in range(2500)}
    content = save(tensors, {"format": "pt"})
    hub.add(ID, {"config.json": b"{}", "model.safetensors": content})
    hub.ranges = ranges
    checkpoint = Place.of(tmp_path).opened(Notes())[1]

    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    assert checkpoint.identity() == Checkpoint.open(tmp_path).identity()
    assert len(hub.asked("model.safetensors")) == 2 and hub.asked("model.safetensors")[0] == "bytes=0-131071"


def test_a_header_is_asked_for_with_patience_and_what_cannot_be_asked_is_told(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=False))
    hub.inject(shard(0), status=503)
    hub.inject(shard(1), end=10)
    report = Notes()
    Place.of(tmp_path).opened(report)
    assert len(report.notes) == 2 and all("trying again" in note for note in report.notes)
    hub.inject(shard(2), truncate=2**10, times=-1)
    with pytest.raises(EnvironmentLacks, match=f"{shard(2)} of {ID} cannot be fetched: .* offered with 1,024 bytes"):
        Place.of(tmp_path).opened(report)
    hub.stop()
    with pytest.raises(EnvironmentLacks, match=f"{shard(0)} of {ID} is not there in the cache"):
        Place.of(tmp_path).opened(report)


def test_a_matrix_waits_for_its_scales_in_another_file(hub: Hub, tmp_path: Path) -> None:
    key, tensors = "l.1.w", values()
    first = {each: tensor for each, tensor in tensors.items() if each != key}
    stored_as = tensors[key].to(torch.float8_e4m3fn)
    parts = [{key: stored_as}, first, {f"{key}_scale_inv": torch.full((1, 1), 0.5)}]
    names = {each: shard(number) for number, part in enumerate(parts) for each in part}
    files = {shard(number): save(part, {"format": "pt"}) for number, part in enumerate(parts)}
    files |= {"config.json": b"{}", INDEX: json.dumps({"weight_map": names}).encode()}
    expected, _, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place = Place.of(tmp_path)

    with most_files(place.folder) as most:
        place.fill(Notes())

    assert place.contents() == expected and most == [2]


def doubled(other: float) -> dict[str, bytes]:
    """A repository whose first and fourth files hold `decay`, the fourth with `other` in the place of a value."""
    files = repository(spread=False)
    again = values()["decay"].clone()
    again[1] = again[1] if other == 0 else other
    experts = {f"e.{i}.{part}": values()[f"e.{i}.{part}"] for i in range(3) for part in "ab"}
    files[shard(3)] = save({**experts, "decay": again}, {"format": "pt"})
    index = json.loads(files[INDEX])
    index["weight_map"].pop("visual.3")
    return {**files, INDEX: json.dumps(index).encode()}


def test_a_tensor_in_two_files_is_compared_without_having_both(hub: Hub, tmp_path: Path) -> None:
    files = doubled(0)
    expected, _, checkpoint = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    place = Place.of(tmp_path)
    with most_files(place.folder) as most:
        place.fill(Notes())
    opened = place.opened(Notes())[1]
    assert opened.check_index() == checkpoint.check_index() != ()
    assert place.contents() == expected and most == [2]

    hub.add(ID, doubled(3.5))
    with pytest.raises(BadInput, match=f"holds decay twice, with different values: in {shard(0)} and in {shard(3)}"):
        place.fill(Notes())


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------

KILLED_FILLS = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import huggingface_hub.utils  # before any fork
from test_stream import Notes, Place

def fill(place, left):
    def count(event, arguments):
        nonlocal left
        writes = event == "open" and arguments[2] & os.O_ACCMODE
        if (writes or event in ("os.rename", "os.remove")) and place in str(arguments[0]):
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(count)
    Place.of(Path(place)).fill(Notes())

for place in sys.argv[2:]:
    child = os.fork()  # torch is imported once and has started no thread yet
    if not child:
        fill(place, int(place.rpartition("-")[2]))
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (-signal.SIGKILL, 0), (place, status)
"""


@pytest.mark.parametrize("spread", [False, True], ids=["apart", "spread"])
def test_a_killed_fill_goes_on_to_the_same_bytes_and_fetches_no_file_again_that_is_used_up(
    hub: Hub, tmp_path: Path, spread: bool
) -> None:
    files = repository(spread)
    expected, notes, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    places = [tmp_path / f"killed-{after}" for after in range(0, 60, 5)]
    command = [sys.executable, "-c", KILLED_FILLS, str(Path(__file__).parent), *map(str, places)]
    for path in places:
        path.mkdir()
    subprocess.run(command, check=True, env={**os.environ, **hub.environment})
    computed = []
    for path in places:
        place = Place.of(path)
        source, checkpoint = place.opened(Notes())
        weights = planned(checkpoint)
        left = {each.name for each in place.store.unfinished(weights, checkpoint)}
        known = (place.store.directory / "looks.json").is_file()
        open_files = {
            info.name
            for each in weights.stored
            if each.name in left or (each.name == "norm" and not known)
            for part in each.sources
            for info in checkpoint.files_of(part.key)
        }
        here = {name for name in open_files if not source.missing_apart(name, place.folder)}
        hub.requests.clear()

        with most_files(place.folder) as most:
            filled, again = place.fill(Notes())

        assert place.contents() == expected and again == notes
        assert {name for name in files if fetched(hub, name)} == open_files - here
        assert filled.computed == len(left) and most[0] <= (3 if spread else 2)
        assert not place.folder.exists()
        computed.append(len(left))
    assert computed[0] == len(PARAMETERS) and computed[-1] == 0 and len(set(computed)) > 2


def test_a_broken_fetch_goes_on_in_the_next_run(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False, padding=2**18)
    expected, _, _ = whole(tmp_path / "whole", files)
    hub.add(ID, files)
    hub.inject(shard(1), drop=2**19 // client.FILE_TRIES, times=-1, parts=False)
    place = Place.of(tmp_path)
    with pytest.raises(EnvironmentLacks, match=r"the connection to .* fails"):
        place.fill(Notes())
    hub.heal()
    stream = place.stream(Notes())[0]
    rest = sum(len(files[name]) for name in needed(files, spread=False)[1:]) - 2**19
    assert stream.missing_bytes == rest
    report = Notes()

    place.fill(report)

    assert place.contents() == expected
    assert fetched(hub, shard(1))[-1] == f"bytes={2**19}-" and fetched(hub, shard(0)) == [None]
    assert report.bars == report.done == [rest]


def test_ctrl_c_stops_the_fetching_and_leaves_what_has_come(hub: Hub, tmp_path: Path) -> None:
    files = repository(spread=False, padding=2**18)
    hub.add(ID, files)
    hub.inject(shard(1), stall=2**19, parts=False)
    place = Place.of(tmp_path)
    stream, checkpoint, weights = place.stream(Notes())

    def interrupt(done: PlannedTensor, _count: int) -> None:
        if done.name == "l.0.w":
            while not (place.folder / partial).exists() or (place.folder / partial).stat().st_size < 2**19:
                time.sleep(0.01)
            raise KeyboardInterrupt

    partial = f"{place.opened(Notes())[0].place_apart(shard(1), place.folder).name}.incomplete"
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        place.store.fill(weights, checkpoint, interrupt, arriving=stream.arriving(lambda _what, _count: None))
    assert time.monotonic() - started < 15
    assert (place.folder / partial).stat().st_size == 2**19
    hub.heal()
    place.fill(Notes())
    assert fetched(hub, shard(1))[-1] == f"bytes={2**19}-"


def test_what_another_commit_left_is_removed(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=False))
    place = Place.of(tmp_path)
    place.folder.mkdir()
    (place.folder / ("0" * 64)).write_bytes(b"old")
    with most_files(place.folder) as most:
        place.fill(Notes())
    assert most == [2] and not place.folder.exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_folder_and_the_way_out(hub: Hub, tmp_path: Path) -> None:
    hub.add(ID, repository(spread=False))
    place = Place.of(tmp_path)
    source, _ = place.opened(Notes())
    partial = source.place_apart(shard(0), place.folder)
    partial.parent.mkdir()
    partial.with_name(f"{partial.name}.incomplete").symlink_to("/dev/full")
    with pytest.raises(EnvironmentLacks) as caught:
        place.fill(Notes())
    assert f"The disk is full at {place.folder}" in caught.value.message and "--work-dir" in caught.value.hint


# ---------------------------------------------------------------------------------------------------------------------
# Whole builds
# ---------------------------------------------------------------------------------------------------------------------


def built(output: Path) -> dict[str, bytes]:
    """The files of the only bundle in a folder, which has nothing else in it."""
    (bundle,) = output.iterdir()
    return {str(path.relative_to(output)): path.read_bytes() for path in bundle.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at_once"), [("dense", 2), ("moe", 4)])
def test_a_streamed_build_gives_the_same_bundle_also_after_a_failure(
    hub: Hub, tmp_path: Path, kind: Any, at_once: int
) -> None:
    # Keys go round the files, and so do the experts, which are one tensor of the bundle.
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", kind, shards=4, packed_experts=False)
    hub.add(ID, checkpoint)
    sizes = {path.name: path.stat().st_size for path in checkpoint.glob("*.safetensors")}
    last = "model-00004-of-00004.safetensors"
    hub.inject(last, flip=8, times=-1, parts=False)
    streamed = ["build", ID, "--stream", "-o", tmp_path / "streamed"]

    failed = zoo(*streamed)

    assert failed.exit_code == 3 and f"{last} of {ID} cannot be fetched: twice" in failed.stderr
    (partial,) = (tmp_path / "streamed").glob(".*.partial")
    assert f"Finished weights are kept in {partial}" in failed.stderr
    used = {name for name in sizes if fetched(hub, name)} - {last}
    hub.heal()
    hub.requests.clear()
    (folder,) = (tmp_path / "streamed" / ".zoo-work").glob(".*.shards")

    with most_files(folder) as most:
        done = zoo(*streamed, "--json")

    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    told = answer["preflight"]
    if kind == "dense":
        again = {name for name in sizes if fetched(hub, name)}
        assert answer["weights"]["reused"] > 5 and used and again == set(sizes) - used
        assert told["fetched"] == sum(sizes[name] for name in again)
    else:
        assert told["fetched_at_once"] == sum(sizes.values()) > told["fetched"] > 0
    assert most == [at_once]
    assert not list(hub.cache.rglob("*.safetensors"))
    gated = zoo("gate", answer["path"])
    assert gated.exit_code == 2 and f"`hf download {ID} --revision " in gated.stderr, "where its checkpoint is now"
    whole = zoo("build", ID, "-o", tmp_path / "whole", "--json")
    assert whole.exit_code == 0 and json.loads(whole.stdout)["preflight"]["fetched"] == sum(sizes.values())
    assert built(tmp_path / "streamed") == built(tmp_path / "whole")
    assert "is there already, and up to date" in zoo(*streamed).stdout


@pytest.mark.parametrize("at", range(1, 12))
def test_what_is_read_of_a_file_while_it_changes_is_not_kept(
    hub: Hub, tmp_path: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the hub states of a file is not what was read of it."""
    hub.add(ID, repository(spread=True))
    place, looks = Place.of(tmp_path / "disturbed"), 0
    usual = Checkpoint._file

    def racing(self: Checkpoint, path: Path) -> Any:
        nonlocal looks
        file, looks = usual(self, path), looks + 1
        if looks == at and self._places[path] != path:
            with self._places[path].open("r+b") as shard_file:
                size = os.fstat(shard_file.fileno()).st_size
                shard_file.seek(size // 2)
                shard_file.write(bytes(size - size // 2))
        return file

    monkeypatch.setattr(Checkpoint, "_file", racing)
    with pytest.raises(EnvironmentLacks, match="has changed while it was read"):
        place.fill(Notes())
    monkeypatch.setattr(Checkpoint, "_file", usual)
    place.fill(Notes())
    assert place.contents() == whole(tmp_path / "whole", repository(spread=True))[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda path: os.utime(path, (1, 1)), "has changed while it was read"),
        (Path.unlink, "No such file or directory"),
    ],
    ids=["touched", "gone"],
)
def test_a_file_that_is_disturbed_while_it_is_used_costs_no_finished_weight(
    hub: Hub, tmp_path: Path, change: Callable[[Path], None], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, tiny_checkpoint(tmp_path / "checkpoint", shards=4))
    streamed = ["build", ID, "--stream", "-o", tmp_path / "out"]
    needed: list[frozenset[str]] = []
    usual = ShardFetcher.need

    def need(self: ShardFetcher, names: frozenset[str]) -> None:
        usual(self, names)
        needed.append(names)
        if len(needed) == 3:
            change(self._places[min(names)])

    with monkeypatch.context() as patched:
        patched.setattr(ShardFetcher, "need", need)
        failed = zoo(*streamed)

    assert failed.exit_code == 3 and told in failed.stderr and "run the same command again" in failed.stderr
    assert "Finished weights are kept in" in failed.stderr
    done = zoo(*streamed, "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["weights"]["reused"] > 5
    zoo("build", ID, "-o", tmp_path / "whole")
    assert built(tmp_path / "out") == built(tmp_path / "whole")


def test_a_repository_without_a_tokenizer_is_named_and_not_its_folder(hub: Hub, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    hub.add(ID, checkpoint)
    refused = zoo("build", ID, "-o", tmp_path / "out")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1].startswith(f"error: {ID} has no tokenizer.json and no tokenizer_config.json")


def test_another_model_than_an_entry_s_is_named_by_its_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its weights are in no folder yet."""
    entry, _ = find_entry("qwen3.6-27b", default_plugins())
    commit = hub.add(str(entry.hf_id), tiny_checkpoint(tmp_path / "checkpoint"), commit=entry.hf_revision)
    refused = zoo("build", entry.name, "--stream", "-o", tmp_path / "out")
    given = f"{entry.hf_id}@{commit}"
    assert refused.exit_code == 2 and f"{given} is not the model of entry {entry.name}: " in refused.stderr
    assert f"`zoo build {given}` builds it as what it is" in refused.stderr


@pytest.mark.slow
def test_a_rebuild_on_kept_weights_fetches_nothing(hub: Hub, tmp_path: Path) -> None:
    """Not for what was seen of values that are not stored, either."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", shards=3)
    hub.add(ID, checkpoint)
    command = ["build", ID, "--stream", "--keep-weights", "-o", tmp_path / "out", "--json"]
    assert zoo(*command).exit_code == 0
    hub.requests.clear()
    again = json.loads(zoo(*command, "--force").stdout)
    assert again["weights"]["computed"] == again["preflight"]["fetched"] == 0
    assert not any(fetched(hub, path.name) for path in checkpoint.glob("*.safetensors")), "headers alone"


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "is empty"), (b"\xff" * 64, "its header would be"), (b"version https://git-lfs.github.com/spec/v1\n", "")],
    ids=["empty", "no header", "pointer"],
)
def test_a_file_that_is_damaged_on_the_hub_is_named_as_one_of_the_hub(
    hub: Hub, tmp_path: Path, content: bytes, told: str
) -> None:
    hub.add(ID, {"config.json": b"{}", "model.safetensors": content})
    with pytest.raises(BadInput, match=f"model.safetensors of {ID} .*{told}") as caught:
        Place.of(tmp_path).opened(Notes())
    assert str(hub.cache) not in str(caught.value) and "So it is on the hub" in caught.value.hint
    assert len(hub.asked("model.safetensors")) <= 1, "nothing is tried again"


def test_what_is_fetched_for_some_tensors_leaves_the_files_of_others(hub: Hub, tmp_path: Path) -> None:
    """A layout may depend on a few values, which come first; what an earlier run left for all of them is not theirs."""
    hub.add(ID, repository(spread=False))
    place = Place.of(tmp_path)
    source, checkpoint = place.opened(Notes())
    names = sorted(file.name for file in source.weights)
    for name in names[:2]:
        source.fetch_apart(name, place.folder, lambda *_: None)
    before = {path.name: path.read_bytes() for path in place.folder.iterdir()}
    some = planned(checkpoint)
    (one,) = (each for each in some.stored if each.name == "norm")
    stream = Stream(source, checkpoint, attrs.evolve(some, tensors=(one,)), place.store, place.folder, alone=False)
    place.store.fill(some, checkpoint, arriving=stream.arriving(lambda *_: None))
    assert {path.name: path.read_bytes() for path in place.folder.iterdir()} == before


@pytest.mark.slow
def test_a_streamed_build_fills_the_asset_from_its_beginning(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else its hash would have to read it all when the last file has come."""
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    tensors, names = read_weights(checkpoint), dict[str, str]()
    (checkpoint / "model.safetensors").unlink()
    for key in tensors:  # embedding, layers and what follows them, as checkpoints usually have them
        layer = re.search(r"layers\.(\d+)", key)
        names[key] = shard(int(layer[1]) + 1 if layer else 0 if "embed" in key else 9)
    for name in set(names.values()):
        save_file({key: tensors[key] for key in names if names[key] == name}, checkpoint / name, {"format": "pt"})
    write_json(checkpoint / INDEX, {"weight_map": names})
    commit = hub.add(ID, checkpoint)
    filled: list[int] = []
    usual = FollowingDigest.filled
    monkeypatch.setattr(
        FollowingDigest, "filled", lambda self, start, end: (filled.append(start), usual(self, start, end))[1]
    )

    done = zoo("build", ID, "--stream", "-o", tmp_path / "streamed")
    assert done.exit_code == 0
    (bundle,) = (tmp_path / "streamed").iterdir()
    fetching = f"hf download {ID} --revision {commit} && zoo gate {bundle}"
    assert done.stderr.splitlines()[-1] == f"Next, fetch the whole checkpoint, and compare it with that: {fetching}"

    asked = [Path(request.path).name for request in hub.requests if request.range is None]
    came = [name for name in dict.fromkeys(asked) if name in names.values()]
    assert came == sorted(set(names.values()), reverse=True), "the head is at the beginning of the asset"
    # Of a quantized weight the scales stand first and come last.
    assert all(place <= after for place, after in zip(filled, filled[2:], strict=False))
    assert len(filled) > len(tensors) / 2


def test_what_is_on_this_machine_is_not_streamed(hub: Hub, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint")
    for words, named in (
        (["qwen3.6-27b", "--checkpoint", checkpoint], f"--checkpoint {checkpoint}"),
        (["qwen3.6-27b", "--sample"], "--sample"),
        ([checkpoint], f"the folder {checkpoint}"),
    ):
        result = zoo("build", *words, "--stream", "-o", tmp_path / "out")
        assert result.exit_code == 2 and not (tmp_path / "out").exists()
        assert f"--stream is for a checkpoint that is fetched from the hub, and {named} is on" in result.stderr


def test_the_preflight_tells_how_much_is_fetched_and_how_much_of_it_needs_disk(hub: Hub, tmp_path: Path) -> None:
    sizes = [
        path.stat().st_size for path in sorted(tiny_checkpoint(tmp_path / "checkpoint", shards=4).glob("*.safetensors"))
    ]
    hub.add(ID, tmp_path / "checkpoint")
    plugins = default_plugins()

    def needs(*, stream: bool) -> Preflight:
        made = design(BuildRequest(ID, stream=stream), plugins) if stream else design(BuildRequest(ID), plugins)
        return preflight(made, Workspace.of(tmp_path / "out", made.name, None, keep=False))

    plain, streamed = needs(stream=False), needs(stream=True)
    assert (plain.fetched, plain.fetched_at_once, streamed.fetched) == (sum(sizes), sum(sizes), sum(sizes))
    at_once = streamed.fetched_at_once
    assert at_once in {one + other for one in sizes for other in sizes}, "two files"
    assert plain.disks[0].needs - streamed.disks[0].needs == sum(sizes) - at_once
    assert f"fetches {size(sum(sizes))} ({size(at_once)} on the disk at a time), reads" in str(streamed)
    assert "at a time" not in str(plain) and streamed.as_json()["fetched_at_once"] == at_once
    small = attrs.evolve(streamed, disks=(attrs.evolve(streamed.disks[0], free=1),))
    with pytest.raises(EnvironmentLacks, match=f"{size(at_once)} of checkpoint") as caught:
        small.require()
    assert "HF_HOME" not in caught.value.hint
    assert "-o DIR or --work-dir DIR" in caught.value.hint, "both are on it"
    with pytest.raises(EnvironmentLacks) as caught:
        attrs.evolve(plain, disks=(attrs.evolve(plain.disks[0], free=1),)).require()
    assert "HF_HOME" in caught.value.hint and "--stream" in caught.value.hint


def test_the_preflight_holds_in_whatever_order_files_come(hub: Hub, tmp_path: Path) -> None:
    """The asset says which; here the two large ones are those that the plan has farthest apart."""
    files = repository(spread=False)
    names = needed(files, spread=False)
    for name in (names[0], names[-1]):
        held = load(files[name])
        (padding,) = (key for key in held if key.startswith("visual"))
        files[name] = save({**held, padding: torch.zeros(2**18)}, {"format": "pt"})
    hub.add(ID, files)
    place = Place.of(tmp_path)
    source, checkpoint = place.opened(Notes())
    weights = planned(checkpoint)

    def stream(order: Callable[[PlannedTensor], int]) -> Stream:
        return Stream(source, checkpoint, weights, place.store, place.folder, order)

    used = set()
    for seed in range(40):
        order = [each.name for each in weights.stored]
        random.Random(seed).shuffle(order)
        used.add(stream(lambda each, order=order: order.index(each.name)).most_bytes)  # type: ignore[misc]
    largest = sorted(len(files[name]) for name in names)[-2:]
    assert max(used) == stream(lambda _: 0).most_bytes_in_any_order == sum(largest)
    assert min(used) < max(used), "it depends on the order"


@pytest.mark.slow
def test_what_a_layout_depends_on_is_told_and_is_not_alone_in_the_folder(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Core ML has the smallest tensors in the program itself, so that some values come before all others."""
    hub.add(ID, tiny_checkpoint(tmp_path / "checkpoint", shards=3))
    folders: list[bool] = []
    usual = pipeline.stream_of

    def watched(*given: Any, alone: bool = True) -> Stream | None:
        folders.append(alone)
        return usual(*given, alone=alone)

    monkeypatch.setattr(pipeline, "stream_of", watched)
    done = zoo("build", ID, "--stream", "--backend", "coreml", "-o", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert folders == [False, True]
    assert re.search(r"fetching [\d.]+ \w+ first, for the layout depends on what is in them", done.stderr)


def test_files_of_layers_that_are_cut_are_not_fetched(hub: Hub, tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=4)
    tensors = read_weights(checkpoint)
    late = {key: tensor for key, tensor in tensors.items() if ".layers.2." in key or ".layers.3." in key}
    (checkpoint / "model.safetensors").unlink()
    names = {key: shard(key in late) for key in tensors}
    for number in range(2):
        save_file({key: tensors[key] for key in tensors if names[key] == shard(number)}, checkpoint / shard(number))
    write_json(checkpoint / INDEX, {"weight_map": names})
    hub.add(ID, checkpoint)

    made = design(BuildRequest(ID, stream=True, layers=2), default_plugins())

    needs = preflight(made, Workspace.of(tmp_path / "out", made.name, None, keep=False))
    assert late and needs.fetched == needs.fetched_at_once == (checkpoint / shard(0)).stat().st_size


class OfTheSystem(BadInput):
    """Told in other words than those of the system, which may be able to do it the next time."""

    def __init__(self, said: str) -> None:
        super().__init__(said)
        self.__cause__ = OSError(errno.EIO, said)


@pytest.mark.parametrize(
    ("error", "stays"), [(BadInput, False), (EnvironmentLacks, True), (OfTheSystem, True), (KeyboardInterrupt, True)]
)
@pytest.mark.parametrize("keep", [False, True])
def test_what_was_fetched_stays_only_for_a_build_that_can_go_on(
    tmp_path: Path, error: type[BaseException], stays: bool, keep: bool
) -> None:
    workspace = Workspace.of(tmp_path, "toy", None, keep=keep)

    with pytest.raises(error) as caught, workspace.opened(force=False):  # noqa: PT012  # what is in it was done before
        workspace.shards.mkdir()
        (workspace.shards / "one").write_bytes(b"1")
        raise error("for good, or not")

    assert (workspace.shards / "one").exists() == stays
    told = [f"What has been fetched is kept in {workspace.shards}."] if stays and error is not KeyboardInterrupt else []
    assert getattr(caught.value, "__notes__", []) == told
    with workspace.opened(force=False):
        bundle = workspace.lay_out(Layout("weights", (), {}, {}), "asset", workspace.store)
        (bundle / "build.json").write_text("{}")
        workspace.publish(bundle, workspace.store)
    assert not workspace.shards.exists() and workspace.destination.is_dir()
