"""Make a checkpoint of an entry's true shapes without its weights.

    python benchmarks/synthetic_checkpoint.py qwen3.6-27b --fill sparse -o /tmp/27b
    python benchmarks/synthetic_checkpoint.py qwen3.6-27b --layers 4 --vocab 8192 --fill random -o /tmp/27b-4
    python benchmarks/synthetic_checkpoint.py --config DIR_OR_FILE --fill random -o /tmp/other

Sharded bf16 safetensors with an index, keys and layout as released (text under ``model.language_model.``, experts
packed). It builds with ``--custom`` where it is smaller than the entry's model (``--layers``, ``--vocab``). ``random``
holds seeded normal values. ``sparse`` files are holes that read as zeros and take next to no disk, but for the first
page of each tensor, which is random too: no two tensors are equal, or the compiler would store them once. Norm gains
are zero (gain one), so that a random model of any depth stays finite.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from attrs import evolve, frozen

from coreai_zoo.build.model import config_of_entry
from coreai_zoo.catalogue import find_entry, load_entries
from coreai_zoo.cli.app import exit_with
from coreai_zoo.contracts import STATIC_S1
from coreai_zoo.errors import BadInput, ZooError
from coreai_zoo.json_files import read_object
from coreai_zoo.lowering.module import build_module, parameters_of
from coreai_zoo.overlay import Prefix, WeightMap
from coreai_zoo.plugins import Plugins, default_plugins

SHARD_BYTES = 4 * 2**30
CHUNK = 1 << 22  # values written at a time
STAMP = 2048  # values at the start of a sparse tensor that are not zero: a page
SEED = 20260


@frozen
class Tensor:
    """A tensor to write: its key in the checkpoint, shape, and whether its values are drawn or zero."""

    key: str
    shape: tuple[int, ...]
    random: bool

    @property
    def values(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape))


def tensors_of(hf_config: Mapping[str, Any], plugins: Plugins) -> list[Tensor]:
    """Every text tensor of a released checkpoint with this config, by running the overlay's weight map backwards."""
    overlay, _ = plugins.claim_overlay(str(hf_config["model_type"]), hf_config)
    config = overlay.read_config(hf_config)
    module = build_module(lambda: overlay.decoder(config, STATIC_S1), [])
    _, table = plugins.weight_map(overlay, None, config)
    parameters = parameters_of(module)
    tensors = {tensor.key: tensor for name, info in parameters.items() for tensor in _sources(name, info.shape, table)}
    return list(tensors.values())


def _sources(name: str, shape: tuple[int, ...], table: WeightMap) -> Iterator[Tensor]:
    import re

    for rule in table.rules:
        pattern = re.sub(r"\\{(\w+)\\}", r"(?P<\1>\\d+)", re.escape(rule.target))
        match = re.fullmatch(pattern, name)
        if match and rule.part is None:
            released = table.prefixes[0] if table.prefixes else Prefix("", "")
            key = rule.source.format(**match.groupdict())
            if released.meant and key.startswith(released.meant):
                key = released.found + key.removeprefix(released.meant)
            stored = rule.source_shape(shape) if rule.source_shape else shape
            yield Tensor(key, stored, random=rule.role != "norm")
            return
    raise LookupError(f"no rule of the weight map fills {name}")


def shards_of(tensors: list[Tensor], most: int = SHARD_BYTES) -> list[list[Tensor]]:
    """The tensors in files of at most so many bytes, or of one tensor."""
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(2 * other.values for other in shards[-1]) + 2 * tensor.values > most:
            shards.append([])
        shards[-1].append(tensor)
    return shards


def write_shard(path: Path, tensors: list[Tensor], fill: str, rng: np.random.Generator) -> None:
    """Write one safetensors file; with `sparse` little but the header touches the disk."""
    header, offset = {}, 0
    for tensor in tensors:
        end = offset + 2 * tensor.values
        header[tensor.key] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        start = file.tell()
        file.truncate(start + offset)
        for tensor in tensors:
            if tensor.random:
                file.seek(start + header[tensor.key]["data_offsets"][0])
                _write_random(file, tensor, tensor.values if fill == "random" else min(STAMP, tensor.values), rng)


