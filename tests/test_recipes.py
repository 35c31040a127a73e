"""Recipes: which rule decides a weight, what a file says, and what a name stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from command import zoo
from coreai_zoo.catalogue import find_recipe
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import COMMON_ROLES, ParameterInfo, Role, WeightMap, WeightRule
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES, as_toml, content_of, read_recipe, read_recipes, recorded_recipe
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec, Recipe, Rule, layer_of, published_as
from coreai_zoo.weights.plan import WeightPlan, plan_without_checkpoint

INT8 = QuantizationSpec("int8", "symmetric_with_clipping", 32)
INT4 = QuantizationSpec("int4", "symmetric_with_clipping", 32)
WIDE = QuantizationSpec("int8", "symmetric", 64)

ROLES = {role.name: role for role in COMMON_ROLES}
NAMES = {
    "embed": "embedding",
    "norm": "norm",
    **{f"layers.{layer}.{part}": role for layer in range(6) for part, role in (("up", "mlp"), ("q", "attention"))},
    "head": "head",
}
PLAIN = Rule(None, "The rest.")


def planned(*rules: Rule, layers: int | None = None, names: dict[str, str] = NAMES) -> WeightPlan:
    """The plan of a model whose parameters are called as `names`, each with its role."""
    table = WeightMap(tuple(WeightRule(name, name, role) for name, role in names.items()))
    parameters = {name: ParameterInfo((4, 64), "float16") for name in names}
    return plan_without_checkpoint(table, parameters, Recipe("test", "A test.", rules), layers)


def stored(*rules: Rule, layers: int | None = None) -> dict[str, QuantizationSpec]:
    """How each weight that is quantized is, by its name."""
    tensors = planned(*rules, layers=layers).tensors
    return {tensor.name: tensor.quantization for tensor in tensors if tensor.quantization is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Which rule decides
# ---------------------------------------------------------------------------------------------------------------------


def test_the_first_rule_that_matches_decides() -> None:
    of_layer, of_role = Rule(INT4, "why", layers=(2, 2)), Rule(INT8, "why", ("mlp",))
    first = stored(of_layer, of_role, PLAIN)
    assert first["layers.2.up"] == first["layers.2.q"] == INT4
    second = stored(of_role, of_layer, PLAIN)
    assert second["layers.2.up"] == INT8 and second["layers.2.q"] == INT4
    assert set(first) == set(second) == {f"layers.{layer}.up" for layer in range(6)} | {"layers.2.q"}


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        ((0, 0), [0]),
        ((1, 3), [1, 2, 3]),
        ((-1, -1), [5]),
        ((-2, -1), [4, 5]),
        ((4, -1), [4, 5]),
        ((0, -6), [0]),
        ((5, 99), [5]),
    ],
)
def test_a_range_of_layers_holds_both_its_ends(layers: tuple[int, int], found: list[int]) -> None:
    assert set(stored(Rule(INT8, "why", ("mlp",), layers=layers), PLAIN)) == {f"layers.{at}.up" for at in found}


def test_a_range_counts_in_the_whole_model_where_a_slice_is_built() -> None:
    last = Rule(INT8, "why", ("mlp",), layers=(-1, -1))
    assert set(stored(last, PLAIN)) == {"layers.5.up"}
    assert stored(last, PLAIN, layers=8) == {}, "layer 7 is not built"
    assert set(stored(Rule(INT8, "why", ("mlp",), layers=(-4, -1)), PLAIN, layers=8)) == {"layers.4.up", "layers.5.up"}


def test_what_is_outside_of_layers_is_in_no_range() -> None:
    assert set(stored(Rule(INT8, "why", layers=(0, 99)), PLAIN)) == {name for name in NAMES if "layers" in name}
    assert [layer_of(name) for name in ("embed", "layers.3.up", "a.b.12.c.4", "conv1d.x", "l2.w")] == [
        None, 3, 12, None, None,
    ]  # fmt: skip


def test_patterns_match_whole_names_of_parameters() -> None:
    assert set(stored(Rule(INT8, "why", parameters=("layers.[01].*", "head")), PLAIN)) == {
        "layers.0.up", "layers.0.q", "layers.1.up", "layers.1.q", "head",
    }  # fmt: skip
    assert set(stored(Rule(INT8, "why", ("mlp",), ("*.q", "*.1.*")), PLAIN)) == {"layers.1.up"}, "all conditions hold"


def test_a_rule_names_roles_or_their_kinds() -> None:
    assert set(stored(Rule(INT8, "why", ("body",)), PLAIN)) == {name for name in NAMES if "layers" in name}
    assert set(stored(Rule(INT8, "why", ("head", "attention")), PLAIN)) == {
        "head", *(name for name in NAMES if name.endswith(".q")),
    }  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------------


def test_all_that_does_not_fit_is_one_error() -> None:
    rules = (
        Rule(INT8, "why", ("mlp",)),
        Rule(INT4, "why", ("mlp",), layers=(1, 2)),  # decides nothing: the one before does
        Rule(INT8, "why", parameters=("*.gate",)),
        Rule(evolve(INT8, block_size=48), "why", ("attention",)),
        Rule(evolve(INT8, block_size=None), "why", ("head",)),
        Rule(None, "why", ("embedding",)),
    )
    with pytest.raises(BadInput) as caught:
        planned(*rules)
    assert caught.value.message == (
        "The recipe does not fit the model (10 problems). not divisible by the recipe's block: 6 x layers.*.q "
        "(attention, int8 block 48 symmetric_with_clipping: 64 columns are not divisible by the block size 48); a head "
        "with one scale per row, which gives garbage on the GPU delegate: head (int8 per channel "
        "symmetric_with_clipping); decided by no rule of the recipe: norm (norm); rules that decide no weight: rule 2 "
        "(role mlp, layers 1 to 2 of 6), rule 3 (parameter *.gate)."
    )


def test_a_kind_of_weights_that_a_model_lacks_is_no_mistake() -> None:
    names = {name: role for name, role in NAMES.items() if role != "head"}
    everything = [Rule(None, "why", (kind,)) for kind in ("head", "body", "embedding", "other")]
    assert planned(*everything, names=names).stored_bytes == planned(PLAIN, names=names).stored_bytes


def test_of_a_slice_a_rule_may_be_for_what_is_left_out() -> None:
    rule = Rule(INT8, "why", layers=(6, 7))
    with pytest.raises(BadInput, match=r"rules that decide no weight: rule 1 \(layers 6 to 7 of 6\)"):
        planned(rule, PLAIN)
    assert stored(rule, PLAIN, layers=8) == {}
    with pytest.raises(
        BadInput, match=r"rule 1 names mpl, no role of this model"
    ):  # a role is in any slice, or in none
        planned(Rule(INT8, "why", ("mpl",)), PLAIN, layers=8)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

MINE = """\
description = "Of my own."
quality = "Not measured."

