"""Every hook of the zoo: the contract between host and plugins, and nothing else.

A plugin is a module or object with functions of these names, decorated with `coreai_zoo.hookimpl` and advertised in the
entry-point group `coreai_zoo`. Hooks only register; behaviour lives in what they return. All results are collected and
checked by the host, which names the plugin and the hook in every error. A hook may be given fewer arguments than it is
listed with here: an implementation takes those that it needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy

from coreai_zoo.overlay import LayerRewrite, Overlay, TokenizerClass, WeightMap
from coreai_zoo.recipes import HeadQuantization, Recipe
from coreai_zoo.signature import StateSpec, TraceSpec

if TYPE_CHECKING:
    import click

    from coreai_zoo.backend import Backend
    from coreai_zoo.bounds import MeasuredBounds
    from coreai_zoo.contracts import Contract
    from coreai_zoo.entry import Entry
    from coreai_zoo.gate import Gate, ReferenceModel
    from coreai_zoo.stress import StressSample

hookspec = pluggy.HookspecMarker("coreai_zoo")
hookimpl = pluggy.HookimplMarker("coreai_zoo")

# ---------------------------------------------------------------------------------------------------------------------
# At start-up: what there is to build
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def zoo_entries() -> Iterable[Path]:
    """Entry files (TOML, one entry each) that the plugin brings.

    Called once, by any command that names an entry. Must not import torch: `zoo list` answers in half a second.

    Returns:
        Paths. All plugins' are collected; one name from two plugins is an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_recipes() -> Iterable[Recipe]:
    """Recipes that a build can be asked for with `--recipe`, or by an entry.

    Called by any command that names a recipe. Must not import torch.

    Returns:
        Recipes. All plugins' are collected; one name from two plugins is an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_contracts() -> Iterable[Contract]:
    """Engine contracts that a build can be asked for with `--contract`, or by an entry.

    Called by any command that names a contract. Must not import torch.

    Returns:
        Contracts. All plugins' are collected; one name from two plugins is an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_register_commands(cli: click.Group) -> None:
    """Add subcommands to `zoo`.

    Called once, before the command line is parsed. Must not import torch.

    Args:
        cli: the click group; use `cli.add_command`. Replacing an existing command is an error.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Resolving a build: which overlay, in which form
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def zoo_claim_overlay(model_type: str, hf_config: Mapping[str, Any]) -> Overlay | None:
    """Claim an architecture.

    Called when a checkpoint is resolved.

    Args:
        model_type: the `model_type` of `config.json`.
        hf_config: the whole of it.

    Returns:
        The overlay, or None. Exactly one plugin must claim; two claims are an error that names both, unless one
        overlay `refines` the other: then it wins.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_layer_rewrites(
    overlay: Overlay, entry: Entry | None, config: Any, contract: Contract, function: TraceSpec
) -> Iterable[LayerRewrite]:
    """Replace layers of the overlay's decoder: by the form that a contract needs, or by what a sibling has there.

    Called for each function of the contract, before weights are planned.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        entry: the entry that is built, or None for a bare checkpoint.
        config: what its `read_config` returned.
        contract: the engine contract of this build.
        function: the signature of the function whose decoder it is. Each function of a contract is asked for.

    Returns:
        Rewrites. All plugins' are collected; two on one layer are an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_extra_states(overlay: Overlay, entry: Entry | None, config: Any, contract: Contract) -> Iterable[StateSpec]:
    """States that a step carries besides the key / value pair.

    Called when the function's signature is made.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        entry: the entry that is built, or None for a bare checkpoint.
        config: what its `read_config` returned.
        contract: the engine contract of this build.

    Returns:
        Specs, in the order in which the decoder takes them after the KV pair. Plugins answer in registration order.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_weight_map(overlay: Overlay, entry: Entry | None, config: Any) -> WeightMap | None:
    """The table from checkpoint keys to the decoder's parameters.

    Called when weights are planned.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        entry: the entry that is built, or None for a bare checkpoint.
        config: what its `read_config` returned.

    Returns:
        The table or None. The first plugin that answers wins, the last registered asked first: the zoo's own plugins
        are registered before all others, so yours has precedence over them.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_head_quantization(overlay: Overlay, entry: Entry | None, config: Any) -> HeadQuantization | None:
    """How the output projection is quantized when the recipe quantizes it.

    Called when the recipe is resolved. Without an answer the recipe's own spec for the head stands.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        entry: the entry that is built, or None for a bare checkpoint.
        config: what the overlay's `read_config` returned.

    Returns:
        The policy with its reason, or None. The first plugin that answers wins, the last registered asked first: the
        zoo's own plugins are registered before all others, so yours has precedence over them.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_tokenizer_classes() -> Iterable[TokenizerClass]:
    """Classes of tokenizers that engines can use, by their own name or by that of another class.

    Called when a checkpoint's tokenizer is checked or copied, and when a bundle is verified. Must not import torch.

    Returns:
        Classes. All plugins' are collected; two that disagree on one class are an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


# ---------------------------------------------------------------------------------------------------------------------
# Writing and judging a bundle
# ---------------------------------------------------------------------------------------------------------------------


@hookspec
def zoo_backends() -> Iterable[Backend]:
    """Targets that a bundle can be written for.

    Called when a build is resolved. The toolchain behind a backend must be imported only when the backend is used.

    Returns:
        Backends. All plugins' are collected; one name from two plugins is an error that names both.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_oracle(overlay: Overlay, hf_config: Mapping[str, Any]) -> ReferenceModel | None:
    """How the oracle makes the reference model of an architecture that transformers' Auto classes do not know.

    Called by whatever compares with the oracle, `zoo gate` first of all. Without an answer the oracle is transformers'
    own class for the config. What makes the model must never be the overlay: the gate would compare it with itself.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        hf_config: the checkpoint's `config.json`, or that of a slice of it.

    Returns:
        What makes the model, or None. The first plugin that answers wins, the last registered asked first: the zoo's
        own plugins are registered before all others, so yours has precedence over them.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_gate_bounds(overlay: Overlay) -> MeasuredBounds | None:
    """Bounds on errors, measured on untouched models of the overlay's family.

    Called by `zoo gate`. Without an answer the host's general, looser bounds hold.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.

    Returns:
        What was measured and where, or None. The first plugin that answers wins, the last registered asked first: the
        zoo's own plugins are registered before all others, so yours has precedence over them.

    .. versionadded:: 0.1
    """
    raise NotImplementedError


@hookspec
def zoo_stress_samples(overlay: Overlay, config: Any) -> Iterable[StressSample]:
    """Changes of the family's samples that make a mistake in one step of the arithmetic show.

    Called by `zoo check` for each sample that an entry names. Must not import torch: the changes do.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        config: what its `read_config` returned of the sample.

    Returns:
        Stress samples. All plugins' are collected and run; two of one name are an error that names both.

    .. versionadded:: 0.2
    """
    raise NotImplementedError


@hookspec
def zoo_gates(overlay: Overlay, entry: Entry | None) -> Iterable[Gate]:
    """Gates to run on a bundle besides the host's teacher-forced one.

    Called by `zoo gate`.

    Args:
        overlay: the overlay that was claimed. Check `overlay.name` before you answer.
        entry: the entry that was built, or None for a bare checkpoint.

    Returns:
        Gates. All plugins' are collected and run; any that fails makes the verdict fail.

    .. versionadded:: 0.1
    """
    raise NotImplementedError
