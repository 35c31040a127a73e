"""The choice of the next token: the most probable one, or one drawn from what filters leave.

The filters are transformers' own, so that they mean here what they mean there. They are imported where one is in use:
the most probable token needs neither them nor torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.generation_config import SETTINGS, StatedSampling, stated_sampling
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput, CheckFailed

Logits = np.ndarray[Any, Any]

# Dividing by less than this would overflow, and the most probable token is all that is left anyway.
_GREEDY = 1e-6

_FILTERS = ("top_p", "top_k", "min_p")


@frozen
class Sampling:
    """How the next token is chosen. Without arguments, it is the most probable one.

    Attributes:
        temperature: what logits are divided by; 0 for the most probable token.
        top_p: the most probable tokens that have this probability together are left; 1 for all.
        top_k: so many of the most probable tokens are left; 0 for all.
        min_p: tokens are left that have at least this part of the probability of the most probable one.
        repetition_penalty: what the logits of tokens are divided by, negative ones multiplied, that were there before.
        seed: of what draws one.

    Raises:
        BadInput: naming a value that is out of range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            if not setting.allows(value := getattr(self, name)):
                raise BadInput(f"A {setting.words} is {setting.allowed}, not {value}.")
        if self.seed < 0:
            raise BadInput(f"A seed is a whole number of at least 0, not {self.seed}.")

    @property
    def greedy(self) -> bool:
        """Whether it is always the most probable token."""
        return self.temperature < _GREEDY

    def in_use(self) -> dict[str, float]:
        """Every setting that changes the choice, the temperature among them, by name."""
        if self.greedy:
            return {} if self.repetition_penalty == 1 else {"repetition_penalty": self.repetition_penalty}
        used = {name: getattr(self, name) for name, setting in SETTINGS.items() if getattr(self, name) != setting.off}
        return {"temperature": self.temperature, **used}


# ---------------------------------------------------------------------------------------------------------------------
# What the checkpoint says, and what the user says
# ---------------------------------------------------------------------------------------------------------------------


def stated_by(bundle: Bundle) -> StatedSampling:
    """What the checkpoint of a bundle says of sampling: its file is beside the bundle's tokenizer."""
    return stated_sampling(bundle.tokenizer)


def sampling_of(stated: Mapping[str, Any], given: Mapping[str, Any], seed: int = 0) -> Sampling:
    """The sampling that was asked for, its other settings as the checkpoint states them.

    As in transformers, a checkpoint that does not say `do_sample` means the most probable token, whatever else it says;
    so does one that says no more than that, neither a temperature nor a filter. Who asks for a temperature or for a
    filter wants to sample; a temperature of 0 is the most probable token and nothing else.

    Args:
        stated: what the checkpoint says; see `stated_by`.
        given: what the user says, by the names of `SETTINGS`, without what was not said.
        seed: of what draws a token.

    Raises:
        BadInput: when a value is out of range.
    """
    settings = {name: value for name, value in stated.items() if name in SETTINGS}
    if given.get("temperature") == 0:
        return Sampling(**given, seed=seed)
    asked = "temperature" in given or any(given[name] != SETTINGS[name].off for name in _FILTERS if name in given)
    says_how = not settings.keys().isdisjoint({"temperature", *_FILTERS})
    if not asked and not (stated.get("do_sample") is True and says_how):
        return Sampling(**{**settings, **given, "temperature": 0.0}, seed=seed)
    return Sampling(**{"temperature": SETTINGS["temperature"].off, **settings, **given}, seed=seed)


def sentence(sampling: Sampling, stated: Mapping[str, Any], given: Mapping[str, Any]) -> str:
    """What of a sampling comes from the checkpoint, as a sentence; empty where nothing does."""
    used = sampling.in_use()
    asked = [_named(name, value) for name, value in used.items() if name in given]
    theirs = [_named(name, value) for name, value in used.items() if name not in given]
    if not theirs or not stated:
        return ""
    if sampling.greedy:
        return f"As the checkpoint says: the most probable token, {', '.join(theirs)}; --temperature 0 is without it."
    means = "--temperature 0 takes the most probable token."
    if not asked:
        return f"Sampling as the checkpoint says: {', '.join(theirs)}; {means}"
    return f"Sampling: {', '.join(asked)} as given, {', '.join(theirs)} as the checkpoint says; {means}"


def _named(name: str, value: float) -> str:
    return f"{SETTINGS[name].words} {value:g}"


# ---------------------------------------------------------------------------------------------------------------------
# The choice
# ---------------------------------------------------------------------------------------------------------------------


class Chooser:
    """Chooses tokens one after the other. The same sampling, seed included, makes the same choices."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)
        self._penalty, self._filters = _processors(sampling)

    def __call__(self, logits: Logits, tokens: Sequence[int]) -> int:
        """The next token.

        Args:
            logits: of every token, [V].
            tokens: the text so far, which a penalty for repetitions goes by.

        Raises:
            CheckFailed: when the logits are not finite.
        """
        if not np.isfinite(logits).all():
            raise CheckFailed("The bundle computed logits that are not finite.", "Gate it: `zoo gate BUNDLE`.")
        scores = self.scores(logits, tokens)
        if self.sampling.greedy:
            return int(scores.argmax())
        weights = np.exp(scores - scores.max())
        return int(self._random.choice(len(weights), p=weights / weights.sum()))

    def scores(self, logits: Logits, tokens: Sequence[int]) -> Logits:
        """The logits after penalty, temperature and filters, float64 [V]; minus infinity of what is filtered out."""
        scores = self._penalty(logits.astype(np.float64), tokens)
        return scores if self.sampling.greedy else self._filters(scores / self.sampling.temperature, tokens)


Process = Callable[[Logits, Sequence[int]], Logits]


def _processors(sampling: Sampling) -> tuple[Process, Process]:
    """The penalty for repetitions and the filters of a sampling, as functions from scores [V] and the text so far."""
    used = sampling.in_use().keys() - {"temperature"}
    if not used:
        return _unchanged, _unchanged
    with quiet_transformers():
        from transformers.generation import logits_process

    # In the order in which transformers applies them, the temperature before all filters.
    filters = (("top_k", "TopKLogitsWarper"), ("top_p", "TopPLogitsWarper"), ("min_p", "MinPLogitsWarper"))
    penalty = (("repetition_penalty", "RepetitionPenaltyLogitsProcessor"),)
    one, other = (
        [getattr(logits_process, kind)(getattr(sampling, name)) for name, kind in each if name in used]
        for each in (penalty, filters)
    )
    return _in_a_row(one), _in_a_row(other)


def _unchanged(scores: Logits, _tokens: Sequence[int]) -> Logits:
    return scores


def _in_a_row(processors: Sequence[Any]) -> Process:
    """One function for several of transformers' processors, which take and give tensors of a batch."""
    if not processors:
        return _unchanged

    def process(scores: Logits, tokens: Sequence[int]) -> Logits:
        import torch

        batch, read = torch.from_numpy(scores)[None], torch.tensor([list(tokens)])
        for processor in processors:
            batch = processor(read, batch)
        processed: Logits = batch[0].numpy()
        return processed

    return process
