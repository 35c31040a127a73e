"""Input that cannot be used: one paragraph, an exit code, and an output folder that is exactly as before.

Everything here goes through the real command line, with checkpoints that transformers wrote and one small thing wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result
from safetensors.torch import save_file

from checkpoints import read_weights, text_config, tiny_checkpoint, write_json, write_weights
from command import zoo as run_zoo
from coreai_zoo.backends import builtin
from coreai_zoo.overlay import LayerRewrite, WeightMap
from coreai_zoo.plugins import LISTS, Plugins
from coreai_zoo_overlays import qwen3_5
from shared import Shared

MakePlugin = Callable[..., types.ModuleType]
DENSE, MOE = "qwen3.6-27b", "qwen3.6-35b-a3b"
NAME = "qwen3_6_27b_custom_decode_int8hu_block32_sym"
LAYER = "model.language_model.layers.0."
GATE_PROJ = LAYER + "mlp.gate_proj.weight"
NORM = LAYER + "input_layernorm.weight"
HEAD = "lm_head.weight"

# What a build says on stderr while all is well: a stage at the start of a line, version_warnings indented.
PROGRESS = re.compile(r"(resolve|trace|weights|lower|bundle|verify|oracle|control|judge|long) |         \S")


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints and bundles
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def dense(shared: Shared) -> Path:
    """A good dense checkpoint whose top-2 margins are confident."""
    return shared.folder("confident", lambda folder: tiny_checkpoint(folder, head_scale=20.0))


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good mixture-of-experts checkpoint."""
    return tiny_checkpoint(tmp_path_factory.mktemp("moe") / "checkpoint", "moe")


@pytest.fixture(scope="module")
def built(shared: Shared, dense: Path) -> Path:
    """The bundle of the dense checkpoint; tests that change it copy it first."""

    def fill(output: Path) -> None:
        result = zoo("build", DENSE, "--checkpoint", dense, "-o", output)
        assert result.exit_code == 0, result.stderr

    return shared.folder("confident-built", fill) / NAME


@pytest.fixture
def checkpoint(tmp_path: Path, dense: Path) -> Path:
    """A copy of the dense checkpoint to do harm to."""
    return shutil.copytree(dense, tmp_path / "checkpoint")


@pytest.fixture
def bundle(tmp_path: Path, built: Path) -> Path:
    """A copy of the bundle to do harm to."""
    return shutil.copytree(built, tmp_path / NAME)


def change_config(checkpoint: Path, **changes: Any) -> None:
    """Replace fields of the text config; None removes one."""
    config = json.loads((checkpoint / "config.json").read_text())
    text = config["text_config"] | changes
    config["text_config"] = {key: value for key, value in text.items() if value is not None}
    write_json(checkpoint / "config.json", config)


def change_weights(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object], shards: int = 1) -> None:
    """Rewrite the weights after `change` has been at the mapping from key to tensor."""
    tensors = read_weights(checkpoint)
    change(tensors)
    (checkpoint / "model.safetensors").unlink()
    write_weights(checkpoint, {key: tensor.contiguous() for key, tensor in tensors.items()}, shards)


def put(key: str, value: float, at: int = 0) -> Callable[[dict[str, torch.Tensor]], object]:
    """A change of one element of one tensor."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[key].view(-1)[at] = value

    return change


# ---------------------------------------------------------------------------------------------------------------------
# Running the command line
# ---------------------------------------------------------------------------------------------------------------------


def zoo(*arguments: object, plugins: Plugins | None = None) -> Result:
    if arguments[0] == "build" and "--checkpoint" in arguments:
        arguments = (*arguments, "--custom")  # none of these is as large as an entry's model
    return run_zoo(*arguments, plugins=plugins)


def contents(folder: Path) -> dict[str, str]:
    """Everything below `folder`, hidden files included, with what it is."""

    def describe(path: Path) -> str:
        if path.is_symlink():
            return f"link to {path.readlink()}"
        return "folder" if path.is_dir() else hashlib.sha256(path.read_bytes()).hexdigest()

    return {path.relative_to(folder).as_posix(): describe(path) for path in sorted(folder.rglob("*"))}


def paragraph(result: Result, code: int = 2) -> str:
    """The one paragraph that a failed command left on stderr, after what it had reported of its progress."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"a traceback instead of a paragraph: {result.exception!r}") from result.exception
    assert result.exit_code == code, result.output
    *progress, last = result.stderr.splitlines()
    assert last.startswith("error: ")
    assert [line for line in progress if not PROGRESS.match(line)] == []
    return last.removeprefix("error: ")


def refusal(tmp_path: Path, entry: str, *arguments: object, plugins: Plugins | None = None, code: int = 2) -> str:
    """What `zoo build` says when it refuses; everything in `tmp_path`, an output folder in use included, stays."""
    output = tmp_path / "out"
    (output / "another bundle" / ".hidden").mkdir(parents=True)
    (output / "another bundle" / "metadata.json").write_text("{}")
    (output / ".dot").write_text("dot")
    before = contents(tmp_path)

    result = zoo("build", entry, *arguments, "-o", output, plugins=plugins)

    text = paragraph(result, code)
    assert result.stdout == ""
    assert contents(tmp_path) == before
    return text


def test_the_checkpoint_that_the_others_are_made_from_is_good(built: Path) -> None:
    # Without this, every test below might be refused for a reason of its own.
    assert sorted(path.name for path in built.parent.iterdir()) == [NAME]
    assert zoo("verify", built).exit_code == 0


# ---------------------------------------------------------------------------------------------------------------------
# Names and options
# ---------------------------------------------------------------------------------------------------------------------


def test_an_unknown_entry_is_answered_with_the_nearest_names(tmp_path: Path, dense: Path) -> None:
    text = refusal(tmp_path, "qwen3.6-27", "--checkpoint", dense)

    assert "'qwen3.6-27'" in text
    assert "Did you mean qwen3.6-27b" in text


@pytest.mark.parametrize(
    ("option", "value", "known"),
    [("--recipe", "int8hx", "int8hu"), ("--contract", "static-s2", "static-s1"), ("--backend", "coral", "coreai")],
)
def test_an_unknown_recipe_contract_or_backend_is_answered_with_what_there_is(
    tmp_path: Path, dense: Path, option: str, value: str, known: str
) -> None:
    text = refusal(tmp_path, DENSE, "--checkpoint", dense, option, value)

    assert f"no {option.removeprefix('--')} {value!r}" in text
    assert known in text.partition(repr(value))[2]


