"""Golden graphs see small mistakes that no operation count shows, and nothing that makes no difference."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest
from attrs import evolve, frozen
from click.testing import CliRunner, Result

import forked
from coreai_zoo.catalogue import find_entry
from coreai_zoo.cli.app import cli
from coreai_zoo.lowering.graph import count
from coreai_zoo.lowering.wiring import wire
from coreai_zoo.plugins import Plugins
from coreai_zoo.program import Function, Operation, Program
from coreai_zoo.review.goldens import compare, counts_of, golden, golden_path, of_recipe, read, take, write
from coreai_zoo.review.structure import graphs
from mutants import Edit, Mutant, applied
from shared import Shared
from suite import NIGHTLY

RECIPE = "int8hu"
ENTRY = """\
name = "tiny-moe"
title = "Tiny"
summary = "Few and small layers of every kind."
model_type = ["qwen3_5_moe"]
hf_id = "tiny/tiny"

[facts]
ffn = "moe"
layers = 2
hidden_size = 64
vocab_size = 320
max_context_length = 512
linear_attention_layers = 1
full_attention_layers = 1
experts = 4
experts_per_token = 2
expert_intermediate_size = 32
shared_expert_intermediate_size = 96
attention_heads = 4
kv_heads = 2
head_dim = 32
rotary_dim = 8
gdn_key_heads = 2
gdn_value_heads = 4
gdn_key_head_dim = 32
gdn_value_head_dim = 32
conv_kernel = 4
tied_head = false

