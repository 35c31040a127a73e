"""The host's own plugin: the backends, recipes, contracts and classes of tokenizers that come with it."""

from __future__ import annotations

from collections.abc import Iterable

from coreai_zoo import hookimpl
from coreai_zoo.backend import Backend
from coreai_zoo.contracts import CONTRACTS, Contract
from coreai_zoo.overlay import TokenizerClass
from coreai_zoo.recipe_files import RECIPES
from coreai_zoo.recipes import Recipe


@hookimpl
def zoo_recipes() -> Iterable[Recipe]:
    """Unquantized, int8 and int4."""
    return RECIPES.values()


@hookimpl
def zoo_contracts() -> Iterable[Contract]:
    """A contract for each engine that the backends write for."""
    return CONTRACTS.values()


@hookimpl
def zoo_tokenizer_classes() -> Iterable[TokenizerClass]:
    """The classes that are registered in swift-transformers, so that a Mac can load them."""
    return [TokenizerClass(name) for name in ("Qwen2Tokenizer", "PreTrainedTokenizer", "TokenizersBackend")]


@hookimpl
def zoo_backends() -> Iterable[Backend]:
    """Core AI and Core ML."""
    from coreai_zoo.backends.coreai.backend import CoreAIBackend
    from coreai_zoo.backends.coreml.backend import CoreMLBackend

    return (CoreAIBackend(), CoreMLBackend())
