"""Text from a bundle: its tokenizer, its asset, and the greedy choice or sampling of each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from attrs import frozen

from coreai_zoo.backend import Backend
from coreai_zoo.bundle.bundle import Bundle
from coreai_zoo.checkpoint.tokenizer import load_tokenizer, quiet_transformers
from coreai_zoo.errors import BadInput, CheckFailed
from coreai_zoo.json_files import read_object

# Dividing by less than this would overflow, and the most probable token is all that is left anyway.
_GREEDY = 1e-6


@frozen
class Sampling:
    """The choice of the next token.

    Attributes:
        temperature: 0 for the most probable token.
        seed: seed of the sampler.
    """

    temperature: float = 0.0
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise BadInput(f"A temperature is a number of at least 0, not {self.temperature}.")


def generate(
    bundle: Bundle, backend: Backend, prompt: str, new_tokens: int, sampling: Sampling | None = None
) -> Iterator[str]:
    """Text piece by piece as it is generated, up to `new_tokens` tokens, the end of turn, or the end of the context.

    Raises:
        BadInput: when the prompt is empty or does not fit the context.
    """
    from tokenizers.decoders import DecodeStream

    tokenizer = load_tokenizer(bundle.tokenizer)
    prompt_tokens = tokenizer.encode(prompt).ids
    if not prompt_tokens:
        raise BadInput("The prompt is empty.", 'Give one with -p "...".')
    if len(prompt_tokens) >= bundle.max_context:
        raise BadInput(f"The prompt is {len(prompt_tokens)} tokens, this bundle's context is {bundle.max_context}.")
    stop = end_of_turn(bundle, tokenizer)
    choose = _chooser(sampling or Sampling())
    stream = DecodeStream(skip_special_tokens=True)
    capacity = min(bundle.max_context, len(prompt_tokens) + new_tokens)
    with backend.stepper(bundle.asset, bundle.functions, capacity) as stepper:
        for token in prompt_tokens:
            logits = stepper.step(token)
        for left in range(capacity - len(prompt_tokens), 0, -1):
            token = choose(logits)
            if token == stop:
                return
            # The stream holds back bytes that are not yet a whole character.
            yield stream.step(tokenizer, token) or ""
            if left > 1:
                logits = stepper.step(token)


def chat_prompt(bundle: Bundle, message: str) -> str:
    """One user message in the bundle's chat template, up to where the assistant begins.

    Raises:
        BadInput: when the bundle has no chat template.
    """
    return chat_text(bundle, [("user", message)], answer_follows=True)


def chat_text(bundle: Bundle, turns: Sequence[tuple[str, str]], *, answer_follows: bool = False) -> str:
    """(role, content) turns in the bundle's chat template, with the beginning of the next answer where asked for.

    Raises:
        BadInput: when the bundle has no chat template.
    """
    tokenizer = _transformers_tokenizer(bundle)
    if not tokenizer.chat_template:
        raise BadInput(f"{bundle.directory.name} has no chat template.", "Leave out --chat.")
    messages = [{"role": role, "content": content} for role, content in turns]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer_follows))


def has_chat_template(bundle: Bundle) -> bool:
    """Whether the bundle's tokenizer can render a chat."""
    return bool(_transformers_tokenizer(bundle).chat_template)


def _transformers_tokenizer(bundle: Bundle) -> Any:
    """The bundle's tokenizer as transformers reads it, which knows chat templates."""
    read_object(bundle.tokenizer / "tokenizer_config.json")  # says what is wrong with it better than transformers
    with quiet_transformers():
        from transformers import PreTrainedTokenizerFast

        return PreTrainedTokenizerFast.from_pretrained(str(bundle.tokenizer))


def end_of_turn(bundle: Bundle, tokenizer: Any) -> int | None:
    """Id of the tokenizer's end-of-turn token; engines read it from the tokenizer, never from generation_config."""
    config = read_object(bundle.tokenizer / "tokenizer_config.json")
    token = config.get("eos_token")
    content = token.get("content") if isinstance(token, dict) else token
    found: int | None = tokenizer.token_to_id(content) if content else None
    return found


def _chooser(sampling: Sampling) -> Callable[[np.ndarray[Any, Any]], int]:
    """A function from logits [V] to the next token."""
    generator = np.random.default_rng(sampling.seed)

    def choose(logits: np.ndarray[Any, Any]) -> int:
        if not np.isfinite(logits).all():
            raise CheckFailed("The bundle computed logits that are not finite.", "Gate it: `zoo gate BUNDLE`.")
        if sampling.temperature < _GREEDY:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / sampling.temperature
        weights = np.exp(scaled - scaled.max())
        return int(generator.choice(len(weights), p=weights / weights.sum()))

    return choose