[bundle]
max_context = 64
"""


class OneEntry(Plugins):
    """What is installed, with one entry, which is small."""

    file: Path

    def entries(self) -> list[tuple[str, Path]]:
        return [("tiny", self.file)]


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> Plugins:
    found = OneEntry.discover()
    assert isinstance(found, OneEntry)
    found.file = tmp_path_factory.mktemp("entry") / "tiny.toml"
    found.file.write_text(ENTRY)
    return found


@pytest.fixture(scope="module")
def goldens(plugins: Plugins, shared: Shared) -> Path:
    """A folder with the golden graph of the overlay as it is."""
    entry, _ = find_entry("tiny-moe", plugins)
    return shared.folder("tiny-moe-goldens", lambda folder: write(take(entry, plugins), golden_path(folder, entry)))


def checked(plugins: Plugins, folder: Path) -> Result:
    return CliRunner().invoke(cli, ["check", "--only", "goldens", "--goldens", str(folder), "--json"], obj=plugins)


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes
# ---------------------------------------------------------------------------------------------------------------------

_ATTENTION, _GDN, _RULE = (
    "attention.Attention",
    "gated_delta_net.GatedDeltaNet",
    "gated_delta_net.recurrent_gated_delta_rule",
)


@frozen
class Mistake:
    """A small one.

    Attributes:
        edit: of the overlay's source.
        told: what `zoo check` says of it.
        counted: the part of the decoder in which an operation count changes as well, if one does.
    """

    edit: Edit
    told: str
    counted: str = ""


MISTAKES = {
    "eps of the norm of keys": Mistake(
        Edit(
            f"{_ATTENTION}.__init__",
            "self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)",
            "self.k_norm = RMSNorm(self.head_dim, 1e-5)",
        ),
        "self_attn: rms_norm{axes = -1, eps = 9.99999974E-6, version = 1}(reshape(batch_matmul<self_attn.k_proj.weight>"
        "), <self_attn.k_norm.weight>) -> 1x1x2x32xfloat16 instead of rms_norm{axes = -1, eps = 9.99999997E-7,",
    ),
    "eps of the l2 norm": Mistake(
        Edit("gated_delta_net.l2_norm", "+ _L2_EPS", "+ 1e-5"),
        "linear_attn: add(reduce_sum, 9.99999974E-6 float32) -> 1x2x1xfloat32 instead of "
        "add(reduce_sum, 9.99999997E-7 float32) -> 1x2x1xfloat32",
    ),
    "axis of a sum": Mistake(
        Edit("gated_delta_net.l2_norm", "x.square().sum(-1, keepdim=True)", "x.square().sum(1, keepdim=True)"),
        "linear_attn: reduce_sum(pow, 1) -> 1x1x32xfloat32 instead of reduce_sum(pow, 2) -> 1x2x1xfloat32",
    ),
    "axis of a concatenation": Mistake(
        Edit(
            "attention.RotaryEmbedding.forward",
            "torch.cat((angles, angles), dim=-1)",
            "torch.cat((angles, angles), dim=0).reshape(1, -1)",
        ),
        "outside: concat(0, reshape(mul), reshape(mul)) -> 2x4xfloat32 instead of "
        "concat(1, reshape(mul), reshape(mul)) -> 1x8xfloat32",
        counted="outside",
    ),
    "axis of the router's softmax": Mistake(
        Edit(
            "feed_forward.SparseMoE.forward",
            "torch.softmax(self.gate(x).float(), dim=-1)",
            "torch.softmax(self.gate(x).float(), dim=1)",
        ),
        "softmax(cast(batch_matmul<mlp.gate.weight>), 1) -> 1x1x4xfloat32 instead of "
        "softmax(cast(batch_matmul<mlp.gate.weight>), 2) -> 1x1x4xfloat32",
    ),
    "swapped operands": Mistake(
        Edit(_RULE, "(value.float() - recalled)", "(recalled - value.float())"),
        "linear_attn: sub(reshape(reduce_sum), cast(reshape(split(silu)#2))) -> 1x4x32xfloat32 instead of "
        "sub(cast(reshape(split(silu)#2)), reshape(reduce_sum)) -> 1x4x32xfloat32",
    ),
    "swapped weights of one shape": Mistake(
        Edit(
            "feed_forward.MLP.forward",
            "F.silu(self.gate_proj(x)) * self.up_proj(x)",
            "F.silu(self.up_proj(x)) * self.gate_proj(x)",
        ),
        "silu(batch_matmul<mlp.shared_expert.up_proj.weight>) -> 1x1x96xfloat16 instead of "
        "silu(batch_matmul<mlp.shared_expert.gate_proj.weight>) -> 1x1x96xfloat16",
    ),
    "a wrong scale": Mistake(
        Edit(_RULE, "query.shape[-1] ** -0.5", "query.shape[-1] ** -1.0"),
        "linear_attn: mul(reshape(broadcast_in_dims(reshape(mul))), 3.125000e-02 float32) -> 1x4x32xfloat32 instead of "
        "mul(reshape(broadcast_in_dims(reshape(mul))), 0.176776692 float32) -> 1x4x32xfloat32",
    ),
    "the scale of attention": Mistake(
        Edit(f"{_ATTENTION}.__init__", "scale=self.head_dim**-0.5", "scale=1.0"),
        "self_attn: scaled_dot_product_attention{is_causal = true, scale = 1.000000e+00, version = 1, window_size = 0}("
        "concat, slice, slice) -> 1x4x1x32xfloat16 instead of scaled_dot_product_attention{is_causal = true, scale = "
        "0.176776692,",
    ),
    "a wrong bound of a slice": Mistake(
        Edit("gated_delta_net.CausalConv1dStep.forward", "window[..., 1:]", "window[..., :-1]"),
        "linear_attn: slice(concat, 0, [end, end, -1], 1) -> 1x256x3xfloat16 instead of "
        "slice(concat, [0, 0, 1], end, 1) -> 1x256x3xfloat16",
    ),
    "a sigmoid for silu": Mistake(
        Edit(f"{_GDN}.forward", "F.silu(z)", "z.sigmoid()"),
        "linear_attn: sigmoid(reshape(batch_matmul<linear_attn.in_proj_z.weight>)) -> 1x1x4x32xfloat16 is new",
        counted="linear_attn",
    ),
    "a cast too late": Mistake(
        Edit(f"{_GDN}.forward", "self.in_proj_b(x).float().sigmoid()", "self.in_proj_b(x).sigmoid().float()"),
        "linear_attn: sigmoid(batch_matmul<linear_attn.in_proj_b.weight>) -> 1x1x4xfloat16 instead of "
        "sigmoid(cast(batch_matmul<linear_attn.in_proj_b.weight>)) -> 1x1x4xfloat32",
    ),
    "a missing cast": Mistake(
        Edit(_RULE, "(value.float() - recalled)", "(value - recalled.to(value.dtype))"),
        "linear_attn: sub(reshape(split(silu)#2), cast(reshape(reduce_sum))) -> 1x4x32xfloat16 instead of",
        counted="linear_attn",
    ),
    "the next position": Mistake(
        Edit("attention.RotaryEmbedding.forward", "positions.float()", "(positions.float() + 1)"),
        "outside: mul(add, [1.0, 0.01778279",
        counted="outside",
    ),
    "a transposed reshape": Mistake(
        Edit(
            f"{_ATTENTION}.forward",
            "value = self.v_proj(x).unflatten(-1, (-1, self.head_dim))",
            "value = self.v_proj(x).unflatten(-1, (self.head_dim, -1)).transpose(-1, -2)",
        ),
        "self_attn: reshape(batch_matmul<self_attn.v_proj.weight>, [1, 1, 32, 2]) -> 1x1x32x2xfloat16 instead of "
        "reshape(batch_matmul<self_attn.v_proj.weight>, [1, 2, 1, 32]) -> 1x2x1x32xfloat16",
        counted="self_attn",
    ),
    "a dropped scale": Mistake(
        Edit(_RULE, "query * query.shape[-1] ** -0.5", "query"),
        "instead of mul(reshape(broadcast_in_dims(reshape(mul))), 0.176776692 float32) -> 1x4x32xfloat32",
        counted="linear_attn",
    ),
    "the base of RoPE": Mistake(
        Edit("attention.RotaryEmbedding.__init__", "config.rope_theta**", "1_000_000.0**"),
        "outside: mul(cast(slice), [1.0, 0.0316",
    ),
}


# Those that stand in one line are in places of the graph that do not touch, so that one trace shows them all.
TOGETHER = (
    ("eps of the norm of keys", "eps of the l2 norm", "swapped weights of one shape", "the base of RoPE"),
    ("axis of a sum", "axis of the router's softmax", "the scale of attention", "a wrong scale"),
    ("swapped operands", "a wrong bound of a slice", "a cast too late"),
    ("axis of a concatenation", "a sigmoid for silu", "a transposed reshape"),
    ("the next position", "a missing cast"),
    ("a dropped scale",),
)


def test_every_mistake_is_made_where_its_counts_can_be_told_from_those_of_others() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(MISTAKES)
    for names in TOGETHER:
        counted = [MISTAKES[name].counted for name in names]
        assert counted.count("") == len(names) or len({*counted} - {""}) == len(names), names


# Some that no count shows are tried every time, and a scale that is dropped by night: by day scales are wrong.
_CASES = [
    pytest.param(names, marks=pytest.mark.slow if number else (), id=", ".join(names))
    for number, names in enumerate(TOGETHER if NIGHTLY else TOGETHER[:-1])
]


@pytest.mark.parametrize("names", _CASES)
def test_the_golden_graphs_catch(names: tuple[str, ...], plugins: Plugins, goldens: Path) -> None:
    made = [MISTAKES[name] for name in names]
    entry, _ = find_entry("tiny-moe", plugins)
    with applied(Mutant("several", ", ".join(names), edits=tuple(mistake.edit for mistake in made))):
        found = golden(entry, dict(graphs(entry, plugins, [RECIPE])))
    before = of_recipe(read(golden_path(goldens, entry)), RECIPE)
    problems = compare(before, found)
    for mistake in made:
        assert any(mistake.told in problem for problem in problems), "\n".join(problems)
    counted = {problem.partition(":")[0] for problem in compare(counts_of(before), counts_of(found))}
    assert counted - {"all"} == {mistake.counted for mistake in made} - {""}


def test_the_check_fails_and_names_the_operation(plugins: Plugins, goldens: Path) -> None:
    passed = checked(plugins, goldens)
    assert passed.exit_code == 0, passed.output
    mistake = MISTAKES["eps of the norm of keys"]
    with applied(Mutant("one", "eps", edits=(mistake.edit,))):
        failed = checked(plugins, goldens)
    assert failed.exit_code == 1
    (outcome,) = json.loads(failed.stdout)["checks"]
    assert mistake.told in outcome["detail"]


# ---------------------------------------------------------------------------------------------------------------------
# What makes no difference
# ---------------------------------------------------------------------------------------------------------------------


def test_recipes_and_names_of_weights_make_no_difference(goldens: Path, plugins: Plugins) -> None:
    entry, _ = find_entry("tiny-moe", plugins)
    made = read(golden_path(goldens, entry))
    assert all(
        isinstance(digest, str) for name, digest in made["digests"].items() if name.startswith(("outside", "comp"))
    )
    by_recipe = made["digests"]["linear_attn"]  # plain experts are laid out once, quantized ones by an operation
    assert len({by_recipe[recipe] for recipe in ("int8lin", "int8hu", "int4lin")}) == 1
    renamed = json.loads(json.dumps(made).replace("mlp.gate.weight", "mlp.router.weight"))
    assert renamed != made and compare(made, renamed) == []


_PRINT = """
import sys
sys.path.insert(0, sys.argv[1])
import test_wiring
from coreai_zoo.catalogue import find_entry
plugins = test_wiring.OneEntry.discover()
plugins.file = test_wiring.Path(sys.argv[2])
entry, _ = find_entry("tiny-moe", plugins)
print(test_wiring.golden(entry, dict(test_wiring.graphs(entry, plugins, [test_wiring.RECIPE]))))
"""


@pytest.mark.slow
def test_another_process_gives_the_same_digests(plugins: Plugins, goldens: Path) -> None:
    assert isinstance(plugins, OneEntry)
    entry, _ = find_entry("tiny-moe", plugins)
    # The seed of hashes there is fixed, and here it is random.
    done = forked.run(Path(__file__).parent, plugins.file, _PRINT, call="forked:execute")
    assert done.returncode == 0, done.stderr
    printed = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert printed["digests"] and printed == of_recipe(read(golden_path(goldens, entry)), RECIPE)


# ---------------------------------------------------------------------------------------------------------------------
# Small programs, written by hand
# ---------------------------------------------------------------------------------------------------------------------

ROW, STATE = "tensor<1x4xfloat16>", "tensor<3x4xfloat16>"


def constant(number: int, value: str, type_: str) -> Operation:
    return Operation("constant", (), (number,), (type_,), (f"value = dense<{value}> : {type_}",))


def weight(number: int, name: str) -> Operation:
    return Operation("constant", (), (number,), (ROW,), (f"value = {name}",), stored=name)


def layered(
    begins: tuple[str, str, str] = ("0", "[1, 0]", "[2, 0]"), *, scale: str = "2.0", first: int = 100
) -> Program:
    """Three layers, each of which multiplies by its weight what is below and adds its slot of a state."""
    operations = [
        Operation("read_handle", (1,), (first, first + 1), (STATE, "!token"), on_state=True),
        weight(first + 2, "embed.weight"),
        Operation("gather_nd", (first + 2, 0), (first + 3,), (ROW,)),
    ]
    below, value = first + 3, first + 4
    for layer, begin in enumerate(begins):
        w, b, e, s, c, slot, product, half = range(value, value + 8)
        operations += [
            weight(w, f"layers.{layer}.mixer.weight"),
            constant(b, begin, "tensor<2xint32>"),
            constant(e, f"[{layer + 1}, 2147483647]", "tensor<2xint32>"),
            constant(s, "1", "tensor<2xint32>"),
            constant(c, scale, "tensor<float16>"),
            Operation("slice", (first, b, e, s), (slot,), (ROW,)),
            Operation("mul", (below, w), (product,), (ROW,)),
            Operation("mul", (product, c), (half,), (ROW,)),
            Operation("add", (half, slot), (half + 1,), (ROW,)),
        ]
        below, value = half + 1, half + 2
    return Program({"main": Function("main", (), tuple(operations), ("ids", "memory"))}, {})


def test_layers_that_differ_in_their_slot_only_have_one_digest_however_values_are_numbered() -> None:
    (kind,) = count(layered())["main"].kinds
    assert kind.layers == (0, 1, 2)
    assert "slice(state memory, [slot, 0], [slot + 1, end], 1) -> 1x4xfloat16" in kind.wiring.lines
    assert count(layered(first=40))["main"] == count(layered())["main"]


def test_how_constants_are_numbered_does_not_tell_layers_apart() -> None:
    """A shape that is computed outside, of the type of a slot's beginning: after that of one layer, before the next."""

    def apart(values: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(value if value < 2 else 10 * value for value in values)  # arguments are numbered first

    (main,) = layered().functions.values()
    operations = [evolve(each, operands=apart(each.operands), results=apart(each.results)) for each in main.operations]
    shape, shaped = 1055, 5000  # the beginnings are 1050, 1140 and 1230
    computed = Operation("concat", (0,), (shape,), ("tensor<2xint32>",))
    with_shapes = [*operations[:3], computed]
    for at, operation in enumerate(operations[3:]):
        if operation.name == "add":
            with_shapes.append(Operation("reshape", (operation.operands[0], shape), (shaped + at,), (ROW,)))
            operation = evolve(operation, operands=(shaped + at, operation.operands[1]))  # noqa: PLW2901
        with_shapes.append(operation)
    found = count(Program({"main": evolve(main, operations=tuple(with_shapes))}, {}))["main"]
    assert [kind.layers for kind in found.kinds] == [(0, 1, 2)]
    assert found.kinds[0].operations["reshape"] == 1


def test_the_slot_of_another_layer_is_another_wiring() -> None:
    kinds = count(layered(("0", "0", "[2, 0]")))["main"].kinds
    assert [kind.layers for kind in kinds] == [(0, 2), (1,)]
    assert "slice(state memory, 0, [slot + 1, end], 1) -> 1x4xfloat16" in kinds[1].wiring.lines


def test_what_is_equal_line_by_line_and_wired_otherwise_has_another_digest() -> None:
    """Two products whose results are exchanged two operations later."""

    def crossed(first: int, second: int) -> Function:
        products = [Operation("mul", (0, 0), (3,), (ROW,)), Operation("mul", (0, 1), (4,), (ROW,))]
        exponents = [Operation("exp", (3,), (5,), (ROW,)), Operation("exp", (4,), (6,), (ROW,))]
        return Function("f", (), (*products, *exponents, Operation("sub", (first, second), (7,), (ROW,))), ("a", "b"))

    one, other = (wire(f, [-1] * 5, Program({"f": f}, {}))[-1] for f in (crossed(5, 6), crossed(6, 5)))
    assert one.lines == other.lines
    assert one.digest != other.digest


def test_functions_have_tables_of_their_own_where_there_are_several(plugins: Plugins) -> None:
    entry, _ = find_entry("tiny-moe", plugins)
    whole, scaled = (count(layered(scale=scale))["main"] for scale in ("2.0", "4.0"))
    one = golden(entry, {"fp16": {"main": whole}})
    two = golden(entry, {"fp16": {"main": whole, "prefill": whole}})
    assert [*one] == [
        "entry",
        "ffn",
        "layer",
        "outside",
        "all",
        "digests",
        "lines of layer",
        "lines of outside",
    ]
    assert {name.removeprefix("prefill: ") for name in two if name.startswith("prefill: ")} == {*one} - {"entry", "ffn"}
    other = golden(entry, {"fp16": {"main": whole, "prefill": scaled}})
    assert compare(two, other) == [
        "prefill: layer: mul(mul<mixer.weight>, 4.0 float16) -> 1x4xfloat16 instead of "
        "mul(mul<mixer.weight>, 2.0 float16) -> 1x4xfloat16"
    ]