def test_a_checkpoint_and_the_sample_exclude_each_other(tmp_path: Path, dense: Path) -> None:
    text = refusal(tmp_path, DENSE, "--checkpoint", dense, "--sample")

    assert "--checkpoint and --sample exclude each other" in text


@pytest.mark.parametrize("positions", [513, 7, 1, 0, -5])
def test_a_context_that_the_model_does_not_have_is_refused_with_its_limit(
    tmp_path: Path, dense: Path, positions: int
) -> None:
    text = refusal(tmp_path, DENSE, "--checkpoint", dense, "--max-context", positions)

    assert f"A context of {positions} is not between 8 and 512" in text


def test_a_model_with_room_for_fewer_positions_than_are_traced_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    change_config(checkpoint, max_position_embeddings=4)

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "would allow 4 positions (the model 4, the entry 32768); 8 is the least" in text


@pytest.mark.parametrize("layers", [0, 1, 3, -1])
def test_a_slice_that_is_no_model_is_refused(tmp_path: Path, dense: Path, layers: int) -> None:
    text = refusal(tmp_path, DENSE, "--checkpoint", dense, "--layers", layers)

    assert f"A slice of {layers} layers is not possible: this checkpoint has 2 layers" in text
    assert "at least one linear_attention and one full_attention" in text


# ---------------------------------------------------------------------------------------------------------------------
# Where the checkpoint is
# ---------------------------------------------------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
    return port


@pytest.mark.parametrize("way", ["offline", "unreachable"])
def test_no_checkpoint_and_no_network_is_the_environments_fault_and_says_what_to_pass(tmp_path: Path, way: str) -> None:
    # A process of its own: huggingface_hub reads these once.
    nowhere = f"http://127.0.0.1:{closed_port()}"
    settings = {
        "offline": {"HF_HUB_OFFLINE": "1"},
        "unreachable": {
            "HF_HUB_OFFLINE": "0",
            **{name: nowhere for scheme in ("http", "https", "all") for name in (f"{scheme}_proxy", f"{scheme}_PROXY")},
            **dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"), nowhere),
            "NO_PROXY": "",
            "no_proxy": "",
        },
    }[way]
    output = tmp_path / "out"
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "from coreai_zoo.cli.app import main; main()",
            "build",
            DENSE,
            "-o",
            str(output),
        ],
        env={**os.environ, **settings, "HF_HOME": str(tmp_path / "hf")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    *progress, text = process.stderr.splitlines()
    assert process.returncode == 3, process.stderr
    assert [line for line in progress if not PROGRESS.match(line)] == []
    said = {
        "offline": "Qwen/Qwen3.6-27B is not to be fetched: HF_HUB_OFFLINE is set. Unset it, or give a folder",
        "unreachable": "Qwen/Qwen3.6-27B cannot be fetched: the connection to huggingface.co fails (",
    }[way]
    assert text.startswith(f"error: {said}")
    assert not output.exists()


def test_a_directory_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path / 'nowhere'} does not exist" in refusal(tmp_path, DENSE, "--checkpoint", tmp_path / "nowhere")


def test_a_file_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint / "model.safetensors")

    assert "model.safetensors is not a directory" in text


def test_a_directory_without_config_json_is_no_checkpoint(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{checkpoint} has no config.json" in text
    assert "check the path" in text


# ---------------------------------------------------------------------------------------------------------------------
# Which architecture
# ---------------------------------------------------------------------------------------------------------------------


def test_an_architecture_that_nobody_claims_says_who_was_asked(tmp_path: Path, checkpoint: Path) -> None:
    write_json(checkpoint / "config.json", {"model_type": "mamba_9", "hidden_size": 32})

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "'mamba_9' is claimed by no plugin" in text
    assert "Asked: qwen36" in text
    assert "Install a plugin" in text


def test_two_plugins_that_claim_an_architecture_are_both_named(
    tmp_path: Path, dense: Path, make_plugin: MakePlugin
) -> None:
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_claim_overlay=lambda model_type: qwen3_5.Qwen35Overlay(name="another")), "rival")

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, plugins=plugins)

    assert "'qwen3_5' is claimed more than once in zoo_claim_overlay" in text
    assert "plugin 'qwen36'" in text
    assert "plugin 'rival' (overlay 'another')" in text
    assert "Uninstall all but one" in text


@pytest.mark.parametrize(("entry", "kind", "wanted"), [(DENSE, "moe", "dense"), (MOE, "dense", "moe")])
def test_a_checkpoint_of_the_other_feed_forward_is_refused(
    tmp_path: Path, request: pytest.FixtureRequest, entry: str, kind: str, wanted: str
) -> None:
    directory = request.getfixturevalue(kind)

    text = refusal(tmp_path, entry, "--checkpoint", directory)

    found = {"dense": "qwen3_5", "moe": "qwen3_5_moe"}[kind]
    assert f"{directory} is a {found} checkpoint" in text
    assert f"entry {entry} is for" in text
    assert f"({wanted} feed-forward)" in text
    assert "zoo list" in text


# ---------------------------------------------------------------------------------------------------------------------
# config.json
# ---------------------------------------------------------------------------------------------------------------------


def test_every_absurd_field_of_a_config_is_listed_once_and_at_once(tmp_path: Path, checkpoint: Path) -> None:
    change_config(
        checkpoint,
        vocab_size="many",
        hidden_size=-32,
        num_attention_heads=3,
        num_key_value_heads=2,
        linear_num_value_heads=True,
        linear_conv_kernel_dim=1,
        rms_norm_eps=float("nan"),
        hidden_act="relu",
        rope_parameters={"rope_type": "spiral", "rope_theta": 10**400, "partial_rotary_factor": 1e308},
        layer_types=["linear_attention", "sliding_attention"],
    )

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "qwen3_5 config" in text
    for words in (
        "vocab_size is 'many'",
        "hidden_size is -32",
        "num_attention_heads (3) is not a multiple of num_key_value_heads (2)",
        "linear_num_value_heads is True",
        "linear_conv_kernel_dim is 1",
        "rms_norm_eps is nan",
        "hidden_act is 'relu'",
        "rope_type is 'spiral'",
        "rope_theta is 1",
        "partial_rotary_factor",
        "layer_types holds something other than linear_attention and full_attention",
    ):
        assert text.count(words) == 1, words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_attention_heads": None}, "num_attention_heads is missing"),
        ({"num_attention_heads": None, "num_key_value_heads": 2}, "num_attention_heads is missing"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"linear_num_value_heads": None}, "linear_num_value_heads is missing"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers is 1000000"),
        ({"num_hidden_layers": 3}, "layer_types has 2 entries for num_hidden_layers 3"),
        ({"layer_types": ["full_attention"] * 2}, "no layer is a linear_attention layer"),
        ({"rope_parameters": "default"}, "rope_parameters is not an object"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'"),
        ({"attention_bias": True}, "attention_bias is True"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_a_field_that_cannot_be_used_is_named(
    tmp_path: Path, checkpoint: Path, change: Mapping[str, Any], words: str
) -> None:
    change_config(checkpoint, **change)

    assert words in refusal(tmp_path, DENSE, "--checkpoint", checkpoint)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "config.json is not valid JSON"),
        ("[]", "config.json must hold a JSON object"),
        ('{"model_type": "qwen3_5", "text_config": null}', "text_config in config.json is not an object"),
        ('{"model_type": "qwen3_5", "model_type": "qwen3_5"}', "config.json names model_type twice"),
    ],
    ids=["cut", "a list", "null", "twice"],
)
def test_a_config_that_is_no_config_is_refused(tmp_path: Path, checkpoint: Path, text: str, words: str) -> None:
    (checkpoint / "config.json").write_text(text)

    assert words in refusal(tmp_path, DENSE, "--checkpoint", checkpoint)


