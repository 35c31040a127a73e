"""`zoo build MODEL` as a new user types it: an entry, a repository on the hub, a folder; and what it then says it is.

The hub is a real server on this machine (tests/hub.py), the client the real one.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import Result

import command
from checkpoints import read_weights, tiny_checkpoint, write_json, write_weights
from coreai_zoo.build.source import Subject, find_subject
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint.hub import Repository
from coreai_zoo.errors import BadInput
from coreai_zoo.plugins import Plugins, default_plugins
from hub import Hub

ID, NAME = "acme/Tiny-1.5", "tiny-1.5"
SIBLING = "acme/Tiny-1.4"
INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards; logits far enough apart to be gated."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", shards=2, head_scale=20.0)


@pytest.fixture(scope="module")
def entry_text(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An entry with the checkpoint's facts, as `zoo new` writes it."""
    result = command.zoo("new", NAME, "--from", checkpoint, "-o", tmp_path_factory.mktemp("entry"), "--json")
    return Path(json.loads(result.stdout)["path"]).read_text(encoding="utf-8")


@pytest.fixture
def commit(hub: Hub, checkpoint: Path) -> str:
    return hub.add(ID, checkpoint, licence="apache-2.0", card={"language": ["en"]})


@pytest.fixture
def plugins(entry_text: str, commit: str, tmp_path: Path, make_plugin: Callable[..., Any]) -> Plugins:
    """The installed plugins, and one with an entry of the repository and one of a sibling of the same sizes."""
    folder = tmp_path / "entries"
    folder.mkdir()
    for name, hf_id, revision in ((NAME, ID, commit), ("tiny-1.4", SIBLING, "0" * 40)):
        lines = [f'hf_id = "{hf_id}"', f'hf_revision = "{revision}"', "recipe ="]
        text = entry_text.replace(f'name = "{NAME}"', f'name = "{name}"').replace("recipe =", "\n".join(lines))
        (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_entries=lambda: sorted(folder.glob("*.toml"))), "acme")
    return plugins


@pytest.fixture
def zoo(plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`zoo`, in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, code: int = 0) -> Result:
        result = command.zoo(*arguments, plugins=plugins)
        assert result.exit_code == code, result.output
        assert "Traceback" not in result.output
        return result

    return run


def built(folder: Path = Path("exports")) -> Bundle:
    (path,) = [path for path in folder.iterdir() if not path.name.startswith(".")]
    return Bundle.open(path)


def front_matter(bundle: Bundle) -> dict[str, Any]:
    text = (bundle.directory / "README.md").read_text(encoding="utf-8")
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def rebuilt(result: Result) -> bool:
    """Whether `zoo verify --rebuild --json` found every byte the same."""
    (check,) = [check for check in json.loads(result.stdout) if check["name"] == "rebuild"]
    return bool(check["passed"])


def source(bundle: Bundle) -> tuple[str | None, str | None]:
    recorded = bundle.metadata["source"]
    return recorded.get("hf_model_id"), recorded.get("hf_revision")


# ---------------------------------------------------------------------------------------------------------------------
# What a word names
# ---------------------------------------------------------------------------------------------------------------------


def test_a_model_is_an_entry_a_repository_or_a_folder(plugins: Plugins, tmp_path: Path, commit: str) -> None:
    entry, _ = find_entry(NAME, plugins)
    folder = tmp_path / "a folder"
    folder.mkdir()

    assert find_subject(NAME, plugins) == Subject(entry)
    assert find_subject(str(folder), plugins) == Subject(directory=folder)
    assert find_subject(ID, plugins) == Subject(entry, Repository(ID, commit)), "the entry's own revision"
    assert find_subject(ID.lower(), plugins) == Subject(entry, Repository(ID.lower(), commit))
    assert find_subject(f"{ID}@main", plugins) == Subject(entry, Repository(ID, "main"))
    assert find_subject(f"https://huggingface.co/{ID}/tree/v2", plugins) == Subject(entry, Repository(ID, "v2"))
    assert find_subject("acme/unheard-of", plugins) == Subject(repository=Repository("acme/unheard-of"))


