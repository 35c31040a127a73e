"""The main job on a shipped sample, from checkpoint to text: what `make demo` runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attrs import frozen

from coreai_zoo.build.pipeline import BuildResult, build
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.bundle.generate import Limits, generate
from coreai_zoo.bundle.verify import backend_of
from coreai_zoo.gates.run import GateOptions, run_gate, write_report
from coreai_zoo.plugins import Plugins
from coreai_zoo.progress import Reporter

_GATE = GateOptions(prompts="code", positions=32)
_PROMPT = "def main("
_NEW_TOKENS = 40


@frozen
class Demonstration:
    """What came out of a sample.

    Attributes:
        built: the build.
        bundle: the bundle that it made.
        record: transcript of the bundle's gate.
        page: path of the gate's report.
        text: what the bundle wrote, the prompt included.
    """

    built: BuildResult
    bundle: Bundle
    record: Mapping[str, Any]
    page: Path
    text: str


def demonstrate(entry: str, output: Path, plugins: Plugins, report: Reporter) -> Demonstration:
    """Build the sample of `entry` into `output`, gate it against Hugging Face, and let it write."""
    built = build(BuildRequest(entry, sample=True, output=output, force=True), plugins, report)
    bundle = Bundle.open(built.path)
    backend = backend_of(bundle, plugins.backends())
    (record,) = run_gate([bundle], _GATE, plugins, report)
    page = write_report(bundle, [record])
    with report.stage("generate", f"{_NEW_TOKENS} tokens on the {backend.name} runtime"):
        text = "".join(piece.text for piece in generate(bundle, backend, _PROMPT, Limits(_NEW_TOKENS)))
    return Demonstration(built, bundle, record, page, _PROMPT + text)
