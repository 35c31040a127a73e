"""The walk of a build in docs/architecture.md is the way of a real one: a model is built, and its calls are watched."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Self

import pytest
from attrs import frozen
from click.testing import CliRunner
from safetensors.torch import save_file

import toy_plugin
from coreai_zoo.backends import builtin
from coreai_zoo.cli.app import cli
from coreai_zoo.plugins import Plugins
from hub import Hub
from test_architecture import FLOORS, HOST, room, walk
from test_toy_plugin import CONFIG, ENTRY, checkpoint_tensors, write_tokenizer


@frozen
class Call:
    """One function of the host called by another, each `module.function`, however many others are in between."""

    caller: str
    callee: str


class Watch:
    """The calls between functions of the host, in order, each once; what is not in the host is looked through."""

    def __init__(self) -> None:
        self.calls: dict[Call, None] = {}
        self._names: dict[types.CodeType, str | None] = {}

    def __enter__(self) -> Self:
        self._before = sys.gettrace()
        sys.settrace(self._see)
        return self

    def __exit__(self, *_error: object) -> None:
        sys.settrace(self._before)

    def _see(self, frame: types.FrameType, _event: str, _argument: object) -> None:
        """Called at every call; without an answer Python does not ask for the lines of the function."""
        try:
            callee = self._names[frame.f_code]
        except KeyError:
            callee = self._name(frame.f_code)
        if callee is None:
            return
        above = frame.f_back
        while above is not None and (caller := self._name(above.f_code)) is None:
            above = above.f_back
        if above is not None:
            self.calls[Call(str(caller), callee)] = None

    def _name(self, code: types.CodeType) -> str | None:
        if code not in self._names:
            path = Path(code.co_filename)
            inside = path.is_relative_to(HOST) and code.co_name != "<module>"
            module = ".".join(path.relative_to(HOST).with_suffix("").parts) if inside else ""
            self._names[code] = f"{module}.{code.co_qualname}" if inside else None
        return self._names[code]


@pytest.mark.slow
def test_a_build_goes_down_but_for_what_it_hands_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: Hub
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    shard, tensors = "model-00001-of-00001.safetensors", checkpoint_tensors()
    save_file(tensors, checkpoint / shard)
    index = json.dumps({"weight_map": dict.fromkeys(tensors, shard)})
    (checkpoint / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    write_tokenizer(checkpoint)
    entry = tmp_path / "toy.toml"
    entry.write_text(ENTRY, encoding="utf-8")
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(toy_plugin.ToyPlugin(entry), "toys")
    hub.add("toys/Toy-Mean", checkpoint)
    # What is there already is looked for by a design of its own, which would be seen before that of the build.
    command = ["build", "toys/Toy-Mean", "--force", "--json"]

    with Watch() as watch:
        done = CliRunner().invoke(cli, command, obj=plugins)

    assert done.exit_code == 0, done.output
    up = {
        (call.caller.partition(".<locals>")[0], call.callee)
        for call in watch.calls
        if FLOORS[room(call.caller)] > FLOORS[room(call.callee)]
        if not call.callee.startswith("backends.builtin.zoo_")  # a plugin's hooks are called by the host, as all are
        if room(call.caller) != "toml_files"  # it calls the validators of the class that it reads
    }
    assert up == {
        ("lowering.module.build_module", "build.design.Decoders._decoder"),
        ("backends.coreai.backend.CoreAITraced.lay_out", "build.pipeline._laid_out.<locals>.values"),
        ("weights.store._Work._write_tensor", "build.pipeline._fill.<locals>.progress"),
        # What the backend has put in the place of a composite, by way of torch.
        ("composites.RMSNorm.forward", "backends.coreai.composites._remembering.<locals>.results"),
        ("composites.SDPA.forward", "backends.coreai.composites._remembering.<locals>.results"),
    }
    assert in_walk_order([call.callee for call in watch.calls])


def in_walk_order(called: list[str]) -> bool:
    """Whether the steps of the page were taken in its order, but for those that another thread or no toy takes."""
    steps = [step.callee for step in walk() if step.callee in called]
    missing = {step.callee for step in walk()} - set(steps)
    elsewhere = {name for name in missing if name.startswith(("weights.convert", "weights.quantizer"))}
    assert missing - elsewhere <= {
        "cli.build.build",  # nothing of the host calls it but click
        "checkpoint.files.Checkpoint.read_rows",  # in a thread
        "lowering.extension.extend",  # two layers are traced whole
    }
    return sorted(steps, key=called.index) == steps