def test_more_active_experts_than_experts_are_refused(tmp_path: Path, moe: Path) -> None:
    directory = shutil.copytree(moe, tmp_path / "checkpoint")
    change_config(directory, num_experts_per_tok=5)

    text = refusal(tmp_path, MOE, "--checkpoint", directory)

    assert "num_experts_per_tok (5) is more than num_experts (4)" in text


# ---------------------------------------------------------------------------------------------------------------------
# Files and tensors
# ---------------------------------------------------------------------------------------------------------------------


def test_a_missing_shard_is_named(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: None, shards=3)
    (checkpoint / "model-00002-of-00003.safetensors").unlink()

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{checkpoint} lacks 1 of the 3 files" in text
    assert "model-00002-of-00003.safetensors" in text
    assert "Download" in text


@pytest.mark.parametrize("kept", [-1, 1000, 4, 0], ids=["one byte less", "in the header", "in its length", "empty"])
def test_a_truncated_file_is_named(tmp_path: Path, checkpoint: Path, kept: int) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{path} is {'truncated' if kept else 'empty'}" in text
    assert "Download it again" in text


def test_a_missing_tensor_is_named(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.pop(GATE_PROJ))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "1 problem)" in text
    assert "missing: model.layers.0.mlp.gate_proj.weight" in text


def test_an_extra_tensor_is_named(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({LAYER + "mlp.bias": torch.ones(32)}))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "1 problem)" in text
    assert f"unknown to the weight map: {LAYER}mlp.bias" in text


def test_a_misshapen_tensor_is_named_with_both_shapes(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({GATE_PROJ: tensors[GATE_PROJ].T}))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "1 problem)" in text
    assert f"misshapen: {GATE_PROJ} is [32, 64], expected [64, 32]" in text


def test_missing_extra_and_misshapen_tensors_are_all_in_one_message(tmp_path: Path, checkpoint: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[NORM], tensors[HEAD]
        tensors["model.language_model.surprise"] = torch.ones(2)
        tensors[GATE_PROJ] = tensors[GATE_PROJ][:-1]

    change_weights(checkpoint, change)

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "4 problems)" in text
    missing, _, rest = text.partition("unknown to the weight map:")
    assert HEAD in missing
    assert "model.layers.0.input_layernorm.weight" in missing
    unknown, _, misshapen = rest.partition("misshapen:")
    assert "model.language_model.surprise" in unknown
    assert f"{GATE_PROJ} is [63, 32], expected [64, 32]" in misshapen


def test_a_missing_expert_is_named(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", "moe", packed_experts=False)
    change_weights(directory, lambda tensors: tensors.pop(LAYER + "mlp.experts.2.up_proj.weight"))

    text = refusal(tmp_path, MOE, "--checkpoint", directory)

    assert "model.layers.0.mlp.experts.2.up_proj.weight" in text
    assert "1 problem)" in text


def test_a_convolution_in_the_layout_of_mlx_is_misshapen(tmp_path: Path, checkpoint: Path) -> None:
    key = LAYER + "linear_attn.conv1d.weight"
    change_weights(checkpoint, lambda tensors: tensors.update({key: tensors[key].transpose(1, 2)}))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"misshapen: {key} is [128, 4, 1], expected [128, 1, 4]" in text
    assert "Use the original in its place: Qwen/Qwen3.6-27B." in text


def test_a_checkpoint_that_says_it_was_converted_for_mlx_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    save_file(read_weights(checkpoint), checkpoint / "model.safetensors", metadata={"format": "mlx"})

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "converted for MLX" in text
    assert "Use the original in its place: Qwen/Qwen3.6-27B." in text


def test_fp8_weights_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({GATE_PROJ: tensors[GATE_PROJ].to(torch.float8_e4m3fn)}))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"quantized already (FP8): {GATE_PROJ} (float8_e4m3fn)" in text
    assert "Use the original in its place: Qwen/Qwen3.6-27B." in text


def test_integers_where_weights_should_be_are_refused(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int64)}))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"not floating point: {NORM} (int64)" in text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("key", [GATE_PROJ, NORM, HEAD], ids=["quantized", "plain", "head"])
def test_a_weight_that_is_not_finite_is_named_with_its_place(
    tmp_path: Path, checkpoint: Path, key: str, value: float
) -> None:
    change_weights(checkpoint, put(key, value, at=5))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"The checkpoint holds {value} in {key} at row 0, column 5." in text
    assert "Download it again" in text


def test_a_weight_that_overflows_half_precision_is_named_with_its_value(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, put(GATE_PROJ, 1e6, at=33))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{GATE_PROJ} at row 1, column 1 overflows float16" in text
    assert "65504" in text


def test_a_decay_that_its_transform_cannot_hold_is_named(tmp_path: Path, checkpoint: Path) -> None:
    key = LAYER + "linear_attn.A_log"
    change_weights(checkpoint, put(key, 1000.0, at=2))

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "'-exp(weight)'" in text
    assert f"{key} at row 0, column 2" in text