[[rule]]
role = ["mlp", "attention"]
layers = [0, -2]
dtype = "int4"
scheme = "symmetric"
block_size = 64
scales = "mse"
why = "They tolerate it."

[[rule]]
parameter = "*.up"
dtype = "uint4"
scheme = "asymmetric"
block_size = 32
why = "So that there is one."

[[rule]]
dtype = "fp16"
why = "The rest."
"""


def test_a_file_is_read_for_what_it_says_and_written_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(MINE, encoding="utf-8")
    found = read_recipe(path)
    assert found == Recipe(
        "mine",
        "Of my own.",
        (
            Rule(
                QuantizationSpec("int4", "symmetric", 64, "mse"), "They tolerate it.", ("mlp", "attention"), (), (0, -2)
            ),
            Rule(QuantizationSpec("uint4", "asymmetric", 32), "So that there is one.", (), ("*.up",)),
            Rule(None, "The rest."),
        ),
        "Not measured.",
    )
    assert as_toml(found) == MINE
    assert find_recipe(str(path), default_plugins()) == found


def test_what_a_rule_does_not_say_is_what_is_usual(tmp_path: Path) -> None:
    path = tmp_path / "short.toml"
    rules = "".join(f'[[rule]]\nrole = "{role}"\ndtype = "{dtype}"\nwhy = "w"\n' for role, dtype in (
        ("mlp", "int8"), ("attention", "uint4"), ("other", "fp16"),
    ))  # fmt: skip
    path.write_text(f'description = "d"\n{rules}', encoding="utf-8")
    assert [rule.spec for rule in read_recipe(path).rules] == [INT8, QuantizationSpec("uint4", "asymmetric", 32), None]


@pytest.mark.parametrize("name", RECIPES)
def test_a_shipped_recipe_is_shown_as_it_stands_in_its_file(name: str) -> None:
    import coreai_zoo

    text = (Path(coreai_zoo.__file__).parent / "shipped_recipes" / f"{name}.toml").read_text(encoding="utf-8")
    assert zoo("show-recipe", name).stdout == text == as_toml(RECIPES[name])


BAD = """\
description = ""