def test_a_folder_goes_before_a_repository_and_an_entry_before_a_folder(
    plugins: Plugins, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in (ID, NAME):
        Path(name).mkdir(parents=True)
    assert find_subject(ID, plugins) == Subject(directory=Path(ID))
    assert find_subject(NAME, plugins).entry is not None
    assert find_subject(f"./{NAME}", plugins) == Subject(directory=Path(NAME))


@pytest.mark.parametrize(
    "text", ["./nowhere", "/nowhere/at/all", "a/b/c", "~/nowhere-at-all", "tiny-1.6", "", "a" * 5000, "a/" + "b" * 300]
)
def test_what_names_nothing_is_told_with_what_there_is(plugins: Plugins, text: str) -> None:
    with pytest.raises(BadInput) as caught:
        find_subject(text, plugins)
    assert ("tiny-1.5" in str(caught.value)) >= (text == "tiny-1.6")


# ---------------------------------------------------------------------------------------------------------------------
# The whole way
# ---------------------------------------------------------------------------------------------------------------------


def first_layers(checkpoint: Path, folder: Path, layers: int = 4) -> Path:
    """A copy without the later layers."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    types = config["text_config"]["layer_types"][:layers]
    config["text_config"] |= {"num_hidden_layers": layers, "layer_types": types}
    write_json(folder / "config.json", config)
    numbers = ((key, re.search(r"\.layers\.(\d+)\.", key), tensor) for key, tensor in read_weights(checkpoint).items())
    (folder / "model.safetensors").unlink()
    write_weights(folder, {key: tensor for key, at, tensor in numbers if at is None or int(at[1]) < layers})
    return folder


@pytest.mark.slow
def test_an_entry_is_fetched_built_gated_verified_and_published_by_its_name_alone(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_plugin: Callable[..., Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    sample = find_entry("qwen3.6-27b", default_plugins())[0].sample_directory()
    miniature = first_layers(sample, tmp_path / "miniature")
    commit = hub.add(ID, miniature, licence="apache-2.0", card={"language": ["en"]})
    command.zoo("new", NAME, "--from", ID)
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_entries=lambda: [Path(f"{NAME}.toml")]), "acme")

    def zoo(*arguments: object) -> Result:
        result = command.zoo(*arguments, plugins=plugins)
        assert result.exit_code == 0, result.output
        return result

    result = zoo("build", NAME)
    bundle = built()
    assert f"The facts of entry {NAME} agree with {ID} at {commit}." in result.stderr
    assert (source(bundle), bundle.build["compared"]) == ((ID, commit), True)
    card = front_matter(bundle)
    assert (card["license"], card["base_model"], card["language"]) == ("apache-2.0", [ID], ["en"])
    asked = len(hub.requests)
    assert "is there already, and up to date" in zoo("build", NAME).stdout
    assert len(hub.requests) == asked

    zoo("gate", NAME, "--positions", "16", "--prompts", "code")
    zoo("verify", NAME)
    assert "is there already, and up to date" in zoo("build", NAME).stdout, "what a gate adds was not built"
    hub.tokens.add("hf_a_token")
    monkeypatch.setenv("HF_TOKEN", "hf_a_token")
    zoo("publish", NAME, "acme/tiny-on-device", "--dry-run")
    assert "acme/tiny-on-device" not in hub.repositories
    assert f"{hub.endpoint}/acme/tiny-on-device" in zoo("publish", NAME, "acme/tiny-on-device").stdout
    files = hub.repositories["acme/tiny-on-device"].files
    assert files["build.json"] == (bundle.directory / "build.json").read_bytes()
    assert b"Not gated yet" not in re.sub(rb"<!--.*?-->", b"", files["README.md"], flags=re.DOTALL)


@pytest.mark.slow
def test_a_repository_without_an_entry_is_built_as_what_its_config_says(
    zoo: Callable[..., Result], hub: Hub, checkpoint: Path
) -> None:
    commit = hub.add("someone/My_Tune", checkpoint, card={"base_model": SIBLING})

    zoo("build", "someone/My_Tune@main", "--recipe", "fp16")

    bundle = built()
    assert bundle.directory.name.startswith("my_tune_decode_fp16")
    assert (bundle.entry, bundle.title, source(bundle)) == (None, "My_Tune", ("someone/My_Tune", commit))
    card = front_matter(bundle)
    assert card["base_model"] == ["someone/My_Tune"] and "license" not in card
    assert rebuilt(zoo("verify", bundle.directory, "--rebuild", "--json"))


@pytest.mark.slow
def test_a_folder_is_built_as_what_it_is(zoo: Callable[..., Result], checkpoint: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "My Checkpoint (2)")

    zoo("build", folder, "--recipe", "fp16")

    bundle = built()
    assert bundle.directory.name.startswith("my_checkpoint_2_decode_fp16")
    assert source(bundle) == (None, None)
    assert "base_model" not in front_matter(bundle)
    assert "origin" in (bundle.directory / "README.md").read_text(encoding="utf-8").lower()
    renamed = folder.rename(tmp_path / "renamed")
    assert rebuilt(zoo("verify", bundle.directory, "--rebuild", "--checkpoint", renamed, "--json"))


@pytest.mark.parametrize("command", ["plan", "show"])
def test_of_a_repository_that_is_only_looked_at_config_and_index_are_fetched(
    zoo: Callable[..., Result], hub: Hub, command: str
) -> None:
    zoo(command, ID, "--json") if command == "plan" else zoo(command, f"someone/{'x'}", code=2)
    contents = {request.path.rpartition("/")[2] for request in hub.requests if "/resolve/" in request.path}
    assert contents == ({"config.json", INDEX} if command == "plan" else set())


def test_new_from_an_entry_keeps_what_that_states(zoo: Callable[..., Result], tmp_path: Path, commit: str) -> None:
    made = zoo("new", "another", "--from", NAME, "-o", tmp_path)
    entry = (tmp_path / "another.toml").read_text(encoding="utf-8")
    assert f'hf_id = "{ID}"' in entry and f'hf_revision = "{commit}"' in entry
    assert f"zoo build {tmp_path / 'another.toml'}" in made.stdout and NAME in made.stdout
    assert "always be taken for a file" in zoo("new", "a.toml", "--from", NAME, code=2).stderr
    assert "cannot be written" in zoo("new", "a" * 260, "--from", NAME, "-o", tmp_path, code=2).stderr


def test_new_takes_a_repository(zoo: Callable[..., Result], hub: Hub, commit: str, tmp_path: Path) -> None:
    zoo("new", "another", "--from", ID, "-o", tmp_path)
    entry = (tmp_path / "another.toml").read_text(encoding="utf-8")
    for line in (f'hf_id = "{ID}"', f'hf_revision = "{commit}"', 'licence = "apache-2.0"'):
        assert line in entry
    assert not [request for request in hub.requests if request.path.endswith(".safetensors")]


# ---------------------------------------------------------------------------------------------------------------------
# Refused before the first byte of a weight
# ---------------------------------------------------------------------------------------------------------------------


def changed_config(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"].update(changes)
    write_json(folder / "config.json", config)
    return folder


def without_a_key(checkpoint: Path, folder: Path) -> Path:
    shutil.copytree(checkpoint, folder)
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"]["model.language_model.layers.0.linear_attn.A_log"]
    index["weight_map"]["model.language_model.layers.0.linear_attn.B_log"] = next(iter(index["weight_map"].values()))
    write_json(folder / INDEX, index)
    return folder


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda old, new: changed_config(old, new, rms_norm_eps=1e-6, intermediate_size=96), "intermediate_size is 96"),
        (without_a_key, r"missing: .*A_log.*unknown to the weight map: .*B_log"),
        (lambda old, new: (shutil.copytree(old, new) / "tokenizer.json").write_text("{}"), "tokenizer"),
    ],
    ids=["fact", "key", "tokenizer"],
)
def test_what_is_wrong_with_a_checkpoint_shows_before_its_weights_are_fetched(
    zoo: Callable[..., Result], hub: Hub, checkpoint: Path, tmp_path: Path, spoil: Callable[..., Any], said: str
) -> None:
    spoil(checkpoint, tmp_path / "spoilt")
    commit = hub.add(ID, tmp_path / "spoilt")

    result = zoo("build", f"{ID}@{commit}", code=2)

    assert re.search(said, result.stderr), result.stderr
    assert not [request for request in hub.requests if request.path.endswith(".safetensors")]
    assert not Path("exports").exists()


def test_a_disk_that_is_too_small_shows_before_weights_are_fetched(
    zoo: Callable[..., Result], hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage := real(path))(usage.total, usage.used, 4096))
    result = zoo("build", NAME, code=3)
    assert "4.0 KiB are free" in result.stderr and "of checkpoint" in result.stderr and "HF_HOME" in result.stderr
    assert not [request for request in hub.requests if request.path.endswith(".safetensors")]


real = shutil.disk_usage


# ---------------------------------------------------------------------------------------------------------------------
# Identity
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_folder_that_is_a_sibling_is_refused_under_another_name_and_may_be_built_as_custom(
    zoo: Callable[..., Result], checkpoint: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(checkpoint, tmp_path / "sibling")
    (folder / "README.md").write_text(f"---\nbase_model: {SIBLING}\n---\n", encoding="utf-8")

    refused = zoo("build", NAME, "--checkpoint", folder, code=2)
    assert f"it is {SIBLING}, or a model made from it" in refused.stderr and f"`zoo build {folder}`" in refused.stderr

    zoo("build", NAME, "--checkpoint", folder, "--custom", "--recipe", "fp16")
    bundle = built()
    assert "_custom_" in bundle.directory.name
    assert (bundle.build["compared"], source(bundle)) == (None, (None, None))
    assert front_matter(bundle)["base_model"] == [SIBLING]


@pytest.mark.slow
def test_a_folder_without_evidence_is_built_under_the_name_and_says_so(
    zoo: Callable[..., Result], checkpoint: Path
) -> None:
    result = zoo("build", NAME, "--checkpoint", checkpoint, "--recipe", "fp16")

    bundle = built()
    assert f"The facts of entry {NAME} were not compared with the published checkpoint." in result.stderr
    card = (bundle.directory / "README.md").read_text(encoding="utf-8")
    assert re.search(r"[Oo]rigin (is )?not known; the architecture is that of", card)
    assert (bundle.build["compared"], source(bundle), "base_model" in front_matter(bundle)) == (
        False,
        (None, None),
        False,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Running it again
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint, tmp_path / "again")


def touch_weights(folder: Path, _bundle: Path) -> None:
    shard = folder / "model-00001-of-00002.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)


def cut_a_file(_folder: Path, bundle: Path) -> None:
    path = next(bundle.glob("*.aimodel")) / "main.mlirb"
    path.write_bytes(path.read_bytes()[:-1])


def other_code(_folder: Path, bundle: Path) -> None:
    record = json.loads((bundle / "build.json").read_text())
    record["overlay"]["code_sha256"] = "0" * 64
    write_json(bundle / "build.json", record)


@pytest.mark.slow
def test_a_bundle_that_is_there_is_kept_as_long_as_a_build_would_give_the_same(
    zoo: Callable[..., Result], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("build", folder, "--recipe", "fp16")
    zoo(*command)
    bundle = built().directory
    assert f"{Path('exports') / bundle.name} is there already, and up to date." in zoo(*command).stdout
    assert "would differ in the signature, the context" in zoo(*command, "--max-context", "64", code=2).stderr
    with monkeypatch.context() as patch:
        patch.setenv("SOURCE_DATE_EPOCH", "5")
        assert "would differ in the date" in zoo(*command, code=2).stderr
    saved = shutil.copytree(bundle, folder.with_name("saved"))
    for spoil, said in (
        (touch_weights, "the checkpoint"),
        (cut_a_file, "main.mlirb, which is damaged"),
        (other_code, "the code"),
    ):
        shutil.rmtree(bundle)
        shutil.copytree(saved, bundle)
        spoil(folder, bundle)
        refused = zoo(*command, code=2).stderr
        assert f"would differ in {said}" in refused.replace(bundle.name + ".aimodel/", "") and "--force" in refused
        if spoil is touch_weights:
            touch_weights(folder, bundle)  # as it was, and yet another file
            assert "would differ in the checkpoint" in zoo(*command, code=2).stderr
            zoo(*command, "--force")
            shutil.rmtree(saved)
            shutil.copytree(bundle, saved)


@pytest.mark.slow
def test_what_is_not_known_of_the_weights_is_told_as_that(zoo: Callable[..., Result], folder: Path) -> None:
    arguments = ("build", folder, "--recipe", "fp16")
    zoo(*arguments)
    Path("exports").rename("elsewhere")
    refused = zoo(*arguments, "-o", "elsewhere", code=2).stderr
    assert "whether it was built from these weights is not known" in refused and "--force" in refused
    (folder / "README.md").write_text("---\nlicense: mit\n---\n", encoding="utf-8")
    assert "would differ in what is known of the licence" in zoo(*arguments, "-o", "elsewhere", code=2).stderr


@pytest.mark.slow
def test_to_say_that_a_bundle_is_there_takes_no_torch(zoo: Callable[..., Result], folder: Path) -> None:
    command = ["build", str(folder), "--recipe", "fp16"]
    zoo(*command)
    script = (
        "import sys; from coreai_zoo.cli.app import cli; cli.main(sys.argv[1:], standalone_mode=False); "
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script, *command], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2:] == [
        f"{Path('exports') / built().directory.name} is there already, and up to date.",
        "False",
    ]


def test_the_installed_entries_have_a_repository_and_a_commit_to_fetch() -> None:
    for entry, _ in (find_entry(name, default_plugins()) for name in ("qwen3.6-27b", "qwen3.6-35b-a3b")):
        assert entry.hf_id and entry.hf_revision
