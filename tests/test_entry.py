from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import attrs
import pytest

from conftest import ROOT
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.entry import Entry, Sample, load_entry
from coreai_zoo.errors import BadInput, EnvironmentLacks, PluginError
from coreai_zoo.plugins import Plugins

MakePlugin = Callable[..., types.ModuleType]
EntryFile = Callable[..., Path]


def host(**plugins: types.ModuleType) -> Plugins:
    registered = Plugins()
    for name, module in plugins.items():
        registered.register(module, name)
    return registered


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def test_a_minimal_entry_has_the_defaults(entry_file: EntryFile) -> None:
    entry = load_entry(entry_file())

    assert (entry.recipe, entry.contract, entry.status) == ("int8hu", "static-s1", "unverified")
    assert (entry.hf_revision, entry.licence, entry.sample, entry.facts.parameters) == (None, None, None, None)
    assert entry.model_type == ("toy",)
    assert entry.slug == "toy_1b"


def test_what_is_not_known_is_not_among_the_stated_facts(entry_file: EntryFile) -> None:
    facts = load_entry(entry_file(("layers = 2", "head_dim = 4\ntied_head = false"))).facts

    assert facts.stated == {"ffn": "dense", "hidden_size": 8, "vocab_size": 32, "head_dim": 4, "tied_head": False}


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (('title = "Toy 1B"', 'titel = "Toy 1B"'), "titel: unknown key, nearest is title"),
        (('title = "Toy 1B"\n', ""), "title: missing"),
        (("[bundle]\nmax_context = 64", ""), "bundle: missing"),
        (('name = "toy-1b"', 'name = "Toy 1B"'), "name: 'Toy 1B' is not lowercase letters"),
        (('name = "toy-1b"', 'name = "../toy"'), "name: '../toy' is not lowercase letters"),
        (('name = "toy-1b"', "name = 1"), "name: expected text, found an integer (1)"),
        (('["toy"]', '"toy"'), "model_type: expected a list of text, found text ('toy')"),
        (('["toy"]', '["toy", 3]'), "model_type: expected a list of text"),
        (('["toy"]', "[]"), "model_type: needs at least one name"),
        (('"toys/Toy-1B"', '"Toy-1B"'), "hf_id: 'Toy-1B' is not a repository 'owner/name'"),
        (('summary = "A toy."', 'summary = "A."\nhf_revision = "main"'), "hf_revision: 'main' is not a commit"),
        (('summary = "A toy."', 'summary = "A."\nstatus = "fine"'), "status: 'fine' is not one of 'verified', 'unver"),
        (('ffn = "dense"', 'ffn = "Sparse"'), "facts.ffn: 'Sparse' is not lowercase letters"),
        (('ffn = "dense"\n', ""), "facts.ffn: missing"),
        (("layers = 2", 'layers = "2"'), "facts.layers: expected an integer, found text ('2')"),
        (("layers = 2", "layers = true"), "facts.layers: expected an integer, found a boolean (True)"),
        (("layers = 2", "layers = 2.0"), "facts.layers: expected an integer, found a float (2.0)"),
        (("layers = 2", "layers = 0"), "facts.layers: 0 is not positive"),
        (("layers = 2", "layer = 2"), "facts.layer: unknown key, nearest is layers"),
        (("layers = 2", "rope = [1, 2]"), "facts.rope: expected a single value, found a list"),
        (("layers = 2", "heads = 0"), "facts.heads: 0 is not a positive number"),
        (("layers = 2", "heads = -3"), "facts.heads: -3 is not a positive number"),
        (("layers = 2", "theta = 0.0"), "facts.theta: 0.0 is not a positive number"),
        (("layers = 2", "theta = nan"), "facts.theta: nan is not a positive number"),
        (("layers = 2", "theta = inf"), "facts.theta: inf is not a positive number"),
        (("layers = 2", 'kind = ""'), "facts.kind: is empty"),
        (("layers = 2", "heads = 2026-01-01"), "facts.heads: expected a single value, found date"),
        (
            ("[bundle]\nmax_context = 64", "[bundle]\nmax_contxt = 64"),
            "bundle.max_contxt: unknown key, nearest is max_context",
        ),
        (("[bundle]\nmax_context = 64", "[bundle]\nmax_context = -1"), "bundle.max_context: -1 is not positive"),
        (('[facts]\nffn = "dense"\n', "[[facts]]\n"), "facts: expected a table, found a list"),
        (("[bundle]", '[sample]\npackage = "a b"\npath = "x"\n[bundle]'), "sample.package: 'a b' is not the name of"),
        (("[bundle]", '[sample]\npackage = "ab"\npath = "../x"\n[bundle]'), "sample.path: '../x' is not a relative"),
        (("[bundle]", '[sample]\npackage = "ab"\npath = "/x"\n[bundle]'), "sample.path: '/x' is not a relative"),
    ],
)
def test_a_bad_key_is_named_with_its_file(entry_file: EntryFile, change: tuple[str, str], complaint: str) -> None:
    path = entry_file(change)

    with pytest.raises(BadInput) as caught:
        load_entry(path)

    assert complaint in str(caught.value)
    assert str(path) in str(caught.value)


