"""`zoo diff` says what changed, and says that nothing did only when that is so."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

import prefill_mutants
from checkpoints import tiny_checkpoint
from command import zoo
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.backends.coreai.bytecode import Bytecode
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.errors import BadInput
from coreai_zoo.lowering.graph import Graph, LayerKind, count, telling_depth
from coreai_zoo.plugins import Plugins, default_plugins
from coreai_zoo.program import Function, Operation, Program
from coreai_zoo.progress import Reporter
from coreai_zoo.review import comparison, revision
from coreai_zoo.review.diff import Change, Difference, Section, as_markdown, compare, numerics_missing
from coreai_zoo.review.revision import build_sample, worktree
from coreai_zoo.review.structure import Structure, of_bundle
from coreai_zoo.review.verdict import KINDS, Next, judge
from mutants import applied
from shared import Shared

BACKEND = CoreAIBackend()
POSITIONS = "6"


@pytest.fixture(scope="module")
def checkpoint(shared: Shared) -> Path:
    return shared.folder("tiny-dense", tiny_checkpoint)


@pytest.fixture(scope="module")
def built(checkpoint: Path, shared: Shared) -> Callable[[str], Path]:
    """A bundle of the tiny checkpoint, once per recipe."""

    def fill(recipe: str, output: Path) -> None:
        options = ("--custom", "--recipe", recipe, "-o", output, "--max-context", 64)
        result = zoo("build", "qwen3.6-27b", "--checkpoint", checkpoint, *options)
        assert result.exit_code == 0, result.output

    @functools.cache
    def build(recipe: str) -> Path:
        (bundle,) = shared.folder(f"tiny-{recipe}", functools.partial(fill, recipe)).iterdir()
        return bundle

    return build


@pytest.fixture
def copy(built: Callable[[str], Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(built("int8hu"), tmp_path / "copy"))


def difference(a: Path, b: Path, *options: object) -> dict[str, Any]:
    result = zoo("diff", a, b, "--json", "--positions", POSITIONS, *options)
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def changes(found: Mapping[str, Any], section: str) -> dict[str, tuple[str | None, str | None]]:
    (chosen,) = (each for each in found["sections"] if each["name"] == section)
    return {change["what"]: (change["before"], change["after"]) for change in chosen["changes"]}


def changed_sections(found: Mapping[str, Any]) -> list[str]:
    return [section["name"] for section in found["sections"] if section["changes"]]


# ---------------------------------------------------------------------------------------------------------------------
# Two bundles
# ---------------------------------------------------------------------------------------------------------------------


def test_a_copy_has_no_change_and_everything_was_compared(
    built: Callable[[str], Path], copy: Path, checkpoint: Path
) -> None:
    found = difference(built("int8hu"), copy, "--checkpoint", checkpoint)
    assert found["summary"] == "no change in graph, weights or numerics"
    assert not found["changed"]
    assert {section["missing"] for section in found["sections"]} == {None}
    assert found["verdict"] == {"kind": "none", "reason": "nothing that was compared has changed", "commands": []}
    assert zoo("diff", built("int8hu"), copy, "--no-numerics", "--exit-code").exit_code == 0


def test_what_was_not_compared_is_not_called_unchanged(built: Callable[[str], Path], copy: Path) -> None:
    found = difference(built("int8hu"), copy)
    expected = "no change in graph or weights; numerics not compared: they are no samples; pass --checkpoint DIR"
    assert found["summary"] == expected
    found = difference(built("int8hu"), copy, "--no-numerics")
    assert found["summary"] == "no change in graph or weights; numerics not compared: they were left out"


def test_bundles_of_two_checkpoints_are_said_to_be_that(built: Callable[[str], Path], copy: Path) -> None:
    build = json.loads((copy / "build.json").read_text())
    build["source"]["config_sha256"] = "0" * 64
    (copy / "build.json").write_text(json.dumps(build))
    reason = "numerics not compared: they were built from different checkpoints"
    assert difference(built("int8hu"), copy)["summary"].endswith(reason)


def test_one_byte_of_one_weight_is_found_and_its_effect_is_shown(
    built: Callable[[str], Path], copy: Path, checkpoint: Path
) -> None:
    (asset,) = copy.glob("*.aimodel")
    name = "model.layers.1.mlp.down_proj.parametrizations.weight.original"
    blob = next(blob for blob in Bytecode.open(asset / "main.mlirb").blobs if blob.name == name)
    content = bytearray((asset / "main.mlirb").read_bytes())
    content[blob.offset + 5] ^= 0x40
    (asset / "main.mlirb").write_bytes(content)
    (asset / "main.hash").write_bytes(hashlib.sha256(content).digest())

    found = difference(built("int8hu"), copy, "--checkpoint", checkpoint)

    assert changed_sections(found) == ["constants", "numerics"]
    content_change = changes(found, "constants")
    assert content_change == {"content of model.layers.*.mlp.down_proj.weight": ("1 x", "1 bytes are others")}
    assert found["summary"] == "no change in graph; weights and numerics changed"
    assert found["verdict"]["kind"] == "numerics"
    assert found["verdict"]["commands"] == [f"zoo gate {copy} --checkpoint {checkpoint}"]
    assert float(changes(found, "numerics")["largest difference of a logit, A to B"][1] or 0) > 0


def test_a_recipe_shows_in_operations_constants_bytes_and_numerics(
    built: Callable[[str], Path], checkpoint: Path
) -> None:
    found = difference(built("int8hu"), built("int4lin"), "--checkpoint", checkpoint)
    operations = changes(found, "operations")
    # The head is not quantized any more; nothing else is counted differently, but for the sum.
    assert operations["outside of the layers: blockwise_shift_scale"] == ("1", "0")
    assert {what.rpartition(": ")[2] for what in operations if not what.startswith(("only in", "and "))} == {
        "blockwise_shift_scale",
        "operations",
    }
    constants = changes(found, "constants")
    assert constants["lm_head.weight"] == ("1 x int8 [288, 32]", "1 x float16 [288, 32]")
    assert constants["lm_head.weight scales"] == ("1 x float16 [288, 1]", None)
    assert constants["model.layers.*.mlp.down_proj.weight"] == ("2 x int8 [32, 64]", "2 x int4 [32, 64]")
    assert changes(found, "recipe per role")["head"] == ("int8 block 32 symmetric", "not quantized")
    before, after = changes(found, "bytes per token")["weights read per decoded token"]
    assert int((before or "").replace(",", "")) > int((after or "").replace(",", ""))
    assert changes(found, "numerics")["against the oracle: matched"][0] == f"{POSITIONS} of {POSITIONS}"
    assert changes(found, "signature") == changes(found, "facts") == {}
    assert found["summary"].startswith("graph, weights and numerics changed; also changed: bytes per token")


def test_metadata_alone_is_no_change_of_what_is_computed(
    built: Callable[[str], Path], copy: Path, checkpoint: Path
) -> None:
    metadata = json.loads((copy / "metadata.json").read_text())
    metadata["language"]["max_context_length"] = 32
    (copy / "metadata.json").write_text(json.dumps(metadata))
    found = difference(built("int8hu"), copy, "--checkpoint", checkpoint)
    assert found["summary"] == "no change in graph, weights or numerics; also changed: metadata"
    assert changes(found, "metadata") == {"language.max_context_length": ("64", "32")}
    assert found["verdict"]["kind"] == "metadata"
    assert found["verdict"]["commands"] == [f"zoo verify {copy}"]
    assert zoo("diff", built("int8hu"), copy, "--no-numerics", "--exit-code").exit_code == 1


def test_a_state_of_another_dtype_is_a_change_of_the_graph(built: Callable[[str], Path], copy: Path) -> None:
    build = json.loads((copy / "build.json").read_text())
    build["functions"]["main"]["states"][2]["dtype"] = "float32"
    (copy / "build.json").write_text(json.dumps(build))
    found = difference(built("int8hu"), copy, "--no-numerics")
    ((before, after),) = changes(found, "signature").values()
    assert (before or "").replace("float16", "float32") == after
    assert "graph changed" in found["summary"]
    assert found["verdict"]["kind"] == "signature"
    assert found["verdict"]["commands"] == [f"zoo verify {copy}", f"zoo gate {copy} --checkpoint DIR"]


def test_text_and_markdown_say_the_same(built: Callable[[str], Path]) -> None:
    arguments = ("diff", built("int8hu"), built("int4lin"), "--no-numerics")
    text, markdown = zoo(*arguments), zoo(*arguments, "--markdown")
    assert text.exit_code == markdown.exit_code == 0
    summary = text.output.splitlines()[-1]
    assert f"**{summary}**" in markdown.output
    row = re.search(r"^\| lm_head\.weight scales \| 1 x float16 \[288, 1\] \| - \|$", markdown.output, re.MULTILINE)
    assert row
    assert re.search(r"^lm_head\.weight scales +1 x float16 \[288, 1\] +- *$", text.output, re.MULTILINE)
    tables = [line for line in markdown.output.splitlines() if line.startswith("|")]
    assert {line.replace("\\|", "").count("|") for line in tables} == {4}


def test_a_summary_of_sections_that_are_left_out_claims_nothing() -> None:
    empty = Difference("a", "b", (Section("operations", (), about="graph"), numerics_missing("no runtime")))
    assert (
        empty.summary
        == "no change in graph; weights not compared: they were left out; numerics not compared: no runtime"
    )
    assert "Not compared: no runtime." in as_markdown(empty)


# ---------------------------------------------------------------------------------------------------------------------
# The verdict
# ---------------------------------------------------------------------------------------------------------------------


def test_what_to_run_next_can_be_pasted_whatever_a_folder_is_called(
    built: Callable[[str], Path], copy: Path, tmp_path: Path
) -> None:
    other = copy.rename(tmp_path / "it's a copy")
    build = json.loads((other / "build.json").read_text())
    build["functions"]["main"]["states"][2]["dtype"] = "float32"
    (other / "build.json").write_text(json.dumps(build))

    verify, gate = difference(built("int8hu"), other, "--no-numerics")["verdict"]["commands"]

    assert shlex.split(verify) == ["zoo", "verify", str(other)]
    assert shlex.split(gate) == ["zoo", "gate", str(other), "--checkpoint", "DIR"]


COMMANDS = Next(("zoo verify B",), ("zoo gate B",), ("zoo check --update-goldens",))


def sections(*changed: str, run: bool = True) -> Difference:
    """A difference of which these sections changed, numerics having been compared or not."""
    about = {"signature": "graph", "operations": "graph", "constants": "weights", "numerics": "numerics"}
    change = (Change("something", "1", "2"),)
    return Difference(
        "a",
        "b",
        tuple(
            numerics_missing("no checkpoint")
            if name == "numerics" and not run
            else Section(name, change if name in changed else (), about=about.get(name))
            for name in ("facts", "signature", "operations", "constants", "recipe per role", "numerics", "metadata")
        ),
    )


@pytest.mark.parametrize(
    ("difference", "kind", "commands"),
    [
        (sections(), "none", []),
        (sections(run=False), "none", []),
        (sections("metadata"), "metadata", ["zoo verify B"]),
        (sections("facts", "metadata", run=False), "metadata", ["zoo verify B"]),
        (sections("operations"), "graph", ["zoo check --update-goldens"]),
        (sections("operations", run=False), "numerics", ["zoo gate B", "zoo check --update-goldens"]),
        (sections("constants", "recipe per role"), "weights", ["zoo gate B"]),
        (sections("constants", run=False), "weights", ["zoo gate B"]),
        (sections("operations", "constants"), "weights", ["zoo gate B", "zoo check --update-goldens"]),
        (sections("numerics"), "numerics", ["zoo gate B"]),
        (sections("operations", "numerics"), "numerics", ["zoo gate B", "zoo check --update-goldens"]),
        (
            sections("signature", "operations", "constants", "numerics"),
            "signature",
            ["zoo verify B", "zoo gate B", "zoo check --update-goldens"],
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_verdict_is_the_kind_that_weighs_most_and_what_to_run_next(
    difference: Difference, kind: str, commands: list[str]
) -> None:
    verdict = judge(difference, COMMANDS)
    assert (verdict.kind, list(verdict.commands), verdict.changed) == (kind, commands, difference.changed)
    assert kind in KINDS
    assert str(verdict).startswith(f"Verdict: {kind}. ") and ".." not in str(verdict)
    assert all(f"`{command}`" in str(verdict) for command in commands)


def test_a_verdict_does_not_say_that_numbers_are_the_same_where_none_were_compared() -> None:
    assert "was not seen: no checkpoint" in str(judge(sections("operations", run=False), COMMANDS))
    assert "logits were not compared: no checkpoint" in str(judge(sections("constants", run=False), COMMANDS))
    assert "no logit did where both were run" in str(judge(sections("constants"), COMMANDS))


def test_what_no_comparison_looked_at_is_told_where_nothing_changed() -> None:
    beyond = evolve(COMMANDS, unseen="; by one contract", beyond=("zoo check",))
    assert str(judge(sections(), beyond)) == (
        "Verdict: none. Nothing that was compared has changed; by one contract. Next: `zoo check`."
    )
    assert judge(sections("metadata"), beyond).commands == ("zoo verify B",)


def test_a_role_that_is_stored_otherwise_is_a_change_of_weights(built: Callable[[str], Path]) -> None:
    """Also where tensors are of the same formats, as by recipes that choose other scales."""
    a = of_bundle(Bundle.open(built("int8hu")), BACKEND)
    roles = {name: evolve(role, stored=f"{role.stored}, otherwise") for name, role in a.roles.items()}
    verdict = judge(compare(a, evolve(a, roles=roles), None, numerics_missing("two models")), COMMANDS)
    assert verdict.kind == "weights" and "logits were not compared: two models" in verdict.reason


def test_a_change_of_what_reads_prompts_is_one_of_numerics(checkpoint: Path, tmp_path: Path) -> None:
    """Token by token nothing changes, for another function decodes."""
    options = ("--checkpoint", checkpoint, "--custom", "--contract", "chunked-unrolled", "--max-context", 64)
    (mutant,) = (each for each in prefill_mutants.OTHER_FORMS if each.name == "taps-backwards")
    for name, edited in (("a", contextlib.nullcontext()), ("b", applied(mutant))):
        with edited:
            assert zoo("build", "qwen3.6-27b", *options, "-o", tmp_path / name).exit_code == 0
    (a,), (b,) = (list((tmp_path / name).iterdir()) for name in "ab")

    found = difference(a, b, "--checkpoint", checkpoint)

    read = "the prompt read at once: largest difference of {}, A to B"
    changed = changes(found, "numerics")
    assert {read.format("recState"), read.format("the last token's logits")} < {*changed}
    assert (
        all(what.startswith("the prompt read at once") for what in changed) and found["verdict"]["kind"] == "numerics"
    )
    assert "token by token and by prefill" in next(s["note"] for s in found["sections"] if s["name"] == "numerics")
    same = difference(a, a, "--checkpoint", checkpoint)
    assert same["summary"] == "no change in graph, weights or numerics"


@pytest.mark.parametrize("contract", [None, "chunked"])
def test_revisions_build_the_file_of_an_entry_by_the_contract_that_is_asked_for(
    contract: str | None, built: Callable[[str], Path], tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tmp_path / "mine.toml"
    shutil.copyfile(root / "zoo_entries" / "qwen3.6-27b.toml", entry)
    asked: list[tuple[str, str | None]] = []

    def build(subject: str, *_: object, contract: str | None) -> Path:
        asked.append((subject, contract))
        return built("int8hu")

    monkeypatch.setattr(comparison, "build_sample", build)
    monkeypatch.chdir(root)
    options = ("--contract", contract) if contract else ()
    done = zoo("diff", os.path.relpath(entry), "--rev", "HEAD", "--no-numerics", *options)
    assert done.exit_code == 0, done.output
    assert asked == [(str(entry), contract)] * 2
    assert "compared by contract static-s1 and by no other" in done.stdout, "which is what the bundles say"


def test_two_recipes_of_an_entry_s_file_are_run_on_the_sample_of_that_file(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = tmp_path / "mine.toml"
    shutil.copyfile(root / "zoo_entries" / "qwen3.6-27b.toml", entry)

    def build(request: BuildRequest, *_: object) -> None:
        raise LookupError(request.model, request.recipe, request.contract)

    monkeypatch.setattr(comparison, "build", build)
    comparer = comparison.Comparer(default_plugins(), Reporter(silent=True), None, 6, numerics=True, contract="chunked")
    sides = [comparer._entry_recipe(f"{entry}:{recipe}") for recipe in ("fp16", "int8hu")]
    with pytest.raises(LookupError) as caught:
        comparer._numerics_of_samples(*sides)
    assert caught.value.args == (str(entry), "fp16", "chunked")


def test_text_and_markdown_end_in_the_verdict(built: Callable[[str], Path], copy: Path) -> None:
    arguments = ("diff", built("int8hu"), copy, "--no-numerics")
    expected = "Verdict: none. Nothing that was compared has changed. Nothing to do."
    assert zoo(*arguments).output.splitlines()[-1] == expected
    assert zoo(*arguments, "--markdown").output.splitlines()[-1] == f"**{expected}**"


# ---------------------------------------------------------------------------------------------------------------------
# Graphs
# ---------------------------------------------------------------------------------------------------------------------


def test_every_operation_is_counted_once(built: Callable[[str], Path]) -> None:
    (asset,) = built("int8hu").glob("*.aimodel")
    program = BACKEND.program(asset)
    graph = count(program)["main"]
    assert graph.total == Counter(op.name for op in program.functions["main"].operations if not op.is_constant)
    assert [(kind.name, kind.layers) for kind in graph.kinds] == [("linear_attn", (0,)), ("self_attn", (1,))]
    assert graph.outside["gather_nd"] == graph.outside["cos"] == 1  # embedding and rotation
    assert graph.kinds[1].operations["scaled_dot_product_attention"] == 1
    assert {name: len(view) for name, view in BACKEND.constants(asset).items()}.keys() == program.stored.keys()


def test_every_function_that_an_engine_calls_is_compared_by_itself(built: Callable[[str], Path]) -> None:
    bundle = Bundle.open(built("int8hu"))
    one = of_bundle(bundle, BACKEND)
    main = one.program.functions["main"]
    shorter = evolve(main, name="prefill", operations=main.operations[:-2])

    def with_prefill(prefill: Function) -> Structure:
        program = evolve(one.program, functions={"main": main, "prefill": prefill})
        signatures = dict.fromkeys(program.functions, bundle.signature)
        return evolve(one, program=program, graphs=count(program), signatures=signatures)

    two, other = with_prefill(evolve(main, name="prefill")), with_prefill(shorter)
    assert two.graphs["prefill"] == two.graphs["main"] == one.graphs["main"]
    found = {
        name: {section.name: section.changes for section in compare(*sides, None, numerics_missing("no")).sections}
        for name, sides in {"same": (two, two), "shorter": (two, other), "added": (one, two)}.items()
    }
    of_both = {f"{what} of {name}" for what in ("signature", "operations") for name in ("main", "prefill")}
    assert of_both < found["same"].keys() and not any(found["same"].values())
    assert found["shorter"]["operations of main"] == ()
    assert "outside of the layers: operations" in {change.what for change in found["shorter"]["operations of prefill"]}
    assert found["added"]["operations of main"] == found["added"]["signature of main"] == ()
    assert {change.before for change in found["added"]["signature of prefill"]} == {None}


def test_layers_that_were_not_lowered_are_counted_like_the_last_of_their_kind() -> None:
    kinds = LayerKind("l", (0,), {"mul": 1}), LayerKind("l", (1,), {"mul": 2}), LayerKind("f", (2,), {"mul": 3})
    graph = Graph(kinds, {"cos": 1}, {}).repeated(["l", "l", "f", "l", "l", "f"])
    assert [(kind.name, kind.layers) for kind in graph.kinds] == [("l", (0,)), ("l", (1, 3, 4)), ("f", (2, 5))]
    assert graph.total == {"mul": 1 + 3 * 2 + 2 * 3, "cos": 1}


def test_a_layer_that_is_cut_stays_the_last_one() -> None:
    kinds = LayerKind("l", (0,), {"mul": 1}), LayerKind("f", (1,), {"mul": 3}), LayerKind("f", (2,), {"add": 1})
    names = ["l", "f", "f", "l", "f"]
    whole, cut = (Graph(kinds, {}, {}, cut=cut).repeated(names) for cut in (False, True))
    assert [(kind.layers, dict(kind.operations)) for kind in cut.kinds] == [
        ((0, 3), {"mul": 1}),
        ((1, 2), {"mul": 3}),
        ((4,), {"add": 1}),
    ]
    assert [kind.layers for kind in whole.kinds] == [(0, 3), (1,), (2, 4)]
    shallow = Graph(kinds, {}, {}, cut=True).repeated(names[:3])
    assert [kind.layers for kind in shallow.kinds] == [(0,), (1,), (2,)]


@pytest.mark.parametrize(
    ("kinds", "depth"), [("llfllfllf", 6), ("llfllfllfl", 7), ("llfllfllfll", 7), ("lllf", 4), ("ll", 2), ("l", 1)]
)
def test_the_first_layers_show_each_kind_twice_and_end_as_all_do(kinds: str, depth: int) -> None:
    assert telling_depth(kinds) == depth


def test_a_layer_is_called_the_same_in_a_function_that_reads_less_of_it() -> None:
    row = "tensor<4xfloat16>"

    def function(name: str, *read: str, outputs: int = 1) -> Function:
        operations: list[Operation] = []
        for at, weight in enumerate(read):
            operations += [
                Operation("constant", (), (10 * at + 10,), (row,), stored=weight),
                Operation("mul", (10 * at + 1, 10 * at + 10), (10 * at + 11,), (row,)),
            ]
        return Function(name, (), tuple(operations), ("x",), outputs=outputs)

    layers = [[f"layers.{at}.{part}.weight" for part in parts] for at, parts in enumerate((("a", "mlp"), ("b", "mlp")))]
    main = function("main", *layers[0], *layers[1])
    prefill = function("prefill", *layers[0], layers[1][0], outputs=0)  # the last layer is not computed to its end
    graphs = count(Program({"main": main, "prefill": prefill}, {}))
    assert {name: [kind.name for kind in graph.layers] for name, graph in graphs.items()} == {
        "main": ["a", "b"],
        "prefill": ["a", "b"],
    }
    assert (graphs["main"].cut, graphs["prefill"].cut) == (False, True)


# ---------------------------------------------------------------------------------------------------------------------
# Things that cannot be compared
# ---------------------------------------------------------------------------------------------------------------------


def refused(*arguments: object) -> str:
    result = zoo("diff", *arguments)
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_a_bundle_and_an_entry_cannot_be_compared(
    built: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where no bundle of that entry is, as `make demo` leaves one
    assert "is a bundle and qwen3.6-27b is none" in refused(built("int8hu"), "qwen3.6-27b")
    assert "is a bundle and qwen3.6-27b is none" in refused("qwen3.6-27b", built("int8hu"))


@pytest.mark.parametrize("what", ["overlay", "backend"])
def test_bundles_that_have_nothing_in_common_cannot_be_compared(
    what: str, built: Callable[[str], Path], copy: Path
) -> None:
    build = json.loads((copy / "build.json").read_text())
    if what == "overlay":
        build["overlay"]["name"] = "another"
        expected = "different overlays, qwen3_5 and another"
    else:
        build["backend"] = "another"
        expected = "was written by the backend 'another', which is not installed"
    (copy / "build.json").write_text(json.dumps(build))
    assert expected in refused(built("int8hu"), copy)


def test_arguments_that_make_no_sense_are_explained(built: Callable[[str], Path], tmp_path: Path) -> None:
    assert "Give two things to compare, or one entry and --rev REV" in refused("qwen3.6-27b")
    assert "Give two things to compare, or one entry" in refused("qwen3.6-27b", "qwen3.6-35b-a3b", "--rev", "HEAD")
    assert "int8hu is a recipe" in refused("int8hu", "fp16")
    assert "There is no recipe 'int9'" in refused("qwen3.6-27b:int9", "qwen3.6-27b")
    assert "neither a bundle's folder nor an entry" in refused(tmp_path / "nothing", "qwen3.6-27b")
    assert "neither a bundle's folder nor an entry" in refused(built("int8hu"), "--rev", "HEAD")
    assert "is not a bundle of this zoo" in refused(tmp_path, built("int8hu"))
    assert "--checkpoint is for two bundles" in refused("qwen3.6-27b", ":fp16", "--checkpoint", tmp_path)
    assert "--contract is for entries" in refused(built("int8hu"), built("int8hu"), "--contract", "chunked")
    assert "exclude each other" in refused("qwen3.6-27b", ":fp16", "--json", "--markdown")


# ---------------------------------------------------------------------------------------------------------------------
# Revisions
# ---------------------------------------------------------------------------------------------------------------------


def git(*arguments: str, cwd: Path) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@example.org")
    return subprocess.run(["git", *identity, *arguments], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with two commits, in which the test runs."""
    folder = tmp_path / "repository"
    folder.mkdir()
    git("init", "--quiet", cwd=folder)
    for text in ("before", "after"):
        (folder / "file").write_text(text)
        git("add", ".", cwd=folder)
        git("commit", "--quiet", "-m", text, cwd=folder)
    (folder / "file").write_text("not committed")
    monkeypatch.chdir(folder)
    return folder


