"""`zoo` in a process or in this one, with the toy of tests/toy_plugin.py as the only architecture.

python tests/toys.py ENTRY.toml build toy-mean --checkpoint DIR
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from safetensors.torch import save_file

import toy_plugin
from coreai_zoo.backends import builtin
from coreai_zoo.cli.app import cli
from coreai_zoo.plugins import Plugins
from test_toy_plugin import CONFIG, ENTRY, checkpoint_tensors, write_tokenizer


def write_entry(path: Path) -> Path:
    """The toy's entry with all of its facts, so that it is planned without a checkpoint."""
    sizes = "".join(f"{name} = {CONFIG[name]}\n" for name in ("heads", "kv_heads", "head_dim", "max_context_length"))
    path.write_text(ENTRY.replace("[facts]\n", f"[facts]\n{sizes}"), encoding="utf-8")
    return path


def write_checkpoint(folder: Path) -> Path:
    """A checkpoint of the toy with random weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    save_file(checkpoint_tensors(), folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def host(plugin: toy_plugin.ToyPlugin) -> Plugins:
    """The zoo's own backends, and the toy."""
    plugins = Plugins()
    plugins.register(builtin, "coreai")
    plugins.register(plugin, "toys")
    return plugins


def main() -> None:
    """`zoo`, with the entry that is the first argument."""
    entry, *arguments = sys.argv[1:]
    cli.main(arguments, prog_name="zoo", obj=host(toy_plugin.ToyPlugin(Path(entry))))


if __name__ == "__main__":
    main()