def test_all_bad_keys_are_reported_at_once(entry_file: EntryFile) -> None:
    path = entry_file(
        ('title = "Toy 1B"', 'titel = "Toy 1B"'),
        ('name = "toy-1b"', 'name = "Toy"'),
        ('["toy"]', "3"),
        ("layers = 2", "layer = 2"),
        ("hidden_size = 8", "hidden_size = -8"),
        ("vocab_size = 32", 'vocab_size = "many"'),
        ("max_context = 64", "max_context = 64\ncolour = 1"),
    )

    with pytest.raises(BadInput) as caught:
        load_entry(path)

    message = str(caught.value)
    keys = ("titel", "title", "name", "model_type", "facts.layer", "facts.hidden_size", "facts.vocab_size")
    for key in (*keys, "bundle.colour"):
        assert f"{key}: " in message
    assert "8 bad keys" in message
    assert "\n" not in message


def test_a_file_that_is_not_toml_is_bad_input(entry_file: EntryFile) -> None:
    path = entry_file(("[facts]", "[facts"))

    with pytest.raises(BadInput, match=r"toy\.toml is not TOML: .*line 7"):
        load_entry(path)


def test_a_file_that_is_not_text_is_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"name = '\xff'")

    with pytest.raises(BadInput, match="is not TOML"):
        load_entry(path)


def test_a_file_that_is_not_there_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot be read: No such file"):
        load_entry(tmp_path / "nothing.toml")


# ---------------------------------------------------------------------------------------------------------------------
# Finding
# ---------------------------------------------------------------------------------------------------------------------


def test_one_name_from_two_plugins_names_both_and_their_files(entry_file: EntryFile, make_plugin: MakePlugin) -> None:
    first, second = entry_file(name="first"), entry_file(name="second")
    plugins = host(
        ours=make_plugin(zoo_entries=lambda: [first]),
        theirs=make_plugin(zoo_entries=lambda: [second]),
    )

    with pytest.raises(PluginError) as caught:
        load_entries(plugins)

    for part in ("toy-1b", "'ours'", "'theirs'", str(first), str(second)):
        assert part in str(caught.value)


def test_a_bad_entry_file_names_the_plugin_that_brought_it(entry_file: EntryFile, make_plugin: MakePlugin) -> None:
    path = entry_file(("layers = 2", "layers = 0"))

    with pytest.raises(BadInput, match=r"facts\.layers: 0 is not positive.*plugin 'theirs', zoo_entries"):
        load_entries(host(theirs=make_plugin(zoo_entries=lambda: [path])))


def test_an_entry_is_found_with_its_plugin(shipped: Plugins) -> None:
    entry, plugin = find_entry("qwen3.6-27b", shipped)

    assert (entry.title, plugin) == ("Qwen3.6 27B", "shipped")


@pytest.mark.parametrize("name", ["qwen3.6-27", "qwen36-27b", "Qwen3.6-27B"])
def test_an_unknown_entry_is_answered_with_the_nearest_names(shipped: Plugins, name: str) -> None:
    with pytest.raises(BadInput, match=rf"{name}.*Did you mean qwen3\.6-27b"):
        find_entry(name, shipped)


def test_an_unknown_entry_that_is_like_none_is_answered_with_all(shipped: Plugins) -> None:
    with pytest.raises(BadInput, match=r"There are .*qwen3\.6-27b, qwen3\.6-35b-a3b"):
        find_entry("zzzzzzzz", shipped)


def test_without_any_plugin_the_error_says_where_to_look() -> None:
    with pytest.raises(BadInput, match="No plugin brings any entry: `zoo plugins`"):
        find_entry("qwen3.6-27b", Plugins())