def test_a_worktree_has_the_code_of_its_revision_and_is_gone_afterwards(repository: Path) -> None:
    with worktree("HEAD~1") as before, worktree("HEAD") as after, worktree(None) as now:
        assert [(tree / "file").read_text() for tree in (before, after, now)] == ["before", "after", "not committed"]
    assert not before.exists()
    assert len(git("worktree", "list", cwd=repository).splitlines()) == 1
    assert (repository / "file").read_text() == "not committed"


def test_an_interruption_removes_the_worktree(repository: Path) -> None:
    trees = []

    def interrupted() -> None:
        with worktree("HEAD") as tree:
            trees.append(tree)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not trees[0].exists()
    assert len(git("worktree", "list", cwd=repository).splitlines()) == 1


def test_revisions_that_are_none_are_explained(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has no revision 'nowhere'" in refused("qwen3.6-27b", "--rev", "nowhere")
    assert "has no revision 'HAED'. Did you mean HEAD?" in refused("qwen3.6-27b", "--rev", "HAED")
    assert "has no revision '--all'" in refused("qwen3.6-27b", "--rev=--all")
    monkeypatch.chdir(tmp_path)
    assert "is not in a git repository" in refused("qwen3.6-27b", "--rev", "HEAD")


def test_code_from_elsewhere_does_not_pass_for_that_of_a_revision(repository: Path, tmp_path: Path) -> None:
    with (
        worktree("HEAD") as tree,
        pytest.raises(BadInput, match=r"At HEAD the repository has none of the packages .*: coreai_zoo, "),
    ):
        build_sample("qwen3.6-27b", None, tree, tmp_path / "out", "HEAD", default_plugins())
    assert not (tmp_path / "out").exists()


PLUGIN = """
from pathlib import Path
from coreai_zoo import hookimpl

@hookimpl
def zoo_entries():
    return [Path(__file__).with_name("acme.toml")]
"""


def test_in_the_repository_of_a_plugin_its_code_is_that_of_the_revision(
    root: Path, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = repository / "src" / "acme_diffed"
    information = repository / "src" / "acme_diffed.egg-info"  # as an editable installation leaves it
    for folder in (package, information):
        folder.mkdir(parents=True)
    (information / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: acme-diffed\nVersion: 1\n")
    (information / "entry_points.txt").write_text("[coreai_zoo]\nacme = acme_diffed\n")
    (package / "__init__.py").write_text(PLUGIN)
    entry = (root / "zoo_entries" / "qwen3.6-27b.toml").read_text().replace('name = "qwen3.6-27b"', 'name = "acme"')
    (package / "acme.toml").write_text(entry.replace('path = "', 'path = "nowhere/'))
    for copy in ("attic", "build/lib"):  # what people keep, and pip leaves
        shutil.copytree(package, repository / copy / package.name)
    git("add", ".", cwd=repository)
    git("commit", "--quiet", "-m", "a sample that is not there", cwd=repository)
    (package / "acme.toml").write_text(entry)
    monkeypatch.syspath_prepend(str(repository / "src"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(repository / "src"), os.environ.get("PYTHONPATH", "")]))
    plugins = Plugins.discover()
    assert "acme_diffed" in plugins.packages()

    # The entry's sample is there in the working tree only.
    with worktree("HEAD") as tree, pytest.raises(BadInput, match=r"at HEAD does not build .*nowhere"):
        build_sample("acme", None, tree, tmp_path / "out", "HEAD", plugins)
    # Of a revision without the package, that of the working tree must not pass for its code.
    nothing = r"At HEAD~1 the repository has no package acme_diffed\. It was not there yet"
    with worktree("HEAD~1") as tree, pytest.raises(BadInput, match=nothing):
        build_sample("acme", None, tree, tmp_path / "out", "HEAD~1", plugins)
    assert not (tmp_path / "out").exists()


def test_a_change_of_an_entry_s_file_is_one_of_metadata(
    root: Path,
    repository: Path,
    built: Callable[[str], Path],
    make_plugin: Callable[..., types.ModuleType],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where the sample that is built does not show it."""
    text = (root / "zoo_entries" / "qwen3.6-27b.toml").read_text().replace('name = "qwen3.6-27b"', 'name = "acme"')
    path = repository / "acme.toml"
    path.write_text(text)
    git("add", ".", cwd=repository)
    git("commit", "--quiet", "-m", "an entry", cwd=repository)
    path.write_text(text.replace("max_context = 32768", "max_context = 16384"))
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_entries=lambda: [path]), "another")
    monkeypatch.setattr(comparison, "build_sample", lambda *_, **__: built("int8hu"))

    comparer = comparison.Comparer(plugins, Reporter(silent=True), None, 6, numerics=False)
    changed = comparer.compare_revisions("acme", ["HEAD"])
    (section,) = (section for section in changed.difference.sections if section.name == "entry")
    assert [(change.what, change.before, change.after) for change in section.changes] == [
        ("bundle.max_context", "32,768", "16,384")
    ]
    assert changed.verdict.kind == "metadata"
    same = comparer.compare_revisions("acme", ["HEAD", "HEAD"])
    assert same.verdict.kind == "none"
    earlier = comparer.compare_revisions("acme", ["HEAD~1"])
    assert all(section.name != "entry" for section in earlier.difference.sections), "it has no such file"


def test_a_package_that_a_revision_has_twice_is_refused_unless_this_process_has_one_of_them(repository: Path) -> None:
    for folder in ("one", "two/é"):
        (repository / folder / "coreai_zoo_qwen36").mkdir(parents=True)
        (repository / folder / "coreai_zoo_qwen36" / "__init__.py").touch()
    git("add", ".", cwd=repository)
    git("commit", "--quiet", "-m", "twice", cwd=repository)
    said = r"has coreai_zoo_qwen36 2 times: one/coreai_zoo_qwen36/__init__\.py, two/é/coreai_zoo_qwen36/__init__\.py"
    with worktree("HEAD") as tree, pytest.raises(BadInput, match=said):
        build_sample("qwen3.6-27b", None, tree, repository / "out", "HEAD", default_plugins())


def test_a_hook_s_index_is_left_alone(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git("add", "file", cwd=repository)
    staged = git("ls-files", "-s", cwd=repository)
    monkeypatch.setenv("GIT_DIR", str(repository / ".git"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(repository / ".git" / "index"))
    with worktree("HEAD~1") as tree:
        assert (tree / "file").read_text() == "before"
    assert git("ls-files", "-s", cwd=repository) == staged


def test_code_that_is_found_elsewhere_than_in_the_tree_is_not_run(tmp_path: Path) -> None:
    own = {"json": str(tmp_path / "json" / "__init__.py")}
    command = [sys.executable, "-c", revision._BUILD, json.dumps(own), "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and re.match(r"error: json is found at .*, not at .*json/__init__\.py", done.stderr)


def test_a_revision_that_does_not_build_is_reported_with_its_reason(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    ignored = shutil.ignore_patterns(".git", ".venv", "*.safetensors", "__pycache__", "exports")
    for name in ("coreai_zoo", "coreai_zoo_qwen36", "overlays", "zoo_entries"):
        shutil.copytree(root / name, clone / name, symlinks=True, ignore=ignored)
    git("init", "--quiet", cwd=clone)
    git("add", ".", cwd=clone)
    git("commit", "--quiet", "-m", "all", cwd=clone)
    monkeypatch.chdir(clone)
    monkeypatch.syspath_prepend(str(clone / "overlays"))
    monkeypatch.syspath_prepend(str(clone))
    # The weights of the sample were left out: the code there starts, and says so itself.
    with worktree("HEAD") as tree, pytest.raises(BadInput, match=r"does not build the sample .*safetensors"):
        build_sample("qwen3.6-27b", "fp16", tree, tmp_path / "out", "HEAD", default_plugins())
