"""Mistakes around the model that are made on purpose: in metadata, tokenizer, weight store and asset.

Each is what a bundle would be if the mistake were in our code: files and record agree, hashes included, so that no hash
finds it. Printed as the table of docs/gate-mutants.md by

python tests/product_mutants.py
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from attrs import evolve, frozen

from checkpoints import write_json
from coreai_zoo.backends.coreai.backend import CoreAIBackend
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.bundle import metadata as metadata_module
from coreai_zoo.bundle.bundle import signature_record
from coreai_zoo.bundle.layout import file_digests
from coreai_zoo.catalogue import find_entry
from coreai_zoo.checkpoint import portable_tokenizer
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipe_files import RECIPES, content_of
from coreai_zoo_overlays.qwen3_5 import states as overlay_states

ENTRY = "qwen3.6-27b"
NAME = "qwen3_6_27b_sample_decode_int8hu_block32_sym"
HEAD, BODY = "lm_head.parametrizations.weight", "model.layers.0.mlp.up_proj.parametrizations.weight"


@frozen
class ProductMutant:
    """A mistake around the model.

    Attributes:
        name: short.
        kind: what it is a mistake of.
        mistake: it, in words.
        caught_by: the command and the check that fail by it, such as `verify: copy`; or `golden metadata`.
        make: makes it in a copy of a sample's bundle; may patch code, which stays patched while it is looked for.
    """

    name: str
    kind: str
    mistake: str
    caught_by: str
    make: Callable[[Path, pytest.MonkeyPatch], None]


def record(bundle: Path, **changes: Any) -> None:
    """Write the record anew, so that all files are as recorded."""
    build = read(bundle, "build.json") | changes
    write_json(bundle / "build.json", build | {"files": file_digests(bundle)})


def read(bundle: Path, name: str) -> Any:
    return json.loads((bundle / name).read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------------------------
# Metadata
# ---------------------------------------------------------------------------------------------------------------------

_Make = Callable[[Path, pytest.MonkeyPatch], None]


def _metadata(change: Callable[[dict[str, Any], dict[str, Any]], None]) -> _Make:
    """Change metadata.json and the record of the build together."""

    def make(bundle: Path, _patch: pytest.MonkeyPatch) -> None:
        metadata, build = read(bundle, "metadata.json"), read(bundle, "build.json")
        change(metadata, build)
        write_json(bundle / "metadata.json", metadata)
        record(bundle, **build)

    return make


def _compression(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["compression"] = build["recipe"]["published_name"] = "fp16"


def _named_after_another_recipe(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["compression"] = build["recipe"]["published_name"] = "int8lin_block32"
    build["recipe"] |= {"name": "int8lin", **content_of(RECIPES["int8lin"])}
    metadata["name"] = build["name"] = metadata["language"]["tokenizer"] = NAME.replace(
        "int8hu_block32_sym", "int8lin_block32"
    )


def _of_another_entry(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["name"] = build["name"] = metadata["language"]["tokenizer"] = NAME.replace("27b", "35b_a3b")


def _context(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["language"]["max_context_length"] = build["max_context"] = 2048


def _vocabulary(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["language"]["vocab_size"] = build["functions"]["main"]["outputs"][0]["shape"][-1] = 1088


def _growing_state(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["language"]["states"]["convState"] = "kv_cache"
    build["functions"]["main"]["states"][2]["kind"] = "kv_cache"


def _sample(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    metadata["user_data"] = {}


def _depth(metadata: dict[str, Any], build: dict[str, Any]) -> None:
    build["facts"]["layers"] = build["layers"] = 64  # bounds are those of a deeper model


def _model_definition(bundle: Path, patch: pytest.MonkeyPatch) -> None:
    """In the constant, which both the build and the check of metadata.json go by."""
    patch.setattr(metadata_module, "MODEL_DEFINITION", "coreai_zoo")
    _metadata(lambda metadata, _: metadata["source"].update(model_definition="coreai_zoo"))(bundle, patch)


def _wide_state(bundle: Path, patch: pytest.MonkeyPatch) -> None:
    """In the overlay, which the build and the check of functions both go by."""
    spec = overlay_states.StateSpec

    def wide(**fields: Any) -> Any:
        return spec(**(fields | {"dtype": "float32"} if fields["name"] == "recState" else fields))

    patch.setattr(overlay_states, "StateSpec", wide)
    designed = design(BuildRequest(ENTRY, sample=True, dry=True), default_plugins())
    record(bundle, functions={name: signature_record(spec) for name, spec in designed.signatures.items()})


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------------------------------


def _json(name: str, change: Callable[[dict[str, Any]], None]) -> _Make:
    """Change a file of the tokenizer."""

    def make(bundle: Path, _patch: pytest.MonkeyPatch) -> None:
        path = bundle / "tokenizer" / name
        content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        change(content)
        write_json(path, content)
        record(bundle)

    return make


def _exchange(content: dict[str, Any]) -> None:
    """Exchange the ids of two ordinary tokens."""
    vocabulary = content["model"]["vocab"]
    one, other = list(vocabulary)[300:302]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]


def _exchange_added(content: dict[str, Any]) -> None:
    one, other = content["added_tokens"][:2]
    one["content"], other["content"] = other["content"], one["content"]
    vocabulary = content["model"]["vocab"]
    if one["content"] in vocabulary:
        vocabulary[one["content"]], vocabulary[other["content"]] = one["id"], other["id"]


def _one_far_beyond(content: dict[str, Any]) -> None:
    """Take the last token's place in the vocabulary for an added one whose id leaves a gap."""
    vocabulary = content["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.__getitem__)
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "".join(merge) != last]
    vocabulary[last] = 5000