def _write_random(file: Any, tensor: Tensor, count: int, rng: np.random.Generator) -> None:
    """`count` normal values, cut to bf16, at the scale that keeps a linear layer's output near its input's."""
    scale = np.float32(1.0 / np.sqrt(tensor.shape[-1]) if len(tensor.shape) > 1 else 0.5)
    for begin in range(0, count, CHUNK):
        values = rng.standard_normal(min(CHUNK, count - begin), dtype=np.float32) * scale
        file.write((values.view(np.uint32) >> 16).astype("<u2").tobytes())


def write_checkpoint(
    hf_config: Mapping[str, Any],
    tokenizer: Path,
    fill: str,
    output: Path,
    plugins: Plugins,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the whole checkpoint; the bytes of its tensors."""
    rng, shards = np.random.default_rng(SEED), shards_of(tensors_of(hf_config, plugins), shard_bytes)
    output.mkdir(parents=True)
    names = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        write_shard(output / name, shard, fill, rng)
        names |= {tensor.key: name for tensor in shard}
    total = sum(2 * tensor.values for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": names}
    (output / "model.safetensors.index.json").write_text(json.dumps(index))
    (output / "config.json").write_text(json.dumps(hf_config, indent=2))
    for file in tokenizer.iterdir():
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copyfile(file, output / file.name)
    return total


def main() -> None:
    """Parse the command line and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entry", nargs="?", help="whose shapes")
    parser.add_argument("--config", type=Path, help="a config.json, or a folder with one, instead of an entry")
    parser.add_argument("--layers", type=int, help="only the first N layers")
    parser.add_argument("--vocab", type=int, help="another vocabulary size")
    parser.add_argument("--shard-gib", type=float, default=SHARD_BYTES / 2**30, help="size of a file at most [4]")
    parser.add_argument("--fill", choices=("random", "sparse"), default="random")
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.output.exists():
        parser.error(f"{arguments.output} exists")
    if not arguments.config and not arguments.entry:
        parser.error("name an entry, or give --config")
    try:
        hf_config, tokenizer = shapes(arguments, default_plugins())
        most = int(arguments.shard_gib * 2**30)
        total = write_checkpoint(hf_config, tokenizer, arguments.fill, arguments.output, default_plugins(), most)
    except ZooError as error:
        exit_with(error)
    print(f"{arguments.output}: {total:,} bytes of tensors")


def shapes(arguments: argparse.Namespace, plugins: Plugins) -> tuple[dict[str, Any], Path]:
    """The config of what is asked for, and the folder of a tokenizer for it."""
    entry = find_entry(arguments.entry, plugins)[0] if arguments.entry else None
    if arguments.config:
        hf_config = read_object(arguments.config / "config.json" if arguments.config.is_dir() else arguments.config)
    else:
        assert entry is not None
        facts = evolve(entry.facts, vocab_size=arguments.vocab or entry.facts.vocab_size)
        hf_config = dict(config_of_entry(evolve(entry, facts=facts), plugins))
    if arguments.layers:
        overlay, _ = plugins.claim_overlay(str(hf_config.get("model_type")), hf_config)
        hf_config = overlay.with_layers(hf_config, arguments.layers)
        # The result is a checkpoint of its own, not a slice of a larger one.
        hf_config.get("text_config", hf_config).pop("zoo_sliced_from", None)
    # A miniature's vocabulary is part of any. An entry without one borrows another's: what is measured reads no text.
    candidates = [*([] if entry is None else [entry]), *(each for each, _ in load_entries(plugins).values())]
    lender = next((each for each in candidates if each.sample is not None), None)
    if lender is None:
        raise BadInput("No installed entry has a sample, whose tokenizer the checkpoint would get.")
    return hf_config, lender.sample_directory()


if __name__ == "__main__":
    main()