# ---------------------------------------------------------------------------------------------------------------------
# Samples
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "zoo_sample_package" / "samples" / "dense").mkdir(parents=True)
    (tmp_path / "zoo_sample_package" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    monkeypatch.delitem(sys.modules, "zoo_sample_package", raising=False)
    return "zoo_sample_package"


def test_a_sample_is_a_directory_of_its_package(package: str, tmp_path: Path) -> None:
    assert Sample(package, "samples/dense").directory() == tmp_path / package / "samples" / "dense"


def test_a_sample_that_the_package_lacks_is_bad_input(package: str) -> None:
    with pytest.raises(BadInput, match=r"'samples/moe' is not in the package 'zoo_sample_package'"):
        Sample(package, "samples/moe").directory()


def test_a_sample_of_a_package_that_is_not_installed_is_the_environment() -> None:
    with pytest.raises(EnvironmentLacks, match="'no_such_package_of_samples'"):
        Sample("no_such_package_of_samples", "samples/dense").directory()


def test_an_entry_without_a_sample_says_so(entry_file: EntryFile) -> None:
    with pytest.raises(BadInput, match="'toy-1b' has no sample"):
        load_entry(entry_file()).sample_directory()


# ---------------------------------------------------------------------------------------------------------------------
# The entries of this repository
# ---------------------------------------------------------------------------------------------------------------------


def text_parameters(fact: Mapping[str, Any]) -> Any:
    """Parameters of the text model from its sizes alone, tensor by tensor."""
    d, v = fact["hidden_size"], fact["vocab_size"]
    embedding_head_and_final_norm = (1 if fact["tied_head"] else 2) * v * d + d

    q, kv, head = fact["attention_heads"], fact["kv_heads"], fact["head_dim"]
    attention = d * 2 * q * head  # q_proj: queries and their gate
    attention += 2 * d * kv * head  # k_proj, v_proj
    attention += q * head * d  # o_proj
    attention += 2 * head  # q_norm, k_norm

    keys = fact["gdn_key_heads"] * fact["gdn_key_head_dim"]
    value_heads = fact["gdn_value_heads"]
    values = value_heads * fact["gdn_value_head_dim"]
    gdn = d * (2 * keys + values)  # in_proj_qkv
    gdn += d * values  # in_proj_z
    gdn += 2 * d * value_heads  # in_proj_b, in_proj_a
    gdn += (2 * keys + values) * fact["conv_kernel"]  # conv1d
    gdn += 2 * value_heads  # A_log, dt_bias
    gdn += fact["gdn_value_head_dim"]  # norm
    gdn += values * d  # out_proj

    if fact["ffn"] == "dense":
        ffn = 3 * d * fact["intermediate_size"]  # gate_proj, up_proj, down_proj
    else:
        ffn = d * fact["experts"]  # router
        ffn += fact["experts"] * 3 * d * fact["expert_intermediate_size"]  # gate_up_proj, down_proj
        ffn += 3 * d * fact["shared_expert_intermediate_size"]  # shared expert
        ffn += d  # its gate

    linear, full = fact["linear_attention_layers"], fact["full_attention_layers"]
    assert linear + full == fact["layers"]
    norms = 2 * d  # input_layernorm, post_attention_layernorm
    return embedding_head_and_final_norm + fact["layers"] * (ffn + norms) + linear * gdn + full * attention


@pytest.fixture(params=sorted(path.stem for path in (ROOT / "zoo_entries").glob("*.toml")))
def shipped_entry(shipped: Plugins, request: pytest.FixtureRequest) -> Entry:
    return find_entry(request.param, shipped)[0]


def test_the_parameters_of_an_entry_follow_from_its_sizes(shipped_entry: Entry) -> None:
    assert shipped_entry.facts.parameters == text_parameters(shipped_entry.facts.stated)


def test_every_fact_of_an_entry_is_one_that_the_overlay_tells_too(shipped_entry: Entry) -> None:
    # A fact under a name of our own would never be compared with a checkpoint.
    from coreai_zoo_overlays.qwen3_5 import Qwen35Overlay

    overlay, stated = Qwen35Overlay(), shipped_entry.facts.stated
    told = overlay.facts(overlay.read_config(overlay.config_of_facts(stated)))

    assert stated == {name: told.get(name, "not told by the overlay") for name in stated}


def test_no_entry_passes_for_verified_while_no_published_checkpoint_was_at_hand(shipped_entry: Entry) -> None:
    assert shipped_entry.status == "unverified"


def test_an_entry_file_says_where_its_facts_are_from(root: Path, shipped_entry: Entry) -> None:
    text = (root / "zoo_entries" / f"{shipped_entry.name}.toml").read_text(encoding="utf-8")

    assert text.partition("[facts]\n")[2].startswith("# ")
    assert shipped_entry.hf_revision is None or f'{shipped_entry.hf_revision}" # ' in text


def test_slugs_of_entries_differ(shipped: Plugins) -> None:
    slugs = [entry.slug for entry, _plugin in load_entries(shipped).values()]

    assert len(set(slugs)) == len(slugs) > 1


def test_entries_are_immutable(shipped_entry: Entry) -> None:
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        shipped_entry.recipe = "fp16"  # type: ignore[misc]