def _exchange_merges(content: dict[str, Any]) -> None:
    merges = content["model"]["merges"]
    merges[:] = merges[::-1]


def _while_copying(bundle: Path, patch: pytest.MonkeyPatch) -> None:
    """In the function that copies: whoever makes the folder again makes the same."""
    copyfile = shutil.copyfile

    def copy(source: Path, target: Path) -> None:
        copyfile(source, target)
        if source.name == "tokenizer.json":
            content = json.loads(target.read_text(encoding="utf-8"))
            _exchange(content)
            write_json(target, content)

    patch.setattr(portable_tokenizer.shutil, "copyfile", copy)
    shutil.rmtree(bundle / "tokenizer")
    sample = find_entry(ENTRY, default_plugins())[0].sample_directory()
    portable_tokenizer.copy_tokenizer(sample, bundle / "tokenizer", default_plugins().tokenizer_classes())
    record(bundle)


def _ends_elsewhere(bundle: Path, patch: pytest.MonkeyPatch) -> None:
    """In the function that names the ends of a turn: build and check both go by it."""
    patch.setattr(portable_tokenizer, "_KEPT_IN_TEXT", portable_tokenizer.re.compile("im_end"))
    real = portable_tokenizer.end_tokens

    def ends(folder: Path) -> Any:
        found = real(folder)
        return evolve(found, tokens=tuple(evolve(end, text="<|endoftext|>", id=0) for end in found.tokens[:1]))

    patch.setattr(portable_tokenizer, "end_tokens", ends)
    shutil.rmtree(bundle / "tokenizer")
    sample = find_entry(ENTRY, default_plugins())[0].sample_directory()
    portable_tokenizer.copy_tokenizer(sample, bundle / "tokenizer", default_plugins().tokenizer_classes())
    record(bundle)


def _without_template(bundle: Path, _patch: pytest.MonkeyPatch) -> None:
    (bundle / "tokenizer" / "chat_template.jinja").unlink()
    record(bundle)


def _other_template(bundle: Path, _patch: pytest.MonkeyPatch) -> None:
    path = bundle / "tokenizer" / "chat_template.jinja"
    path.write_text(path.read_text(encoding="utf-8").replace("user", "User") + " ", encoding="utf-8")
    record(bundle)


# ---------------------------------------------------------------------------------------------------------------------
# Asset
# ---------------------------------------------------------------------------------------------------------------------

Array = np.ndarray[Any, Any]


def _stored(name: str, dtype: str, change: Callable[[Array], Array]) -> _Make:
    """Change the bytes of a stored constant, and the asset's own hash with them."""

    def make(bundle: Path, _patch: pytest.MonkeyPatch) -> None:
        asset = bundle / f"{NAME}.aimodel"
        blob = bytes(CoreAIBackend().constants(asset)[name])
        program = (asset / "main.mlirb").read_bytes()
        assert program.count(blob) == 1
        changed = change(np.frombuffer(blob, dtype)).astype(dtype).tobytes()
        assert changed != blob and len(changed) == len(blob)
        program = program.replace(blob, changed)
        (asset / "main.mlirb").write_bytes(program)
        (asset / "main.hash").write_bytes(hashlib.sha256(program).digest())
        record(bundle)

    return make


