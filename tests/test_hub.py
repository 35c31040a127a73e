"""A checkpoint on the hub: asked for, fetched, compared with what the hub states; and all that goes wrong there.

The client is the real `huggingface_hub`, the hub a real server on this machine, see tests/hub.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import signal
import ssl
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

from coreai_zoo.checkpoint import hub_client as client
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError
from coreai_zoo.progress import CountBytes, Reporter
from hub import Hub, git_sha1

ID = "toys/Toy-1B"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
SIZE = 3 * 2**20


def content(seed: int, size: int = SIZE) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).tobytes()


INDEX = json.dumps({"weight_map": {"a": FIRST, "b": SECOND, "c": FIRST}}).encode()
FILES: Mapping[str, bytes] = {
    "config.json": b'{"model_type": "toy"}',
    "model.safetensors.index.json": INDEX,
    "tokenizer.json": content(1, 2**16),
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "README.md": b"---\nlicense: apache-2.0\n---\n# Toy\n",
    "LICENSE": b"Do as you like.\n",
    "figures/plot.png": content(2, 2**10),
    "pytorch_model.bin": content(3, 2**10),
    FIRST: content(4),
    SECOND: content(5),
}


class Notes(Reporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        super().__init__(silent=True)
        self.notes: list[str] = []
        self.bars: list[int] = []
        self.done: list[int] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    @contextmanager
    def bytes(self, total: int) -> Iterator[CountBytes]:
        self.bars.append(total)
        self.done.append(0)

        def count(_what: str, more: int) -> None:
            self.done[-1] += more

        yield count


@pytest.fixture
def report() -> Notes:
    return Notes()


@pytest.fixture(autouse=True)
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_PAUSE", 0.01)
    monkeypatch.setattr(client, "_LONGEST_PAUSE", 0.02)


def opened(report: Reporter, text: str = ID) -> HubSource:
    repository = Repository.parse(text)
    assert repository is not None
    return HubSource.open(repository, report)


# ---------------------------------------------------------------------------------------------------------------------
# As it should be
# ---------------------------------------------------------------------------------------------------------------------


def test_a_checkpoint_is_fetched_in_two_steps(hub: Hub, report: Notes) -> None:
    commit = hub.add(ID, FILES, licence="apache-2.0", card={"base_model": "toys/Toy-base", "language": ["en"]})
    source = opened(report)
    assert (source.id, source.commit) == (ID, commit)
    assert source.listing is not None and set(source.listing.files) == set(FILES)
    assert source.listing.card == {"license": "apache-2.0", "base_model": "toys/Toy-base", "language": ["en"]}
    assert [request.path for request in hub.requests] == [f"/api/models/{ID}?blobs=true"]

    directory = source.fetch_small()
    assert directory == source.directory and directory.name == commit
    large = {FIRST, SECOND, "pytorch_model.bin", "figures/plot.png"}
    assert {path.name for path in directory.iterdir()} == set(FILES) - large
    assert [file.name for file in source.weights] == [FIRST, SECOND]
    assert source.weights[0].sha256 == hashlib.sha256(FILES[FIRST]).hexdigest()
    assert not source.complete and source.missing_bytes == 2 * SIZE

    source.fetch_weights(report)
    assert source.complete and source.missing_bytes == 0
    assert (report.bars, report.done) == ([2 * SIZE], [2 * SIZE])
    for path in directory.iterdir():
        assert path.read_bytes() == FILES[path.name]
    assert report.notes == []


def test_only_what_is_asked_for_is_fetched(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    directory = opened(report).fetch_small({"config.json", "model.safetensors.index.json", "nowhere.json", FIRST})
    assert {path.name for path in directory.iterdir()} == {"config.json", "model.safetensors.index.json"}
    assert len(hub.requests) == 3


def test_a_checkpoint_may_be_one_file(hub: Hub, report: Notes) -> None:
    hub.add(ID, {"config.json": b"{}", "model.safetensors": content(6, 2**16), "old.safetensors": b"old"})
    source = opened(report)
    assert [file.name for file in source.weights] == ["model.safetensors"]
    assert source.shard("model.safetensors").read_bytes() == content(6, 2**16)


def test_a_revision_is_a_branch_a_tag_or_a_commit(hub: Hub, report: Notes) -> None:
    old = hub.add(ID, {"config.json": b"old"}, revisions=["main", "v1", "refs/pr/1"])
    new = hub.add(ID, {"config.json": b"new"})
    for text, commit in {
        ID: new,
        f"{ID}@main": new,
        f"{ID}@v1": old,
        f"{ID}@{old}": old,
        f"{ID}@{old[:8]}": old,
        f"{ID}@refs/pr/1": old,
        f"{hub.endpoint}/{ID}/tree/v1": old,
    }.items():
        source = opened(report, text)
        assert source.commit == commit, text
        assert (source.fetch_small() / "config.json").read_bytes() == (b"old" if commit == old else b"new")


def test_this_and_the_hubs_own_client_find_what_the_other_has_fetched(hub: Hub, report: Notes) -> None:
    commit = hub.add(ID, FILES)
    source = opened(report)
    source.fetch_small()
    source.shard(FIRST)
    for name in ("config.json", FIRST):
        found = huggingface_hub.hf_hub_download(ID, name, local_files_only=True)
        assert Path(found).read_bytes() == FILES[name] and commit in found
    huggingface_hub.hf_hub_download(ID, SECOND)
    asked = len(hub.requests)
    source.fetch_weights(report)
    assert len(hub.requests) == asked
    assert report.bars == [SIZE]
    assert "comparing 3.0 MiB in the cache with what the hub states" in report.notes
    assert huggingface_hub.scan_cache_dir().warnings == []


def test_a_file_of_an_older_commit_is_not_fetched_again(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    opened(report).fetch_weights(report)
    hub.add(ID, {**FILES, "config.json": b"{}"})
    source = opened(report)
    assert source.complete and source.missing_bytes == 0
    source.fetch_weights(report)
    assert (source.directory / FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST) == [None]


def test_a_token_is_shown_to_the_hub_and_to_nobody_else(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, FILES, private=True)
    hub.tokens.add("hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    opened(report).shard(FIRST)
    shown = {request.path.split("/")[1]: request.token for request in hub.requests}
    assert shown == {"api": "hf_right", "toys": "hf_right", "cdn": None}


def test_a_mirror_whose_metadata_lacks_sizes_and_hashes_is_asked_for_them(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.metadata = False
    source = opened(report)
    source.fetch_weights(report)
    assert source.weights[0].sha256 == hashlib.sha256(FILES[FIRST]).hexdigest()
    assert (source.fetch_small() / "config.json").read_bytes() == FILES["config.json"]


def test_a_mirror_that_states_no_hash_is_believed_about_small_files_only(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.metadata = hub.etags = False
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and f"size and SHA-256 of {FIRST}" in error.message
    small = {name: data for name, data in FILES.items() if not name.endswith(".safetensors")}
    hub.add(ID, {**small, "LICENSE": b"x"})
    directory = opened(report).fetch_small()
    assert (directory / "config.json").read_bytes() == FILES["config.json"]
    assert (directory / "LICENSE").read_bytes() == b"x"


def test_a_cache_without_links_holds_the_files_themselves(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_SYMLINKS", True)
    hub.add(ID, FILES)
    for _ in range(2):
        source = opened(report)
        source.fetch_weights(report)
        assert (source.directory / FIRST).read_bytes() == FILES[FIRST] and not (source.directory / FIRST).is_symlink()
    assert hub.asked(FIRST) == [None]


# ---------------------------------------------------------------------------------------------------------------------
# What the hub states is compared
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [FIRST, "config.json", "tokenizer.json"])
def test_flipped_bits_are_found_and_the_file_is_fetched_once_more(hub: Hub, report: Notes, name: str) -> None:
    hub.add(ID, FILES)
    hub.inject(name, flip=8 if name == "config.json" else 2048)
    source = opened(report)
    source.fetch_small()
    source.fetch_weights(report)
    assert (source.directory / name).read_bytes() == FILES[name]
    assert hub.asked(name) == [None, None]
    kind = "git hash" if name == "config.json" else "SHA-256"
    assert report.notes == [f"what came as {name} has another {kind} than the hub states; fetching it once more"]
    assert report.done == report.bars


def test_a_file_that_is_bad_twice_is_an_error_and_leaves_nothing_in_the_cache(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, flip=2048, times=-1)
    source = opened(report)
    with pytest.raises(EnvironmentLacks, match=f"{FIRST} of {ID} cannot be fetched: twice, .* another SHA-256"):
        source.fetch_weights(report)
    digest = hashlib.sha256(FILES[FIRST]).hexdigest()
    assert not list(hub.cache.rglob(f"blobs/{digest}*")) and not (source.directory / FIRST).exists()
    assert hub.asked(FIRST) == [None, None]


def test_a_file_in_the_cache_that_is_not_what_the_hub_states_is_fetched_again(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    source = opened(report)
    source.fetch_small()
    source.fetch_weights(report)
    for name, bad in {
        FIRST: FILES[FIRST][:-1] + b"?",
        SECOND: b"short",
        "config.json": b'{"model_type": "tyo"}',
    }.items():
        (source.directory / name).write_bytes(bad)
    source = opened(report)
    assert source.missing_bytes == SIZE  # the length is all that is looked at before
    source.fetch_small()
    source.fetch_weights(report)
    for name in (FIRST, SECOND, "config.json"):
        assert (source.directory / name).read_bytes() == FILES[name]
        assert hub.asked(name) == [None, None]
        assert f"{name} in the cache is not what the hub states; fetching it again" in report.notes
    assert report.bars == report.done == [2 * SIZE, SIZE, 2 * SIZE]


def test_what_was_compared_is_not_read_again_until_it_changes(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    opened(report).fetch_weights(report)
    with read_files() as read:
        source = opened(report)
        source.fetch_weights(report)
    assert any("index" in path for path in read) and not any(path.endswith(".safetensors") for path in read)
    times = (source.directory / FIRST).stat()
    changed = bytearray(FILES[FIRST])
    changed[5] ^= 1
    (source.directory / FIRST).write_bytes(changed)
    os.utime(source.directory / FIRST, ns=(times.st_atime_ns, times.st_mtime_ns))  # to those who look no closer
    with read_files() as read:
        opened(report).fetch_weights(report)
    assert any(path.endswith(FIRST) for path in read) and not any(path.endswith(SECOND) for path in read)
    assert (source.directory / FIRST).read_bytes() == FILES[FIRST]


_read: list[str] = []
sys.addaudithook(lambda event, given: _read.append(str(given[0])) if event == "open" else None)


@contextmanager
def read_files() -> Iterator[list[str]]:
    """The paths of files that are opened within the block, added up until its end."""
    _read.clear()
    found: list[str] = []
    yield found
    found.extend(_read)


def test_a_file_that_changes_under_its_name_between_two_tries_is_not_put_together_of_both(
    hub: Hub, report: Notes
) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, drop=2**20)
    hub.inject(FIRST, content=content(99))
    source = opened(report)
    source.fetch_weights(report)
    assert (source.directory / FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST) == [None, f"bytes={2**20}-", None]


@pytest.mark.parametrize("fault", [{"truncate": 2**20}, {"content": content(98, SIZE + 1)}, {"content": b""}])
def test_a_file_of_another_length_is_told_and_what_had_come_is_kept(
    hub: Hub, report: Notes, fault: dict[str, Any]
) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, drop=2**19)
    hub.inject(FIRST, times=-1, **fault)
    source = opened(report)
    with pytest.raises(EnvironmentLacks, match=r"twice, .* and the hub states 3,145,728"):
        source.shard(FIRST)
    hub.heal()
    assert source.missing_bytes == 2 * SIZE - 2**19
    assert source.shard(FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST)[-1] == f"bytes={2**19}-"


# ---------------------------------------------------------------------------------------------------------------------
# Going on
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["drop", "stall"])
def test_a_broken_download_goes_on_from_what_has_come(hub: Hub, report: Notes, fault: str) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, **{fault: 2**20})
    hub.inject(FIRST, **{fault: 2**19})
    source = opened(report)
    source.fetch_weights(report)
    assert (source.directory / FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST) == [None, f"bytes={2**20}-", f"bytes={2**20 + 2**19}-"]
    assert [re.sub(r" \(.*\)", "", note) for note in report.notes] == [
        "the connection broke; going on from 1.0 MiB",
        "the connection broke; going on from 1.5 MiB",
    ]
    assert report.done == [2 * SIZE]


def test_an_answer_that_ends_early_without_an_error_goes_on(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, end=2**20)
    source = opened(report)
    assert source.shard(FIRST).read_bytes() == FILES[FIRST]
    assert report.notes == ["the connection broke (it ended early); going on from 1.0 MiB"]
    hub.inject(SECOND, end=0, times=-1)
    with pytest.raises(EnvironmentLacks, match=r"the connection to .* fails"):
        source.shard(SECOND)
    assert len(hub.asked(SECOND)) == client.FILE_TRIES


def test_a_small_file_is_asked_for_as_it_is_so_that_a_part_of_it_is_one(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject("config.json", drop=10)
    opened(report).fetch_small()
    assert hub.asked("config.json") == [None, "bytes=10-"] and len(report.notes) == 1


def test_a_connection_that_never_answers_or_closes_is_tried_again(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, close=True)
    hub.inject(ID, close=True)
    hub.inject(ID, stall=0)
    opened(report).fetch_weights(report)
    assert len(report.notes) == 3 and all("trying again" in note for note in report.notes)


FETCH_FOLDER = ("hf", "download", ID, "--include", "it's/*", "--local-dir", "DIR")


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": b"{}", "model.fp16.safetensors": b""}, "has model.fp16.safetensors but neither"),
        ({"config.json": b"{}", "model-00001-of-00001.safetensors": b""}, "rename model-00001-of-00001.safetensors to"),
        ({"config.json": b"{}", "pytorch_model.bin": b""}, "has no safetensors weights, only pytorch_model.bin"),
        ({"config.json": b"{}", "sub/model.safetensors": b""}, "has no weights: neither model.safetensors nor"),
        (
            {"onnx/config.json": b"{}", "it's/config.json": b"{}", "it's/model.safetensors": b""},
            f"has no config.json, but a model in it's. `{shlex.join(FETCH_FOLDER)}` fetches one: give 'DIR/it'",
        ),
        ({"onnx/config.json": b"{}", "model.safetensors": b""}, "has no config.json. Repositories of models"),
        ({"model-Q4.gguf": b"", "README.md": b""}, "has model-Q4.gguf only: GGUF weights are quantized already"),
        ({"model.safetensors": b""}, "has no config.json. Repositories of models"),
    ],
)
def test_what_a_repository_lacks_is_told_by_what_it_has(
    hub: Hub, report: Notes, files: dict[str, bytes], told: str
) -> None:
    hub.add(ID, files)
    source = opened(report)
    with pytest.raises(BadInput) as caught:
        (source.fetch_small(), source.weights)
    assert str(caught.value).startswith(ID) and told in str(caught.value)
    assert str(source.directory) not in str(caught.value)


@pytest.mark.parametrize("path", [ID, "config.json", FIRST])
def test_an_address_that_leads_back_to_itself_is_followed_once(hub: Hub, report: Notes, path: str) -> None:
    hub.add(ID, FILES)
    location = f"/api/models/{ID}" if path == ID else f"/{ID}/resolve/main/{path}"
    hub.inject(path, times=-1, status=302, headers={"Location": location})

    def fetch() -> None:
        source = opened(report)
        source.fetch_small()
        source.fetch_weights(report)

    with pytest.raises(EnvironmentLacks, match=r"the connection to .* fails .*redirects"):
        fetch()
    assert report.notes == []


def test_a_hub_for_whom_nobody_vouches_is_asked_once(report: Notes) -> None:
    refused = ssl.SSLCertVerificationError(1, "certificate verify failed")

    def request() -> None:
        try:
            raise refused
        except ssl.SSLError as error:
            raise HTTPError("connect") from error

    with pytest.raises(HTTPError):
        client.Patience(report, 8).ask(request)
    assert report.notes == []


def test_a_server_without_ranges_is_asked_for_the_whole(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.ranges = False
    hub.inject(FIRST, drop=2**20)
    source = opened(report)
    source.fetch_weights(report)
    assert (source.directory / FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST) == [None, f"bytes={2**20}-"] and report.done == [2 * SIZE]


def test_tries_come_to_an_end_and_the_next_run_goes_on(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, drop=2**17, times=-1)
    source = opened(report)
    with pytest.raises(EnvironmentLacks, match=r"the connection to .* fails"):
        source.shard(FIRST)
    come = client.FILE_TRIES * 2**17
    assert source.missing_bytes == 2 * SIZE - come
    hub.heal()
    assert source.shard(FIRST).read_bytes() == FILES[FIRST]
    assert hub.asked(FIRST)[-1] == f"bytes={come}-"


def test_tries_count_anew_after_a_long_stretch_without_a_failure(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_ENOUGH", 2**17)
    hub.add(ID, FILES)
    hub.inject(FIRST, drop=2**17, times=-1)
    assert opened(report).shard(FIRST).read_bytes() == FILES[FIRST]
    assert len(hub.asked(FIRST)) == SIZE // 2**17


FETCH = f"""
import sys
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.progress import Reporter
reporter = Reporter()
source = HubSource.open(Repository({ID!r}), reporter)
source.fetch_small()
source.fetch_weights(reporter)
print(source.directory)
"""


def started(hub: Hub, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **hub.environment, "HF_HUB_DOWNLOAD_TIMEOUT": "60", **environment},
        # A shell that starts the tests in the background has them ignore Ctrl-C, and a child would inherit that.
    )


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_download_goes_on_from_what_has_come(hub: Hub, number: signal.Signals) -> None:
    hub.add(ID, FILES)
    hub.inject(SECOND, stall=2**20 + 5)
    with started(hub) as process:
        digest = hashlib.sha256(FILES[SECOND]).hexdigest()
        partial = hub.cache / "models--toys--Toy-1B" / "blobs" / f"{digest}.incomplete"
        wait_for(lambda: partial.exists() and partial.stat().st_size == 2**20 + 5)
        process.send_signal(number)
    assert process.returncode
    with started(hub) as process:
        out, error = process.communicate(timeout=60)
    assert process.returncode == 0, error
    assert (Path(out.strip()) / SECOND).read_bytes() == FILES[SECOND]
    assert hub.asked(FIRST) == [None] and hub.asked(SECOND) == [None, f"bytes={2**20 + 5}-"]
    assert not list(hub.cache.rglob("*.incomplete")) + list(hub.cache.rglob("*.tmp"))


def wait_for(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, "what was waited for did not come"
        time.sleep(0.01)


def test_the_client_prints_nothing_of_its_own(hub: Hub) -> None:
    hub.add(ID, FILES)
    hub.inject("config.json", status=503, headers={"X-HF-Warning": "topic; a warning of the hub"})
    hub.inject(FIRST, drop=2**20)
    with started(hub) as process:
        _, error = process.communicate(timeout=60)
    assert len(error.splitlines()) == 2, error
    assert "answers 503, a fault; trying again" in error and "going on from 1.0 MiB" in error
    assert {request.path.split("/")[1] for request in hub.requests} == {"api", "toys", "cdn"}
    assert len([request for request in hub.requests if request.path.startswith("/api")]) == 1


def test_two_that_fetch_the_same_file_fetch_it_once(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    hub.inject(FIRST, stall=2**20)  # for the second that a client waits
    others = Notes()
    sources = opened(report), opened(others)
    first = threading.Thread(target=sources[0].shard, args=[FIRST])
    first.start()
    wait_for(lambda: bool(hub.asked(FIRST)))
    assert sources[1].shard(FIRST).read_bytes() == FILES[FIRST]
    first.join()
    assert others.notes == [f"another process fetches {FIRST}; waiting for it"]
    assert hub.asked(FIRST) == [None, f"bytes={2**20}-"]


# ---------------------------------------------------------------------------------------------------------------------
# What the hub refuses
# ---------------------------------------------------------------------------------------------------------------------


def fetch(report: Notes, text: str) -> None:
    source = opened(report, text)
    source.fetch_small()
    source.fetch_weights(report)


def refused(report: Notes, text: str = ID) -> ZooError:
    """The error that a fetch ends with: one paragraph, of at most three sentences, that blames no disk."""
    with pytest.raises(ZooError) as caught:
        fetch(report, text)
    message = str(caught.value)
    assert "\n" not in message and "Traceback" not in message and len(re.findall(r"[.!?](?: |$)", message)) <= 3, (
        message
    )
    assert "disk" not in message
    return caught.value


def test_a_gated_repository_names_the_page_and_the_login(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, FILES, gated=True)
    hub.tokens |= {"hf_known", "hf_granted"}
    for token in ("", "hf_known"):
        monkeypatch.setenv("HF_TOKEN", token)
        error = refused(report)
        assert isinstance(error, EnvironmentLacks) and "gated" in error.message
        assert f"https://huggingface.co/{ID}" in error.hint and "`hf auth login`" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_granted")
    hub.granted.add("hf_granted")
    opened(report).fetch_weights(report)


def test_a_wrong_token_is_not_told_as_a_missing_repository(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, FILES)
    monkeypatch.setenv("HF_TOKEN", "hf_expired")
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "does not accept the token" in error.message
    assert "`hf auth login`" in error.hint and "HF_TOKEN, which is set" in error.hint
    assert "hf_expired" not in str(error)
    monkeypatch.delenv("HF_TOKEN")
    hub.home.mkdir()
    (hub.home / "token").write_text("hf_expired", encoding="utf-8")
    assert "HF_TOKEN" not in refused(report).hint


@pytest.mark.parametrize("token", ["", "hf_known"])
@pytest.mark.parametrize("private", [False, True])
def test_a_repository_that_is_not_shown_may_be_misspelt_or_private(
    hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch, token: str, private: bool
) -> None:
    if private:
        hub.add(ID, FILES, private=True)
    hub.tokens.add("hf_known")
    hub.blind.add("hf_known")
    monkeypatch.setenv("HF_TOKEN", token)
    error = refused(report)
    assert isinstance(error, BadInput) and f"no model repository {ID}" in error.message and "private" in error.message


def test_a_missing_revision_is_not_a_missing_repository(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    error = refused(report, f"{ID}@v9")
    assert isinstance(error, BadInput) and error.message == f"{ID} has no revision v9."


@pytest.mark.parametrize("status", [401, 403, 404, 418, 500])
@pytest.mark.parametrize("path", [ID, "config.json", FIRST])
def test_a_status_that_stays_is_told(hub: Hub, report: Notes, path: str, status: int) -> None:
    hub.add(ID, FILES)
    hub.inject(path, status=status, times=-1)
    error = refused(report)
    assert isinstance(error, BadInput if (path, status) == (ID, 404) else EnvironmentLacks)
    assert ID in error.message
    if (path, status) != (ID, 404):
        assert str(status) in error.message
    if path != ID and status in {404, 418, 500}:
        assert f"{path} of {ID} cannot be fetched" in error.message
    tries = len([request for request in hub.requests if request.path.partition("?")[0].endswith(path)])
    assert tries == (1 if status < 500 else client.METADATA_TRIES if path == ID else client.FILE_TRIES)


@pytest.mark.parametrize("path", [ID, "config.json", FIRST])
@pytest.mark.parametrize("status", [408, 429, 503, 522])
def test_a_status_that_passes_is_waited_for(hub: Hub, report: Notes, path: str, status: int) -> None:
    hub.add(ID, FILES)
    hub.inject(path, status=status, times=2)
    opened(report).fetch_small()
    opened(report).fetch_weights(report)
    assert len(report.notes) == 2 and all(f"answers {status}" in note for note in report.notes)


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "2"},
        {"RateLimit": '"api";r=0;t=2', "RateLimit-Policy": '"fixed window";"api";q=500;w=300'},
        {"Retry-After": "at"},
    ],
)
@pytest.mark.parametrize("path", [ID, FIRST])
def test_too_many_requests_are_waited_for_as_long_as_the_hub_asks(
    hub: Hub, report: Notes, path: str, headers: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add(ID, FILES)
    asked = 2
    if headers.get("Retry-After") == "at":
        asked = 60
        headers = {"Retry-After": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + asked))}
    hub.inject(path, status=429, headers=headers)
    slept: list[float] = []
    monkeypatch.setattr(client, "time", types.SimpleNamespace(sleep=slept.append, time=time.time))
    opened(report).fetch_weights(report)
    (seconds,) = slept
    assert max(2, asked - 5) <= seconds <= asked
    assert len(report.notes) == 1 and re.search(
        "answers 429, a fault; trying again in (2|5[5-9]|60) s$", report.notes[0]
    )


@pytest.mark.parametrize("headers", [{"Retry-After": "7200"}, {"RateLimit": '"api";r=0;t=7200'}])
def test_a_wait_of_hours_is_told_and_not_waited_for(hub: Hub, report: Notes, headers: dict[str, str]) -> None:
    hub.add(ID, FILES)
    hub.inject(ID, status=429, headers=headers, times=-1)
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "too many requests" in error.message and "120 minutes" in error.hint
    assert len(hub.requests) == 1


@pytest.mark.parametrize(
    "page", ["<html><body>Log in to the guest network</body></html>", "[]", "{}", '"x"', '{"id": 3}', "null", ""]
)
def test_a_page_in_the_place_of_metadata_is_told(hub: Hub, report: Notes, page: str) -> None:
    hub.add(ID, FILES)
    hub.inject(ID, page=page, times=-1)
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "is not the hub" in error.message


@pytest.mark.parametrize("path", ["config.json", FIRST])
def test_a_page_in_the_place_of_a_file_is_told_and_what_had_come_is_kept(hub: Hub, report: Notes, path: str) -> None:
    hub.add(ID, FILES)
    hub.inject(path, drop=10)
    hub.inject(path, page="<html>" + "x" * len(FILES[path]), times=-1)
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "is not the hub" in error.message
    hub.heal()
    source = opened(report)
    source.fetch_small()
    source.fetch_weights(report)
    assert hub.asked(path)[-1] == "bytes=10-"


# ---------------------------------------------------------------------------------------------------------------------
# Without the hub
# ---------------------------------------------------------------------------------------------------------------------


def test_no_network_is_told(hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.stop()
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "Connection refused" in error.message
    for endpoint in ("http://no-such-host.invalid", "127.0.0.1:1", "http://127.0.0.1:port"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        assert isinstance(refused(report), EnvironmentLacks)


@pytest.mark.parametrize("revision", ["", "@v1", "@COMMIT"])
def test_without_a_hub_what_is_in_the_cache_is_used_and_said(hub: Hub, report: Notes, revision: str) -> None:
    commit = hub.add(ID, FILES, revisions=["main", "v1"])
    text = ID + revision.replace("COMMIT", commit)
    source = opened(report, text)
    source.fetch_small()
    source.fetch_weights(report)
    hub.stop()
    source = opened(report, text)
    assert source.listing is None and source.commit == commit
    assert any(f"What is in the cache is used: commit {commit}." in note for note in report.notes)
    assert source.complete and source.missing_bytes == 0
    assert source.fetch_small() == source.directory
    source.fetch_weights(report)
    assert source.weights[0].sha256 == hashlib.sha256(FILES[FIRST]).hexdigest()


def test_without_a_hub_what_is_missing_or_damaged_is_told_with_the_reason(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    source = opened(report)
    source.fetch_small()
    source.shard(SECOND)
    hub.stop()
    source = opened(report)
    assert not source.complete
    with pytest.raises(EnvironmentLacks, match=f"{FIRST} of {ID} is not there in the cache.*Connection refused"):
        source.fetch_weights(report)
    (source.directory / SECOND).write_bytes(content(97))
    with pytest.raises(EnvironmentLacks, match=f"{SECOND} of {ID} is damaged in the cache.*Connection refused"):
        opened(report).shard(SECOND)


def test_without_a_hub_weights_that_were_never_fetched_are_not_said_to_be_none(hub: Hub, report: Notes) -> None:
    """Where there is no index, the cache does not show what the repository has."""
    hub.add(ID, {"config.json": b"{}", "model.safetensors": content(97)})
    opened(report).fetch_small()
    hub.stop()
    with pytest.raises(EnvironmentLacks, match=f"model.safetensors of {ID} is not there in the cache.*refused"):
        _ = opened(report).weights


def test_offline_is_respected(hub: Hub, report: Notes, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(ID, FILES)
    opened(report).fetch_small()
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert opened(report).fetch_small().is_dir()
    assert "HF_HUB_OFFLINE" in report.notes[-1]
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and "HF_HUB_OFFLINE is set" in error.message
    assert "HF_HUB_OFFLINE is set" in refused(report, "toys/Other").message
    assert len(hub.requests) == asked


# ---------------------------------------------------------------------------------------------------------------------
# The disk
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_with_the_cache_and_the_way_out(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    source = opened(report)
    source.fetch_small()
    partial = source._partial(source.weights[0])
    partial.symlink_to("/dev/full")
    with pytest.raises(EnvironmentLacks) as caught:
        source.fetch_weights(report)
    assert "disk is full" in caught.value.message and str(hub.cache) in caught.value.message
    assert "HF_HOME" in caught.value.hint


def test_a_cache_that_cannot_be_written_is_told(hub: Hub, report: Notes, tmp_path: Path) -> None:
    hub.add(ID, FILES)
    hub.home.mkdir()
    hub.cache.write_text("a file", encoding="utf-8")
    error = refused(report)
    assert isinstance(error, EnvironmentLacks) and str(hub.cache) in error.message and "HF_HOME" in error.hint


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_that_is_read_only_is_read(hub: Hub, report: Notes) -> None:
    hub.add(ID, FILES)
    opened(report).fetch_weights(report)
    folders = [path for path in hub.home.rglob("*") if path.is_dir()]
    for folder in folders:
        folder.chmod(0o555)
    try:
        opened(report).fetch_weights(report)
        assert "Permission denied" in refused(report).message
    finally:
        for folder in folders:
            folder.chmod(0o755)


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

COMMIT = "0123456789" * 4


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("Qwen/Qwen3.6-27B", ("Qwen/Qwen3.6-27B", None)),
        ("Qwen/Qwen3.6-27B/", ("Qwen/Qwen3.6-27B", None)),
        ("Qwen/Qwen3.6-27B@v1", ("Qwen/Qwen3.6-27B", "v1")),
        (f"Qwen/Qwen3.6-27B@{COMMIT}", ("Qwen/Qwen3.6-27B", COMMIT)),
        ("a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a/b@feature/x", ("a/b", "feature/x")),
        ("https://huggingface.co/Qwen/Qwen3.6-27B", ("Qwen/Qwen3.6-27B", None)),
        ("https://huggingface.co/Qwen/Qwen3.6-27B/", ("Qwen/Qwen3.6-27B", None)),
        ("https://huggingface.co/Qwen/Qwen3.6-27B?library=transformers", ("Qwen/Qwen3.6-27B", None)),
        ("http://huggingface.co/a/b#usage", ("a/b", None)),
        ("https://huggingface.co/a/b/tree/main", ("a/b", "main")),
        (f"https://huggingface.co/a/b/tree/{COMMIT}", ("a/b", COMMIT)),
        ("https://huggingface.co/a/b/tree/refs%2Fpr%2F1", ("a/b", "refs/pr/1")),
        ("https://huggingface.co/a/b/blob/v2/config.json", ("a/b", "v2")),
        ("https://huggingface.co/a/b/resolve/main/config.json?download=true", ("a/b", "main")),
        ("huggingface.co/a/b", ("a/b", None)),
        ("hf.co/a/b@v1", ("a/b", "v1")),
        ("https://hf.co/a/b", ("a/b", None)),
        ("hf://a/b@v1", ("a/b", "v1")),
        ("https://huggingface.co/datasets/a/b", None),
        ("https://huggingface.co/spaces/a/b", None),
        ("hf://datasets/a/b", None),
        ("datasets/b", None),
        ("https://huggingface.co/a", None),
        ("hf.co/a", None),
        ("https://example.com/a/b", None),
        ("qwen3.6-27b", None),
        ("a/b/c", None),
        ("./a/b", None),
        ("../a", None),
        ("/a/b", None),
        ("a/b@", None),
        ("a/b@../../x", None),
        ("a/b@-v", None),
        ("a//b", None),
        ("a/b c", None),
        ("", None),
    ],
)
def test_a_repository_is_named_by_its_id_or_by_a_page(text: str, found: tuple[str, str | None] | None) -> None:
    assert Repository.parse(text) == (None if found is None else Repository(*found))


def test_a_page_of_the_hub_that_is_used_names_a_repository(hub: Hub) -> None:
    assert Repository.parse(f"{hub.endpoint}/{ID}/tree/v1") == Repository(ID, "v1")
    assert str(Repository(ID, "v1")) == f"{ID}@v1" and str(Repository(ID)) == ID


@pytest.mark.parametrize("repository", [Repository("no id"), Repository(ID, "../../x"), Repository("a--b/c")])
def test_a_repository_that_cannot_be_is_told(hub: Hub, report: Notes, repository: Repository) -> None:
    with pytest.raises(BadInput):
        HubSource.open(repository, report)
    assert hub.requests == []


def test_files_that_would_lie_elsewhere_are_not_fetched(hub: Hub, report: Notes) -> None:
    hub.add(ID, {"config.json": b"{}", "../tokenizer.json": b"evil", "/README.md": b"evil", "a/../../LICENSE": b"evil"})
    assert [path.name for path in opened(report).fetch_small().iterdir()] == ["config.json"]


@pytest.mark.parametrize(
    ("index", "words"),
    [
        (b"{}", "has no weight_map"),
        (b"[]", "must hold a JSON object"),
        (b"\xff", "is not UTF-8 text"),
        (b'{"weight_map": {}}', "has no weight_map"),
        (b'{"weight_map": {"a": "../../../x"}}', "leads outside of"),
        (b'{"weight_map": {"a": 3}}', "is not a file name"),
        (b'{"weight_map": {"a": ["x"]}}', "is not a file name"),
        (b'{"weight_map": {"a": "model-00003-of-00003.safetensors"}}', "which the repository does not have"),
    ],
)
def test_an_index_that_names_no_files_of_the_repository_is_told(
    hub: Hub, report: Notes, index: bytes, words: str
) -> None:
    hub.add(ID, {**FILES, "model.safetensors.index.json": index})
    with pytest.raises(BadInput, match=words):
        _ = opened(report).weights


def test_a_repository_without_safetensors_is_told(hub: Hub, report: Notes) -> None:
    hub.add(ID, {"config.json": b"{}", "pytorch_model.bin": b"x"})
    with pytest.raises(BadInput, match=r"no safetensors weights, only pytorch_model\.bin"):
        _ = opened(report).weights


# ---------------------------------------------------------------------------------------------------------------------
# The hub of the tests
# ---------------------------------------------------------------------------------------------------------------------


def test_an_upload_arrives(hub: Hub, report: Notes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.tokens.add("hf_right")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    folder = tmp_path / "upload"
    for name, data in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    api = huggingface_hub.HfApi()
    for _ in range(2):
        assert api.create_repo(ID, private=True, exist_ok=True) == f"{hub.endpoint}/{ID}"
        info = api.upload_folder(repo_id=ID, folder_path=folder, commit_message="A bundle")
    api.create_branch(ID, branch="v1")
    (folder / "NEWS.md").write_text("New.", encoding="utf-8")
    api.upload_folder(repo_id=ID, folder_path=folder, revision="v1", commit_message="News")
    stored = hub.repositories[ID]
    assert stored.commits[stored.revisions["v1"]]["NEWS.md"] == b"New."
    assert {name: data for name, data in stored.files.items() if name != ".gitattributes"} == FILES
    assert stored.private and stored.messages == ["A bundle", "News"] and info.oid == stored.revisions["main"]
    assert [request.method for request in hub.requests].count("PUT") == 4
    opened(report).fetch_weights(report)

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(huggingface_hub.errors.HfHubHTTPError, match="Invalid credentials"):
        api.upload_folder(repo_id=ID, folder_path=folder)


def test_what_git_calls_a_content_is_what_git_calls_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(FILES["config.json"])
    told = subprocess.run(["git", "hash-object", tmp_path / "file"], capture_output=True, text=True, check=True)
    assert git_sha1(FILES["config.json"]) == told.stdout.strip()
