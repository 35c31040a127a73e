"""A checkpoint on the hub: asked for, fetched, compared with what the hub states; with everything that goes wrong there.

The client is the real `huggingface_hub`, the hub a real server on this machine, see tests/hub.py.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import pytest

from coreai_zoo.checkpoint import hub as client
from coreai_zoo.checkpoint.hub import HubSource, Repository
from coreai_zoo.progress import CountBytes, Reporter
from hub import Hub

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