def test_a_width_that_the_block_does_not_divide_is_refused_and_never_skipped(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", hidden_size=48)

    text = refusal(tmp_path, DENSE, "--checkpoint", directory)

    assert "not divisible by the recipe's block" in text
    assert "model.layers.0.mlp.gate_proj.weight (mlp, int8 block 32 symmetric_with_clipping: 48 columns" in text
    assert "lm_head.weight (head, int8 block 32 symmetric: 48 columns" in text
    assert "Choose a recipe with blocks that divide them, or one that leaves these roles alone" in text


@pytest.mark.parametrize("others", [(), (GATE_PROJ,)], ids=["alone", "among others"])
def test_a_head_that_is_missing_may_be_the_embedding_table(
    tmp_path: Path, dense: Path, others: tuple[str, ...]
) -> None:
    checkpoint = shutil.copytree(dense, tmp_path / "checkpoint")
    change_weights(checkpoint, lambda tensors: [tensors.pop(name) for name in (HEAD, *others)])

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{HEAD}" in text and ("tie_word_embeddings" in text) is not bool(others)
    assert ("complete and original" in text) is bool(others)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_checkpoint_without_its_tokenizer_is_refused(tmp_path: Path, checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{checkpoint} has no {name}" in text
    assert "needs the checkpoint's tokenizer" in text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_a_tokenizer_file_that_is_a_link_out_of_the_checkpoint_is_refused(
    tmp_path: Path, checkpoint: Path, name: str
) -> None:
    # A bundle is published: it must not carry what a link in a downloaded folder points to on this machine.
    secret = tmp_path / "secret"
    (checkpoint / name).replace(secret) if (checkpoint / name).exists() else secret.write_text("secret")
    (checkpoint / name).symlink_to(secret)

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"names '{name}', a link to {secret}, which leads outside of {checkpoint}" in text


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_file_that_is_a_git_lfs_pointer_is_said_to_be_one(
    tmp_path: Path, checkpoint: Path, name: str
) -> None:
    (checkpoint / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:12\nsize 3\n")

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"{checkpoint / name} is a Git-LFS pointer" in text
    assert "git lfs pull" in text


def test_a_file_name_that_a_tokenizer_config_gives_is_never_followed(tmp_path: Path, checkpoint: Path) -> None:
    (tmp_path / "secret.jinja").write_text("secret")
    config = json.loads((checkpoint / "tokenizer_config.json").read_text())
    config |= {"vocab_file": "../secret.jinja", "chat_template_file": str(tmp_path / "secret.jinja")}
    write_json(checkpoint / "tokenizer_config.json", config | {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}})
    (checkpoint / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')")

    result = zoo("build", DENSE, "--checkpoint", checkpoint, "-o", tmp_path / "out")

    assert result.exit_code == 0, result.stderr
    found = contents(tmp_path / "out" / NAME / "tokenizer")
    assert set(found) <= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"}
    assert hashlib.sha256(b"secret").hexdigest() not in found.values()
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [b'{"a": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}", b"\x80\x04."],
    ids=["not UTF-8", "deep", "a long number", "a pickle"],
)
def test_a_tokenizer_config_that_is_hostile_is_refused(tmp_path: Path, checkpoint: Path, content: bytes) -> None:
    (checkpoint / "tokenizer_config.json").write_bytes(content)

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert "tokenizer_config.json cannot be read as JSON" in text


@pytest.mark.parametrize("content", [b'{"model_type": "\xff"}', b"[" * 100_000, b'{"a": ' + b"9" * 10_000 + b"}"])
def test_a_config_that_is_hostile_is_refused(tmp_path: Path, checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)

    assert "config.json is not" in refusal(tmp_path, DENSE, "--checkpoint", checkpoint)


@pytest.mark.parametrize("size", [2**62, 10**30, -1, 0])
@pytest.mark.parametrize("field", ["vocab_size", "hidden_size", "intermediate_size", "head_dim"])
def test_a_size_that_no_model_has_is_refused(tmp_path: Path, checkpoint: Path, field: str, size: int) -> None:
    change_config(checkpoint, **{field: size})

    refusal(tmp_path, DENSE, "--checkpoint", checkpoint)


def test_an_index_that_leads_out_of_the_checkpoint_is_refused(tmp_path: Path, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(tmp_path / "out.safetensors")
    index = {"weight_map": dict.fromkeys(read_weights(tmp_path), "../out.safetensors")}
    write_json(checkpoint / "model.safetensors.index.json", index)

    assert "leads outside of" in refusal(tmp_path, DENSE, "--checkpoint", checkpoint)


@pytest.mark.parametrize("name", ["LlamaTokenizer", 5])
def test_a_tokenizer_class_that_engines_do_not_know_is_refused(tmp_path: Path, checkpoint: Path, name: object) -> None:
    path = checkpoint / "tokenizer_config.json"
    write_json(path, json.loads(path.read_text()) | {"tokenizer_class": name})

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert f"tokenizer_class in {path} is {name!r}" in text
    assert "Qwen2Tokenizer" in text


def test_token_ids_beyond_the_vocabulary_are_refused(tmp_path: Path) -> None:
    directory = tiny_checkpoint(tmp_path / "checkpoint", vocab_size=256)

    text = refusal(tmp_path, DENSE, "--checkpoint", directory)

    assert f"The tokenizer in {directory} has token ids up to 258, but the model's vocabulary is 256" in text


@pytest.mark.parametrize(
    "content",
    [
        "not JSON",
        "[]",
        '{"model": null}',
        '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}, "added_tokens": [7]}',
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_named_before_any_work(
    tmp_path: Path, checkpoint: Path, content: str
) -> None:
    (checkpoint / "tokenizer.json").write_text(content)

    text = refusal(tmp_path, DENSE, "--checkpoint", checkpoint)

    assert str(checkpoint / "tokenizer.json") in text


# ---------------------------------------------------------------------------------------------------------------------
# Plugins
# ---------------------------------------------------------------------------------------------------------------------


def test_a_typo_in_an_entry_file_is_reported_with_file_key_and_plugin(
    tmp_path: Path, entry_file: Callable[..., Path], make_plugin: MakePlugin
) -> None:
    path = entry_file(("hf_id", "hf_ld"))
    plugins = Plugins()
    plugins.register(make_plugin(zoo_entries=lambda: [path]), "typist")

    text = refusal(tmp_path, "toy-1b", "--sample", plugins=plugins)

    assert str(path) in text
    assert "hf_ld: unknown key, nearest is hf_id" in text
    assert "plugin 'typist', zoo_entries" in text


@pytest.mark.parametrize(
    "hook",
    [
        "zoo_layer_rewrites",
        "zoo_extra_states",
        "zoo_weight_map",
        "zoo_head_quantization",
    ],
)
def test_a_plugin_that_raises_is_named_with_its_hook(
    tmp_path: Path, dense: Path, make_plugin: MakePlugin, hook: str
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("nothing is divided by zero")

    plugins = Plugins.discover()
    plugins.register(make_plugin(**{hook: broken}), "broken")

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, plugins=plugins)

    assert f"plugin 'broken' failed in {hook}: ZeroDivisionError: nothing is divided by zero." in text


def test_a_plugin_that_fails_wherever_it_would_add_to_a_list_stands_in_nobodys_way(
    tmp_path: Path, dense: Path, make_plugin: MakePlugin
) -> None:
    def broken() -> None:
        raise ZeroDivisionError("nothing is divided by zero")

    plugins = Plugins.discover()
    plugins.register(make_plugin(**dict.fromkeys(sorted({*LISTS, "zoo_claim_overlay"}), broken)), "broken")

    made = zoo("build", DENSE, "--checkpoint", dense, "-o", tmp_path / "exports", plugins=plugins)
    verified = zoo("verify", tmp_path / "exports" / NAME, plugins=plugins)

    assert (made.exit_code, verified.exit_code) == (0, 0), made.stderr + verified.stderr
    said = made.stderr + verified.stderr
    for hook in LISTS - {"zoo_recipes", "zoo_contracts"}:
        warning = f"warning: plugin 'broken' failed in {hook}: ZeroDivisionError: nothing is divided by zero. "
        assert said.count(warning) == 1, hook


class Fragile(qwen3_5.Qwen35Overlay):
    """The overlay, with one method that fails."""

    def __init__(self, method: str) -> None:
        super().__init__(name="fragile")
        object.__setattr__(self, method, self._fail)

    def _fail(self, *_arguments: object) -> None:
        raise ZeroDivisionError("nothing is divided by zero")


@pytest.mark.parametrize("method", ["read_config", "with_layers", "facts", "kv_cache", "decoder"])
def test_an_overlay_that_raises_is_named_with_its_plugin(
    tmp_path: Path, root: Path, dense: Path, make_plugin: MakePlugin, method: str
) -> None:
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    hooks = {
        "zoo_entries": lambda: [root / "zoo_entries" / f"{DENSE}.toml"],
        "zoo_claim_overlay": lambda model_type: Fragile(method),
    }
    plugins.register(make_plugin(**hooks), "toy")
    layers = ("--layers", 2) if method == "with_layers" else ()

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, *layers, plugins=plugins)

    assert "plugin 'toy' failed in overlay 'fragile': ZeroDivisionError: nothing is divided by zero." in text


def test_a_rewrite_that_raises_is_named_with_its_plugin_and_layer(
    tmp_path: Path, dense: Path, make_plugin: MakePlugin
) -> None:
    def fail(_layer: object) -> Any:
        raise ZeroDivisionError("nothing is divided by zero")

    rewrite = LayerRewrite("breaker", "model.layers.*.mlp", "to see what happens", fail)
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_layer_rewrites=lambda: [rewrite]), "broken")

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, plugins=plugins)

    assert "plugin 'broken' failed in rewrite 'breaker' of layer model.layers.0.mlp: ZeroDivisionError" in text


def test_parameters_that_no_weight_rule_fills_are_named(tmp_path: Path, dense: Path, make_plugin: MakePlugin) -> None:
    plugins = Plugins.discover()
    plugins.register(make_plugin(zoo_weight_map=lambda overlay: WeightMap(())), "forgetful")

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, plugins=plugins)

    assert "missing: model.embed_tokens.weight (no weight rule fills it)" in text


# ---------------------------------------------------------------------------------------------------------------------
# The output path
# ---------------------------------------------------------------------------------------------------------------------


def unwritable(tmp_path: Path) -> Path:
    """A folder in which nothing can be made, not even by root."""
    folder = tmp_path / "read-only"
    folder.mkdir()
    folder.chmod(0o555)
    for candidate in (folder, Path("/sys"), Path("/proc")):
        try:
            (candidate / "probe").mkdir()
        except OSError:
            return candidate
        (candidate / "probe").rmdir()
    pytest.skip("every folder can be written to here")


def test_a_read_only_output_folder_is_refused_before_the_checkpoint_is_looked_at(tmp_path: Path) -> None:
    folder = unwritable(tmp_path)
    before = sorted(path.name for path in folder.iterdir())

    result = zoo("build", DENSE, "--checkpoint", tmp_path / "nowhere", "-o", folder / "exports")

    text = paragraph(result)
    assert f"The output folder {folder / 'exports'} cannot be used" in text
    assert "Choose another with -o DIR" in text
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize("below", ["", "folder", "folder/deeper"])
def test_an_output_folder_below_a_file_is_refused(tmp_path: Path, dense: Path, below: str) -> None:
    file = tmp_path / "file"
    file.write_text("content")

    result = zoo("build", DENSE, "--checkpoint", dense, "-o", file / below)

    assert f"cannot be used: {file} is no folder" in paragraph(result)
    assert contents(tmp_path) == {"file": hashlib.sha256(b"content").hexdigest()}


def test_an_output_folder_that_is_a_dangling_link_is_refused(tmp_path: Path, dense: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")

    result = zoo("build", DENSE, "--checkpoint", dense, "-o", tmp_path / "link")

    assert f"cannot be used: {tmp_path / 'link'} is no folder" in paragraph(result)
    assert contents(tmp_path) == {"link": f"link to {tmp_path / 'nowhere'}"}


@pytest.mark.parametrize("work", ["file", "unwritable"])
def test_a_work_directory_that_cannot_be_made_is_refused(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, dense: Path, work: str
) -> None:
    folder = unwritable(tmp_path_factory.mktemp("work")) / "work" if work == "unwritable" else tmp_path / "file"
    (tmp_path / "file").write_text("content")

    text = refusal(tmp_path, DENSE, "--checkpoint", dense, "--work-dir", folder)

    assert str(folder) in text
    assert "--work-dir" in text


def test_a_build_that_fails_late_leaves_no_output_folder_behind(tmp_path: Path, checkpoint: Path) -> None:
    change_weights(checkpoint, put(HEAD, float("nan")))
    before = contents(tmp_path)

    result = zoo("build", DENSE, "--checkpoint", checkpoint, "-o", tmp_path / "some" / "where")

    assert "nan in lm_head.weight" in paragraph(result)
    assert contents(tmp_path) == before


def test_an_existing_bundle_is_kept_unless_it_is_replaced_by_force(bundle: Path, dense: Path) -> None:
    (bundle / "mark").write_text("the old one")
    before = contents(bundle.parent)

    text = paragraph(zoo("build", DENSE, "--checkpoint", dense, "-o", bundle.parent))

    assert f"{bundle} is there already; whether it was built from these weights is not known" in text
    assert "--force" in text
    assert contents(bundle.parent) == before


def test_a_forced_build_that_fails_keeps_the_old_bundle(bundle: Path, dense: Path) -> None:
    checkpoint = shutil.copytree(dense, bundle.parent / "checkpoint")
    change_weights(checkpoint, put(HEAD, float("nan")))
    before = contents(bundle.parent)

    result = zoo("build", DENSE, "--checkpoint", checkpoint, "-o", bundle.parent, "--force")

    assert "nan in lm_head.weight" in paragraph(result)
    assert contents(bundle.parent) == before


def test_a_forced_build_replaces_the_old_bundle_and_leaves_nothing_else(
    bundle: Path, tmp_path_factory: pytest.TempPathFactory, dense: Path, built: Path
) -> None:
    (bundle / "mark").write_text("the old one")
    (bundle / "README.md").unlink()
    work = tmp_path_factory.mktemp("work")

    result = zoo("build", DENSE, "--checkpoint", dense, "-o", bundle.parent, "--force", "--work-dir", work)

    assert result.exit_code == 0, result.stderr
    assert contents(bundle) == contents(built), "the same inputs give the same bytes"
    assert list(bundle.parent.iterdir()) == [bundle]
    assert list(work.iterdir()) == [], "the user's own folder stays, what the build put there does not"


@pytest.mark.parametrize("old", ["file", "link", "dangling link"])
@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
def test_what_is_no_folder_is_never_replaced(
    tmp_path: Path, dense: Path, built: Path, old: str, force: tuple[str, ...]
) -> None:
    destination = tmp_path / NAME
    if old == "file":
        destination.write_text("content")
    else:
        destination.symlink_to(built if old == "link" else tmp_path / "nowhere")
    before = contents(tmp_path)

    text = paragraph(zoo("build", DENSE, "--checkpoint", dense, "-o", tmp_path, *force))

    assert f"{destination} exists and is no folder" in text
    assert "Move it away" in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("force", [(), ("--force",)], ids=["", "force"])
@pytest.mark.parametrize("what", ["files", "checkpoint", "hidden files", "records of others"])
def test_a_folder_that_is_no_bundle_is_never_replaced(
    tmp_path: Path, dense: Path, force: tuple[str, ...], what: str
) -> None:
    destination = tmp_path / NAME
    if what == "checkpoint":
        shutil.copytree(dense, destination)
    else:
        destination.mkdir()
        (destination / (".env" if what == "hidden files" else "thesis.txt")).write_text("years of work")
    if what == "records of others":
        for name in ("metadata.json", "build.json"):
            (destination / name).write_text('{"schema": 2, "metadata_version": "0.2"}')
    before = contents(tmp_path)

    text = paragraph(zoo("build", DENSE, "--checkpoint", dense, "-o", tmp_path, *force))

    assert f"{destination} exists and is no bundle, so it is never replaced. Move it away" in text
    assert "--force" not in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("left", [[], [".DS_Store"], ["build.json"], ["metadata.json", "README.md"]], ids=str)
def test_an_empty_folder_and_a_damaged_bundle_are_replaced_by_force(bundle: Path, dense: Path, left: list[str]) -> None:
    (bundle / ".DS_Store").touch()
    for path in bundle.iterdir():
        if path.name not in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    result = zoo("build", DENSE, "--checkpoint", dense, "-o", bundle.parent, "--force", "--recipe", "int8hu")

    assert result.exit_code == 0, result.stderr
    assert (bundle / "build.json").is_file() and not (bundle / ".DS_Store").exists()


def test_a_work_folder_may_hold_anything_that_bundles_of_the_same_name_included(
    bundle: Path, dense: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The folder of bundles too."""
    elsewhere = tmp_path_factory.mktemp("out")
    (bundle.parent / "thesis.txt").write_text("years of work")
    before = contents(bundle.parent)
    command = ["build", DENSE, "--checkpoint", dense, "-o", elsewhere, "--work-dir", bundle.parent]

    for keep in (["--keep-weights"], []):
        assert zoo(*command, *keep, "--force").exit_code == 0
        now = contents(bundle.parent)
        assert {name: now[name] for name in before} == before
        assert {Path(name).parts[0] for name in now.keys() - before.keys()} == ({f".{NAME}.work"} if keep else set())

    here = zoo("build", DENSE, "--checkpoint", dense, "-o", bundle.parent, "--work-dir", bundle.parent, "--force")
    assert here.exit_code == 0, here.stderr
    assert contents(bundle.parent).keys() == before.keys()


# ---------------------------------------------------------------------------------------------------------------------
# Commands that take a bundle
# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {"verify": (), "run": ("-p", "x"), "gate": ()}


@pytest.mark.parametrize("command", COMMANDS)
def test_something_that_is_no_bundle_is_refused(tmp_path: Path, dense: Path, command: str) -> None:
    nowhere, file, empty = tmp_path / "nowhere", tmp_path / "file", tmp_path / "empty"
    file.write_text("content")
    empty.mkdir()
    before = contents(tmp_path)

    assert f"There is no bundle at {nowhere}" in paragraph(zoo(command, nowhere, *COMMANDS[command]))
    assert f"{file} is a file, and a bundle is a folder." in paragraph(zoo(command, file, *COMMANDS[command]))
    for folder in (empty, dense):
        text = paragraph(zoo(command, folder, *COMMANDS[command]))
        assert f"{folder} is not a bundle of this zoo: it has no metadata.json and no build.json" in text
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "build.json is not valid JSON"),
        ("[]", "build.json must hold a JSON object"),
        ('{"schema": 2, "schema": 2}', "build.json names schema twice"),
        ('{"schema": 99}', "build.json has schema 99, not 2"),
        ('{"schema": 1}', "build.json is damaged: name, backend, layers, max_context, entry, source, functions, files"),
        ('{"schema": 1, "backend": "coreai"}', "build.json is damaged: name, layers, max_context, entry, source"),
        ('{"schema": 2, "backend": "coreai"}', "build.json is damaged: name, layers, max_context, entry, source"),
    ],
    ids=["cut", "a list", "a key twice", "another schema", "empty", "almost empty, of before", "almost empty"],
)
def test_a_bundle_whose_record_cannot_be_used_is_refused(
    bundle: Path, dense: Path, command: str, content: str, words: str
) -> None:
    (bundle / "build.json").write_text(content)
    more = ("--checkpoint", dense) if command == "gate" else COMMANDS[command]

    result = zoo(command, bundle, *more)

    assert words in paragraph(result, code=2)


@pytest.mark.parametrize(
    ("part", "junk"),
    [
        ("facts", "x"),
        ("recipe", ["x"]),
        ("roles", 7),
        ("roles", {"mlp": None}),
        ("roles", {"mlp": {"name": "mlp", "kind": "body"}}),
        ("weights", {"mlp": {"tensors": 1, "parameters": "many", "bytes": 2}}),
    ],
    ids=["facts", "recipe", "roles", "a role", "a role without its meaning", "weights"],
)
@pytest.mark.parametrize("command", COMMANDS)
def test_a_bundle_whose_record_has_a_part_of_another_form_is_refused(
    bundle: Path, dense: Path, command: str, part: str, junk: object
) -> None:
    record = json.loads((bundle / "build.json").read_text())
    write_json(bundle / "build.json", record | {part: junk})
    more = ("--checkpoint", dense) if command == "gate" else COMMANDS[command]

    assert f"build.json is damaged: {part} missing or of another type" in paragraph(zoo(command, bundle, *more), code=2)


def test_a_bundle_of_a_backend_that_is_not_installed_is_refused(bundle: Path, dense: Path) -> None:
    record = json.loads((bundle / "build.json").read_text())
    write_json(bundle / "build.json", record | {"backend": "coral"})

    for command, options in {**COMMANDS, "gate": ("--checkpoint", dense)}.items():
        text = paragraph(zoo(command, bundle, *options))
        assert "'coral'" in text
        assert "not installed" in text


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def edit_metadata(bundle: Path, **changes: Any) -> None:
    path = bundle / "metadata.json"
    write_json(path, json.loads(path.read_text()) | changes)


def edit_language(bundle: Path, **changes: object) -> None:
    language = json.loads((bundle / "metadata.json").read_text())["language"]
    edit_metadata(bundle, language={**language, **changes})


def give_ids(bundle: Path, change: Callable[[dict[str, int]], dict[str, int]], **parts: Any) -> None:
    """Give the tokens of a bundle's vocabulary other ids."""
    path = bundle / "tokenizer" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = change(tokenizer["model"]["vocab"])
    merges = [merge for merge in tokenizer["model"]["merges"] if all(part in vocabulary for part in merge)]
    write_json(path, tokenizer | {"model": tokenizer["model"] | {"vocab": vocabulary, "merges": merges}} | parts)


@pytest.mark.parametrize(
    ("change", "parts", "words"),
    [
        # As many tokens as before, the last one beyond the logits.
        (lambda ids: ids | {max(ids, key=ids.__getitem__): 5000}, {}, "token ids up to 5000 for"),
        (lambda _ids: {}, {"added_tokens": []}, "no token for"),
    ],
    ids=["a gap", "no token"],
)
def test_a_token_id_beyond_the_logits_does_not_verify(
    bundle: Path, change: Callable[[dict[str, int]], dict[str, int]], parts: Any, words: str
) -> None:
    give_ids(bundle, change, **parts)

    checks = {check["name"]: check for check in json.loads(zoo("verify", bundle, "--json").stdout)}

    assert not checks["tokenizer"]["passed"]
    assert words in checks["tokenizer"]["detail"]


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (
            lambda bundle: flip_a_bit(bundle / f"{NAME}.aimodel" / "main.mlirb"),
            f"{NAME}.aimodel/main.mlirb was changed",
        ),
        (lambda bundle: flip_a_bit(bundle / "tokenizer" / "tokenizer.json"), "tokenizer/tokenizer.json was changed"),
        (lambda bundle: (bundle / "README.md").unlink(), "README.md is missing"),
        (lambda bundle: (bundle / "link").symlink_to("nowhere"), "link is not in the record"),
        (lambda bundle: (bundle / "tokenizer" / ".hidden").touch(), "tokenizer/.hidden is not in the record"),
        (lambda bundle: edit_metadata(bundle, user_data={"a": "b"}), "metadata.json was changed"),
        (lambda bundle: edit_metadata(bundle, kind="vlm"), "kind is 'vlm', not 'llm'"),
        (lambda bundle: edit_metadata(bundle, assets={}), "names no main asset"),
        (lambda bundle: edit_metadata(bundle, user_data=["a"]), "metadata.json was changed"),
        (lambda bundle: edit_metadata(bundle, language="C"), "metadata.json was changed"),
        (lambda bundle: edit_language(bundle, prefill_chunk_size=2048), "prefill_chunk_size is 2048, not 1"),
        (lambda bundle: shutil.rmtree(bundle / f"{NAME}.aimodel"), f"{NAME}.aimodel/main.mlirb is missing"),
    ],
    ids=[
        "a bit",
        "a tokenizer",
        "a file less",
        "a dangling link",
        "a file more",
        "metadata",
        "kind",
        "assets",
        "data",
        "language",
        "chunks",
        "asset",
    ],
)
def test_a_bundle_that_is_not_as_it_was_built_does_not_verify(
    bundle: Path, harm: Callable[[Path], object], words: str
) -> None:
    harm(bundle)
    before = contents(bundle)

    result = zoo("verify", bundle)

    assert words in paragraph(result, code=1)
    assert contents(bundle) == before


def test_verify_reports_every_check_to_programs_too(bundle: Path) -> None:
    (bundle / "stray").touch()

    result = zoo("verify", bundle, "--json")

    checks = {check["name"]: check["passed"] for check in json.loads(result.stdout)}
    assert result.exit_code == 1
    assert checks == {"files": False, "metadata": True, "tokenizer": True, "checkpoint": True}


def test_a_bundle_that_is_no_sample_needs_its_checkpoint_to_be_gated(built: Path) -> None:
    text = paragraph(zoo("gate", built))

    assert f"The checkpoint of {NAME} is not at hand: where it is was not recorded." in text
    assert "--checkpoint DIR" in text


@pytest.mark.parametrize("kind", ["resized", "other layers", "moe"])
def test_a_gate_refuses_another_checkpoint_than_the_bundles_own(
    tmp_path: Path, built: Path, moe: Path, kind: str
) -> None:
    other = moe
    if kind == "resized":
        other = tiny_checkpoint(tmp_path / "checkpoint", intermediate_size=96)
    elif kind == "other layers":  # of which the first two, as many as the bundle has, are not a model
        layers = ["linear_attention", "linear_attention", "full_attention"]
        other = tiny_checkpoint(tmp_path / "checkpoint", num_hidden_layers=3, layer_types=layers)

    text = paragraph(zoo("gate", built, "--checkpoint", other))

    assert f"{other} is not the checkpoint that {NAME} was built from" in text
    assert "config_sha256 and files differ from build.json" in text


def test_a_prompt_shorter_than_the_positions_is_refused(built: Path, dense: Path) -> None:
    text = paragraph(zoo("gate", built, "--checkpoint", dense, "-p", "def main", "--positions", 9))

    assert "The prompt is 8 tokens, and 9 positions were asked for" in text
    assert "longer prompt" in text


def test_more_positions_than_the_bundles_context_are_refused(built: Path, dense: Path) -> None:
    text = paragraph(zoo("gate", built, "--checkpoint", dense, "-p", "x" * 600, "--positions", 513))

    assert "513 positions are more than this bundle's context of 512" in text


@pytest.mark.parametrize("command", ["run", "gate"])
@pytest.mark.parametrize("harm", ["a bit", "cut", "bytecode", "asset"])
def test_a_damaged_asset_is_refused_before_it_is_loaded(bundle: Path, dense: Path, command: str, harm: str) -> None:
    # The runtime would end the process, pytest's here, by a signal.
    bytecode = bundle / f"{NAME}.aimodel" / "main.mlirb"
    if harm == "a bit":
        flip_a_bit(bytecode)
    elif harm == "cut":
        os.truncate(bytecode, 1000)
    elif harm == "bytecode":
        bytecode.unlink()
    else:
        shutil.rmtree(bytecode.parent)

    result = zoo(command, bundle, *(("--checkpoint", dense) if command == "gate" else ("-p", "x")))

    text = paragraph(result, code=1)
    assert f"{NAME}.aimodel/main.mlirb" in text
    assert "missing or was changed" in text
    assert "Build the bundle again" in text


@pytest.mark.parametrize("content", [None, "[]"], ids=["missing", "a list"])
@pytest.mark.parametrize("options", [(), ("--chat",)], ids=["", "chat"])
def test_a_bundle_whose_tokenizer_config_cannot_be_used_is_not_run(
    bundle: Path, content: str | None, options: tuple[str, ...]
) -> None:
    path = bundle / "tokenizer" / "tokenizer_config.json"
    path.unlink() if content is None else path.write_text(content)

    assert str(path) in paragraph(zoo("run", bundle, "-p", "x", *options))


@pytest.mark.parametrize("template", ["{{ raise_exception('No.') }}", "{% broken", "{{ messages | no_filter }}"])
def test_a_chat_that_the_template_does_not_take_is_told_in_a_paragraph(bundle: Path, template: str) -> None:
    (bundle / "tokenizer" / "chat_template.jinja").write_text(template, encoding="utf-8")

    text = paragraph(zoo("run", bundle, "-p", "x", "--chat"))

    assert "chat template in chat_template.jinja" in text
    assert "Leave out --chat, or mend" in text


@pytest.mark.parametrize("command", ["run", "gate"])
def test_a_bundle_without_its_tokenizer_is_refused(bundle: Path, dense: Path, command: str) -> None:
    (bundle / "tokenizer" / "tokenizer.json").unlink()

    result = zoo(command, bundle, *(("--checkpoint", dense) if command == "gate" else ("-p", "x")))

    assert f"{bundle / 'tokenizer' / 'tokenizer.json'} cannot be read" in paragraph(result)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("", "The prompt is empty"),
        ("x" * 512, "A prompt of 512 tokens leaves no room for an answer in a context of 512: the longest is 511."),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused(built: Path, prompt: str, words: str) -> None:
    assert words in paragraph(zoo("run", built, "-p", prompt))


# ---------------------------------------------------------------------------------------------------------------------
# The gate's exit code
# ---------------------------------------------------------------------------------------------------------------------


def roll_head_in_place(checkpoint: Path) -> None:
    """Move every row of the head by one, so that every token is taken for its neighbour; header and size stay."""
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    entry = json.loads(content[8:start])[HEAD]
    first, last = (start + offset for offset in entry["data_offsets"])
    row = (last - first) // entry["shape"][0]
    content[first:last] = content[last - row : last] + content[first : last - row]
    path.write_bytes(content)


def flips_of(record: dict[str, Any]) -> list[dict[str, Any]]:
    return [position for position in record["prompts"][0]["positions"] if position["verdict"] == "FLIP"]


def test_a_bundle_that_matches_its_checkpoint_has_no_confident_flip(bundle: Path, dense: Path) -> None:
    result = zoo("gate", bundle, "--checkpoint", dense, "--positions", 16, "--prompts", "code", "--json")

    record = json.loads(result.stdout)
    positions = record["prompts"][0]["positions"]
    assert flips_of(record) == []
    # Its weights are random and its layers few: the bounds of trained samples may not hold.
    reasons = record["verdict"]["reasons"]
    assert [reason for reason in reasons if "bound" not in reason and "is allowed" not in reason] == []
    assert (record["verdict"]["passed"], result.exit_code) == ((False, 1) if reasons else (True, 0))
    assert len(positions) == 16
    assert sum(position["margin"] >= 0.1 for position in positions) >= 14, "a gate that could not fail"


def test_a_bundle_with_confident_flips_fails_the_gate_with_exit_code_1(bundle: Path, checkpoint: Path) -> None:
    roll_head_in_place(checkpoint)

    result = zoo("gate", bundle, "--checkpoint", checkpoint, "--positions", 16, "--prompts", "code")

    text = paragraph(result, code=1)
    flips = re.search(
        r"code: (\d+) confident flips, the worst at position \d+ with an oracle margin of (\d+\.\d\d)", text
    )
    assert flips is not None, text
    assert int(flips[1]) >= 14
    assert float(flips[2]) >= 0.1


def test_a_failed_gate_says_so_to_programs_too(bundle: Path, checkpoint: Path) -> None:
    roll_head_in_place(checkpoint)

    result = zoo("gate", bundle, "--checkpoint", checkpoint, "--positions", 8, "--prompts", "code", "--json")

    record = json.loads(result.stdout)
    assert result.exit_code == 1
    assert record["verdict"]["passed"] is False
    flips = flips_of(record)
    assert record["prompts"][0]["confident_flips"] == len(flips) > 0
    for position in flips:
        assert position["candidate"] == (position["oracle"] - 1) % text_config("dense")["vocab_size"]
