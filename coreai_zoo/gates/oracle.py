"""The oracle: Hugging Face's own implementation on the checkpoint itself, one layer in memory at a time.

A cache on disk can keep what it computes for a prompt, under a name made of everything that determines the result.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import numpy as np
from attrs import field, frozen
from attrs.validators import in_

from coreai_zoo.build.code import code_digest
from coreai_zoo.build.design import Design
from coreai_zoo.cache import cache_folder
from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.digest import source_digests
from coreai_zoo.gate import Activations, ReferenceModel

_log = logging.getLogger(__name__)

_CODE = (
    "coreai_zoo.checkpoint.files",
    "coreai_zoo.checkpoint.fp8",
    "coreai_zoo.checkpoint.headers",
    "coreai_zoo.checkpoint.originals",
    "coreai_zoo.dtypes",
    "coreai_zoo.gates.huggingface",
    "coreai_zoo.gates.oracle",
    "coreai_zoo.gates.peaks",
)
"""The modules that a result goes through on its way from a checkpoint to the cache; the rest is transformers."""


def default_cache() -> Path:
    """The folder where results are kept."""
    return cache_folder() / "oracle"


@frozen
class Oracle:
    """transformers on a checkpoint; see `coreai_zoo.gate.Model`.

    Attributes:
        checkpoint: the weights that it computes with.
        hf_config: the checkpoint's config, or the config of a slice of it.
        dtype: the precision in which it computes; weights are converted to it.
        cache: folder of kept results; None to compute always and keep nothing.
        on_layer: called after each layer that is computed; never when the result was kept.
        reference: how the model is made; None for transformers' own class for the config.
        respelled: checkpoint keys that the class does not know as they are written, as it knows them.
    """

    checkpoint: Checkpoint
    hf_config: Mapping[str, Any]
    dtype: Literal["float32", "bfloat16"] = field(default="float32", validator=in_(("float32", "bfloat16")))
    cache: Path | None = None
    on_layer: Callable[[], None] = lambda: None
    reference: ReferenceModel | None = None
    respelled: Mapping[str, str] = field(factory=dict)

    @classmethod
    def of(cls, designed: Design, checkpoint: Checkpoint, **options: Any) -> Oracle:
        """The oracle on the model of a design; `options` are of the other attributes."""
        config = designed.model.hf_config
        reference = designed.decoders.plugins.oracle(designed.model.overlay, config)
        return cls(checkpoint, config, reference=reference, respelled=designed.weights.respelled, **options)

    @property
    def name(self) -> str:
        """The implementation and its precision, for the report."""
        transformers = f"Hugging Face transformers {metadata.version('transformers')}"
        return f"{transformers if self.reference is None else self.reference.name} in {self.dtype}"

    def run(self, tokens: Sequence[int]) -> Activations:
        """Teacher-forced logits, hidden states and router logits, all float32, and the largest values on the way.

        Raises:
            BadInput: when transformers cannot make the model, or finds a parameter that the checkpoint does not fill.
        """
        identity = self.identity(tokens)
        path = None if self.cache is None else self.cache / f"{_digest(identity)}.npz"
        kept = None if path is None else _read(path, identity, self.hf_config)
        if kept is not None:
            return kept
        import torch

        from coreai_zoo.gates.huggingface import StreamedCausalLM

        dtype = getattr(torch, self.dtype)
        model = StreamedCausalLM(self.checkpoint, self.hf_config, dtype, self.reference, self.respelled)
        result = model.run(tokens, self.on_layer)
        if path is not None:
            _write(path, identity, result)
        return result

    def is_cached(self, tokens: Sequence[int]) -> bool:
        """Whether the result of a prompt is kept and readable."""
        identity = self.identity(tokens)
        path = None if self.cache is None else self.cache / f"{_digest(identity)}.npz"
        return path is not None and _read(path, identity, self.hf_config) is not None

    def identity(self, tokens: Sequence[int]) -> dict[str, Any]:
        """Everything that determines the result, as JSON.

        The files' stamps are in it because values are not read: two fine-tunes of one model differ in nothing else.
        """
        made_by = self.reference and {"name": self.reference.name, "code_sha256": code_digest(self.reference.make)}
        return {
            "code": source_digests(_CODE),
            "checkpoint": self.checkpoint.identity(),
            "stamps": [list(header.stamp) for header in self.checkpoint.headers],
            "config": dict(self.hf_config),
            "tokens": list(tokens),
            "dtype": self.dtype,
            "versions": {name: metadata.version(name) for name in ("transformers", "torch")},
            **({"reference": made_by} if made_by else {}),
            **({"respelled": dict(self.respelled)} if self.respelled else {}),
        }


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def _digest(identity: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _read(path: Path, identity: Mapping[str, Any], hf_config: Mapping[str, Any]) -> Activations | None:
    """A kept result; None when there is none, it is damaged, or a gate would check less by it than by a new one.

    Each array has a checksum, which reading checks.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if json.loads(str(arrays["identity"])) != json.loads(json.dumps(identity)):
            raise ValueError("it is of something else")
        counts = arrays["counts"].tolist()
        hidden, routers = (
            [arrays[f"{kind}_{index}"] for index in range(count)] if count else None
            for kind, count in zip(("hidden", "router"), counts, strict=True)
        )
        result = Activations(arrays["logits"], hidden, routers, json.loads(str(arrays["peaks"])))
        _require_complete(result, len(identity["tokens"]), hf_config)
        return result
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        _log.warning("The kept oracle %s is damaged (%s) and computed again.", path, error)
        return None


def _require_complete(result: Activations, positions: int, hf_config: Mapping[str, Any]) -> None:
    """Refuse a result without all that a run gives: what is not there, nothing is held to and nobody is warned of.

    Raises:
        ValueError: saying what is missing.
    """
    nested = hf_config.get("text_config")
    config = nested if isinstance(nested, Mapping) else hf_config
    layers = config.get("num_hidden_layers")
    hidden, routers = result.hidden or [], result.router_logits or []
    if len(hidden) < 2 or (isinstance(layers, int) and len(hidden) != layers + 1):
        raise ValueError(f"it has {len(hidden)} hidden states, not one for the embedding and each layer")
    if config.get("num_experts_per_tok") and not routers:
        raise ValueError("it has no router logits, and the model has routers")
    if len(result.peaks or {}) < len(hidden):  # there is one for each of them, and more
        raise ValueError("it has no largest value of each layer")
    short = [array.shape for array in (result.logits, *hidden, *routers) if array.ndim != 2 or len(array) != positions]
    if short:
        raise ValueError(f"an array is {short[0]}, of {positions} tokens")


def _write(path: Path, identity: Mapping[str, Any], result: Activations) -> None:
    """Keep a result. One that cannot be kept is computed again next time, so that is no error."""
    lists = {"hidden": result.hidden or (), "router": result.router_logits or ()}
    arrays = {f"{kind}_{index}": array for kind, arrays in lists.items() for index, array in enumerate(arrays)}
    counts = np.array([len(arrays) for arrays in lists.values()])
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".", suffix=".partial", delete=False) as file:
            temporary = Path(file.name)
            text, peaks = np.array(json.dumps(identity)), np.array(json.dumps(dict(result.peaks or {})))
            # The stubs take any keyword for the one that allows pickles.
            np.savez(file, identity=text, counts=counts, peaks=peaks, logits=result.logits, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _log.warning("The oracle's result cannot be kept in %s: %s.", path.parent, error.strerror or error)
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink()