PRODUCT_MUTANTS: Sequence[ProductMutant] = (
    ProductMutant(
        "compression-fp16",
        "metadata",
        "`compression` says that nothing is quantized",
        "verify: weights",
        _metadata(_compression),
    ),
    ProductMutant(
        "named-after-another-recipe",
        "metadata",
        "name and record are those of int8lin, the weights of int8hu",
        "verify: weights",
        _metadata(_named_after_another_recipe),
    ),
    ProductMutant(
        "named-after-another-entry",
        "metadata",
        "the bundle bears the name of another entry",
        "verify: source",
        _metadata(_of_another_entry),
    ),
    ProductMutant(
        "model-definition",
        "metadata",
        "`model_definition` is another in the constant itself",
        "golden metadata",
        _model_definition,
    ),
    ProductMutant(
        "tokenizer-not-embedded",
        "metadata",
        "`embedded_tokenizer` is false",
        "verify: metadata",
        _metadata(lambda metadata, _: metadata["language"].update(embedded_tokenizer=False)),
    ),
    ProductMutant(
        "vocabulary-gone",
        "metadata",
        "`language.vocab_size` is left out",
        "verify: metadata",
        _metadata(lambda metadata, _: metadata["language"].pop("vocab_size")),
    ),
    ProductMutant(
        "null-key",
        "metadata",
        "a key that nobody asked for is null",
        "verify: metadata",
        _metadata(lambda metadata, _: metadata["language"].update(chat_template=None)),
    ),
    ProductMutant(
        "vocabulary-padded",
        "metadata",
        "`vocab_size` and the record are padded to 1,088",
        "verify: states",
        _metadata(_vocabulary),
    ),
    ProductMutant(
        "context-halved",
        "metadata",
        "`max_context_length` and the record say half of what the functions allow",
        "verify: source",
        _metadata(_context),
    ),
    ProductMutant(
        "conv-state-a-cache",
        "metadata",
        "convState is declared a KV cache",
        "verify: states",
        _metadata(_growing_state),
    ),
    ProductMutant(
        "recurrent-state-float32",
        "metadata",
        "recState is float32 in the overlay itself",
        "golden metadata",
        _wide_state,
    ),
    ProductMutant(
        "sample-not-marked", "metadata", "a sample does not say that it is one", "verify: metadata", _metadata(_sample)
    ),
    ProductMutant(
        "depth-of-another-model",
        "metadata",
        "build.json says 64 layers, by which a gate allows larger errors",
        "verify: source",
        _metadata(_depth),
    ),
    ProductMutant(
        "of-another-checkpoint",
        "metadata",
        "build.json has the digest of another config: nothing could be compared with the sample",
        "verify: source",
        _metadata(lambda _, build: build["source"].update(config_sha256="0" * 64)),
    ),
    ProductMutant(
        "differences-of-the-entry",
        "metadata",
        "build.json says that a bundle differs from its entry as it does not, by which a gate takes other bounds",
        "verify: source",
        _metadata(lambda _, build: build["entry"].update(differences=["layers is 8"])),
    ),
    ProductMutant(
        "router-of-a-dense-model",
        "metadata",
        "build.json says how many experts a dense model chooses, by which a gate allows router near-ties",
        "verify: source",
        _metadata(lambda _, build: build["facts"].update(experts_per_token=2)),
    ),
    ProductMutant(
        "role-of-no-weight",
        "metadata",
        "build.json has a role in int4 that no weight has, by which a gate takes the bounds of int4",
        "verify: source",
        _metadata(
            lambda _, build: build["recipe"]["roles"].update(
                extra={**build["recipe"]["roles"]["head"], "dtype": "int4"}
            )
        ),
    ),
    ProductMutant(
        "ids-exchanged",
        "tokenizer",
        "two ids are exchanged in the bundle's tokenizer",
        "verify: copy",
        _json("tokenizer.json", _exchange),
    ),
    ProductMutant(
        "ids-exchanged-while-copying",
        "tokenizer",
        "the function that copies exchanges two ids, each time",
        "verify: copy",
        _while_copying,
    ),
    ProductMutant(
        "ids-exchanged-for-the-gate",
        "tokenizer",
        "two ids are exchanged: oracle and candidate are fed the same wrong tokens",
        "gate: copy",
        _json("tokenizer.json", _exchange),
    ),
    ProductMutant(
        "added-tokens-exchanged",
        "tokenizer",
        "two special tokens bear each other's id",
        "verify: copy",
        _json("tokenizer.json", _exchange_added),
    ),
    ProductMutant(
        "merges-reversed",
        "tokenizer",
        "merges are in another order: the same tokens, other encodings",
        "verify: copy",
        _json("tokenizer.json", _exchange_merges),
    ),
    ProductMutant(
        "lower-cased",
        "tokenizer",
        "a normalizer is added",
        "verify: copy",
        _json("tokenizer.json", lambda content: content.update(normalizer={"type": "Lowercase"})),
    ),
    ProductMutant(
        "digits-apart",
        "tokenizer",
        "the pre-tokenizer takes digits one by one",
        "verify: copy",
        _json(
            "tokenizer.json",
            lambda content: content.update(
                pre_tokenizer={
                    "type": "Sequence",
                    "pretokenizers": [{"type": "Digits", "individual_digits": True}, content["pre_tokenizer"]],
                }
            ),
        ),
    ),
    ProductMutant(
        "eos-another-token",
        "tokenizer",
        "`eos_token` is that of the end of a text",
        "verify: copy",
        _json("tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>")),
    ),
    ProductMutant(
        "eos-another-token-for-the-gate",
        "tokenizer",
        "`eos_token` is that of the end of a text: no stop would be expected",
        "gate: copy",
        _json("tokenizer_config.json", lambda content: content.update(eos_token="<|endoftext|>")),
    ),
    ProductMutant(
        "end-of-turn-misread",
        "tokenizer",
        "what finds the ends of a turn gives another token, each time",
        "verify: copy",
        _ends_elsewhere,
    ),
    ProductMutant(
        "one-more-end",
        "tokenizer",
        "generation_config.json ends a turn at an ordinary token",
        "verify: copy",
        _json("generation_config.json", lambda content: content.update(eos_token_id=[2, 300])),
    ),
    ProductMutant(
        "id-beyond-the-logits",
        "tokenizer",
        "an added token has an id far beyond the others: as many tokens as logits, not one too many",
        "verify: tokenizer",
        _json("tokenizer.json", _one_far_beyond),
    ),
    ProductMutant("template-dropped", "tokenizer", "the chat template is left out", "verify: copy", _without_template),
    ProductMutant(
        "template-edited", "tokenizer", "the chat template names roles otherwise", "verify: copy", _other_template
    ),
    ProductMutant(
        "head-by-another-scheme",
        "asset",
        "the head clips its lowest integer; the name says that it does not",
        "verify: weights",
        _stored(f"{HEAD}.original", "int8", lambda codes: codes.clip(-127)),
    ),
    ProductMutant(
        "body-by-another-scheme",
        "asset",
        "a matrix of the body uses its lowest integer",
        "verify: weights",
        _stored(f"{BODY}.original", "int8", lambda codes: np.where(codes == -127, -128, codes)),
    ),
    ProductMutant(
        "scales-one-row-late",
        "asset",
        "each row of the head has the scales of the row before",
        "verify: logits",
        _stored(f"{HEAD}.0.scales", "float16", lambda scales: np.roll(scales, 5)),
    ),
    ProductMutant(
        "embedding-of-the-neighbour",
        "asset",
        "each id is looked up one row late",
        "verify: logits",
        _stored("model.embed_tokens.weight", "float16", lambda table: np.roll(table, 160)),
    ),
)


def table(mutants: Sequence[ProductMutant] = PRODUCT_MUTANTS) -> str:
    """The mutants as a table of Markdown, with what the weight store's fingerprint could forget."""
    from test_fingerprint import CHANGES

    rows = [(mutant.name, mutant.kind, mutant.mistake, mutant.caught_by) for mutant in mutants]
    for change, (_, known_to) in CHANGES.items():
        name = re.sub("[^a-z]+", "-", f"store: after {change}").strip("-")
        mistake = f"the fingerprint leaves out {' and '.join(sorted(known_to))}: what was stored before is used again"
        rows.append((name, "store", mistake, "test: fingerprint"))
    lines = [f"| `{name}` | {' | '.join(rest)} |" for name, *rest in rows]
    return "\n".join(["| mutant | of | mistake | caught by |", "|---|---|---|---|", *lines])


if __name__ == "__main__":
    print(table())