[[rule]]
rol = "mlp"
dtype = "int3"
why = "w"

[[rule]]
role = []
layers = [1, 2, 3]
dtype = "int8"
block_size = "row"
scales = 3
overlay_decides = "yes"
"""


def test_every_bad_key_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(BAD, encoding="utf-8")
    result = zoo("plan", "qwen3.6-27b", "--recipe", path)
    assert result.exit_code == 2
    for told in (
        "has 9 bad keys",
        "description: Length of 'description' must be >= 1: 0",
        "rule[0].rol: unknown key, nearest is role",
        "rule[0].dtype: 'int3' is not one of 'fp16', 'int4', 'int6', 'int8', 'uint4', 'uint8'",
        "rule[1].role: needs at least one name",
        "rule[1].layers: expected the first and the last layer, such as [0, 3], found a list",
        "rule[1].block_size: expected an integer or 'channel', found text ('row')",
        "rule[1].scales: 3 is not one of 'absmax', 'mse'",
        "rule[1].overlay_decides: expected a boolean, found text",
        "rule[1].why: missing",
    ):
        assert told in result.stderr, result.stderr


@pytest.mark.parametrize(
    ("rule", "told"),
    [
        ('dtype = "fp16"\nblock_size = 16\n', "rule[0]: fp16 is not quantized and has no block_size"),
        ('dtype = "uint8"\nscales = "mse"\n', "rule[0]: scales by mse are for signed integers"),
        ('dtype = "int8"\nblock_size = 1\n', "rule[0]: a block has at least 2 inputs, not 1"),
        ('dtype = "int8"\nlayers = [3, 1]\n', "rule[0]: layers [3, 1] end before they begin"),
        ('dtype = "int8"\nlayers = [-1, -3]\n', "rule[0]: layers [-1, -3] end before they begin"),
        ('dtype = "int8"\nrole = "mlp"\noverlay_decides = true\n', "rule[0]: the overlay decides about a head"),
    ],
)
def test_keys_that_contradict_each_other_are_told(tmp_path: Path, rule: str, told: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(f'description = "d"\n[[rule]]\n{rule}why = "w"\n', encoding="utf-8")
    with pytest.raises(BadInput) as caught:
        read_recipe(path)
    assert told in caught.value.message


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (None, "cannot be read: No such file"),
        ("description = ", "is not TOML"),
        ('description = "d"\n', "rule: missing"),
        ('description = "d"\nrule = []\n', "rule: Length of 'rule' must be >= 1: 0"),
        ('description = "d"\nrule = 3\n', "rule: expected a list of tables, found an integer"),
    ],
)
def test_a_file_that_is_none_is_refused(tmp_path: Path, text: str | None, told: str) -> None:
    path = tmp_path / "mine.toml"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    result = zoo("plan", "qwen3.6-27b", "--recipe", path)
    assert result.exit_code == 2 and told in result.stderr, result.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------------------------------

MIX = Recipe("mix", "A mix.", (Rule(INT4, "why", ("mlp",), (), (0, 3)), Rule(INT8, "why", ("body", "head")), PLAIN))


def test_a_published_name_follows_from_what_the_rules_do() -> None:
    name = MIX.published_name
    assert name.startswith("mix_int4_int8_")
    reworded = Recipe("other", "Other words.", tuple(evolve(rule, why="else") for rule in MIX.rules), "Good.")
    assert reworded.published_name == name
    changed = [
        evolve(MIX, rules=MIX.rules[::-1]),
        evolve(MIX, rules=MIX.rules[1:]),
        *(
            evolve(MIX, rules=(evolve(MIX.rules[0], **change), *MIX.rules[1:]))
            for change in (
                {"layers": (0, 4)},
                {"layers": None},
                {"roles": ("attention",)},
                {"parameters": ("*.up",)},
                {"spec": WIDE},
                {"spec": evolve(INT4, scheme="symmetric")},
                {"spec": evolve(INT4, scales="mse")},
                {"spec": None},
            )
        ),
    ]
    names = [recipe.published_name for recipe in changed]
    assert len({name, *names}) == 1 + len(names)


def test_rules_by_kind_have_a_name_that_tells_what_they_do() -> None:
    by_role = {"embedding": None, "head": None, "body": INT8, "other": None}
    assert Recipe.by_role("mine", "Mine.", by_role).published_name == RECIPES["int8lin"].published_name
    assert Recipe.by_role("mine", "Mine.", {**by_role, "norm": INT8}).published_name.startswith("mix_int8_")


def test_a_recipe_comes_back_from_its_record(tmp_path: Path) -> None:
    for recipe in (*RECIPES.values(), MIX):
        content = json.loads(json.dumps({"name": recipe.name, "roles": {}, **content_of(recipe)}))
        assert recorded_recipe(recipe.name, content, tmp_path / "build.json") == recipe
        assert published_as(recipe.published_name, [recorded_recipe("x", content, tmp_path)]) is not None


def test_the_overlay_decides_only_where_a_rule_leaves_it_to_it() -> None:
    policy = HeadQuantization(WIDE, "a reason")
    head = Role("head", "the head", "head")
    explicit = Recipe("mine", "Mine.", (Rule(INT8, "why", ("head",)), PLAIN))
    left = evolve(explicit, rules=(Rule(INT8, "why", ("head",), overlay_decides=True), PLAIN))

    def spec(recipe: Recipe) -> QuantizationSpec | None:
        rule = recipe.rule_for("lm_head.weight", head, 4)
        assert rule is not None
        return recipe.spec_of(rule)

    assert spec(explicit.with_head(policy)) == INT8 and explicit.with_head(policy) is explicit
    assert spec(left.with_head(policy)) == WIDE and spec(left) == INT8
    assert left.with_head(policy).published_name == f"{left.published_name}_head_int8_block64_sym"
    assert published_as(left.with_head(policy).published_name, [left]) == left.with_head(policy)


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def test_recipes_are_listed_with_bits_bytes_and_what_is_known() -> None:
    listed = {row["name"]: row for row in json.loads(zoo("recipes", "qwen3.6-27b", "--json").stdout)}
    assert set(RECIPES) <= set(listed)
    for name in ("fp16", "int8hu", "int4hu8"):
        plan = json.loads(zoo("plan", "qwen3.6-27b", "--recipe", name, "--json").stdout)
        assert (listed[name]["asset_bytes"], listed[name]["read_per_token"]) == (
            plan["asset_bytes"], plan["decode"]["read_per_token"],
        )  # fmt: skip
    text = zoo("recipes").stdout
    assert "4.50 to 8.50" in text and RECIPES["int8hu"].description in text
    assert json.loads(zoo("recipes", "--json").stdout)[0]["rule"]


def test_a_recipe_that_is_not_for_a_model_is_said_so_and_the_others_compared(tmp_path: Path) -> None:
    text = zoo("plan", "qwen3.6-27b", "--compare").stdout
    assert all(name in text for name in ("fp16", "int4hu8", "int8mse"))
    misfit = tmp_path / "misfit.toml"
    misfit.write_text(as_toml(RECIPES["int8hu"]).replace('"body"', '"bodies"'), encoding="utf-8")
    result = zoo("plan", "qwen3.6-27b", "--recipe", misfit, "--compare")
    assert result.exit_code == 2 and "rule 3 names bodies, no role of this model" in result.stderr


def test_a_file_with_the_name_of_a_recipe_is_not_that_recipe(tmp_path: Path) -> None:
    path = tmp_path / "int8hu.toml"
    path.write_text(as_toml(RECIPES["int4lin"]), encoding="utf-8")
    shipped, own = (
        json.loads(zoo("plan", "qwen3.6-27b", "--recipe", recipe, "--json").stdout) for recipe in ("int8hu", path)
    )
    assert shipped["published"] and own["recipe"] == "int8hu"
    assert [measured["recipe"] for measured in own["published"]] == ["int4lin"], "by what it does"
    assert own["published_name"] == "int4lin_block32"


# ---------------------------------------------------------------------------------------------------------------------
# What a hostile file may do
# ---------------------------------------------------------------------------------------------------------------------


def test_an_overlay_has_no_say_where_an_earlier_rule_decides_the_head() -> None:
    explicit, left = Rule(INT4, "why", ("head",)), Rule(INT8, "why", ("head",), overlay_decides=True)
    policy = HeadQuantization(WIDE, "a reason")
    shadowed, open_ = (
        Recipe("r", "d", (*rules, Rule(INT8, "why", ("body",)), PLAIN)) for rules in ([explicit, left], [left])
    )
    assert not shadowed.leaves_head_to_overlay and shadowed.with_head(policy) is shadowed
    assert open_.with_head(policy).head == WIDE
    assert shadowed.published_name != open_.with_head(policy).published_name
    narrow = evolve(explicit, parameters=("other",))
    assert Recipe("r", "d", (narrow, left, PLAIN)).leaves_head_to_overlay


def test_who_decides_the_head_is_part_of_the_name() -> None:
    first = Rule(INT4, "why", ("head",), ("*",), overlay_decides=False)
    one = Recipe("r", "d", (first, Rule(INT4, "why", ("head",), overlay_decides=True), PLAIN))
    other = Recipe("r", "d", (evolve(first, overlay_decides=True), Rule(INT4, "why", ("head",)), PLAIN))
    assert one.published_name != other.published_name


def test_a_role_that_the_overlay_does_not_have_is_told_also_of_a_slice_and_in_a_list() -> None:
    for rule in (Rule(INT8, "why", ("mpl",), layers=(6, 6)), Rule(INT8, "why", ("mlp", "mpl"))):
        with pytest.raises(BadInput, match=r"rule 1 names mpl, no role of this model \(Did you mean mlp\?\)"):
            planned(rule, PLAIN, layers=8)


@pytest.mark.parametrize(
    "text",
    [
        f'description = "d"\n[[rule]]\nlayers = [0, {"9" * 5000}]\ndtype = "int8"\nwhy = "w"\n',
        f"description = {'[' * 3000}",
        'description = "\xff"'.encode("latin-1").decode("latin-1") + "\n\x00",
    ],
    ids=["digits", "deep", "nul"],
)
def test_a_file_that_the_parser_gives_up_on_is_an_error_in_words(text: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.toml"
    path.write_text(text, encoding="utf-8")
    result = zoo("show-recipe", path)
    assert result.exit_code == 2 and "is not TOML" in result.stderr, result.output


def test_odd_names_of_files_are_errors_in_words_or_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = as_toml(evolve(RECIPES["int8hu"], description="x \u007f y"))
    Path("with mark.toml").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert zoo("show-recipe", "with mark.toml").stdout == text
    Path("int8hu").mkdir()
    assert zoo("show-recipe", "int8hu").stdout == as_toml(RECIPES["int8hu"])
    Path("noext").write_text(text, encoding="utf-8")
    for name, told in (
        ("~nobody-at-all/x.toml", "cannot be read"),
        ("./noext", "The file of a recipe ends in .toml"),
        ("noext", "The file of a recipe ends in .toml"),
        (str(tmp_path), "The file of a recipe ends in .toml"),
        ("", "There is no recipe ''"),
    ):
        result = zoo("plan", "qwen3.6-27b", "--recipe", name)
        assert result.exit_code == 2 and told in result.stderr, (name, result.output)


def test_recipes_of_a_folder_that_a_package_lacks_are_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"There is no folder of recipes .* among the data of the package"):
        read_recipes(tmp_path / "recipes")
