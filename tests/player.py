"""An engine for bundles, written from the rules of Apple's engines and with nothing of this project.

It reads `metadata.json`, loads the asset on the Core AI runtime, and plays a conversation as those engines do: it finds
the function that decodes in `function_map`, and `prefill` by its name; allocates the key / value pair for 256 positions
and doubles it, without clearing what it adds; sends a prompt in chunks that are as even as can be, the last token to
the function that decodes; takes the most probable token; and zeroes all states at a reset.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
from coreai.authoring import AIModelAsset
from coreai.runtime import NDArray

FIRST_CAPACITY = 256
CHUNK = 2048  # of an engine that is told nothing


class Player:
    """A bundle that is loaded; a context manager.

    Attributes:
        calls: the name of each function that was called, with the number of tokens.
    """

    def __init__(self, bundle: Path) -> None:
        metadata = json.loads((bundle / "metadata.json").read_text(encoding="utf-8"))
        assert (metadata["metadata_version"], metadata["kind"]) == ("0.2", "llm")
        self._asset, self._language = bundle / metadata["assets"]["main"], metadata["language"]
        self._loop, self._open = asyncio.new_event_loop(), contextlib.AsyncExitStack()
        self.calls: list[tuple[str, int]] = []

    def __enter__(self) -> Self:
        loading = AIModelAsset.load(str(self._asset)).executable()
        model = self._loop.run_until_complete(self._open.enter_async_context(loading))
        self._decode_name = self._language["function_map"]["main"][0]
        self._decode = model.load_function(self._decode_name)
        self._prefill = model.load_function("prefill") if "prefill" in model.function_names else None
        inputs = self._decode.desc.input_names
        self._inputs = [inputs[0], inputs[1]]  # bound by their order
        assert len(inputs) == 2
        assert 2 <= len(self._decode.desc.state_names) <= 4
        if self._prefill is not None:
            assert not self._prefill.desc.output_names
        self.reset()
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.run_until_complete(self._open.aclose())
        self._loop.close()

    def reset(self) -> None:
        """Begin a conversation."""
        self._position = 0
        self._capacity = FIRST_CAPACITY
        self._states: dict[str, Any] = {}
        for place, name in enumerate(self._decode.desc.state_names):
            described = self._decode.desc.state_descriptor(name)
            shape = list(described.shape)
            if place < 2:
                assert len(shape) == 5 and [axis for axis, size in enumerate(shape) if size < 0] == [3]
                shape[3] = FIRST_CAPACITY
            assert "cache" not in name.lower() or place < 2
            self._states[name] = np.zeros(shape, str(described.dtype))

    def answer(self, prompt: Sequence[int], new_tokens: int) -> list[int]:
        """Read a prompt behind the conversation so far; the tokens of a greedy answer, the last of them unread."""
        first = 0
        if self._prefill is not None and len(prompt) > 1:
            size = self._language.get("prefill_chunk_size", CHUNK)
            count = -(-(len(prompt) - 1) // size)
            for chunk in np.array_split(np.array(prompt[:-1]), count):
                self._call("prefill", self._prefill, chunk.tolist())
            first = len(prompt) - 1
        for token in prompt[first:]:
            logits = self._call(self._decode_name, self._decode, [token])
        answer = [int(logits.argmax())]
        while len(answer) < new_tokens:
            answer.append(int(self._call(self._decode_name, self._decode, [answer[-1]]).argmax()))
        return answer

    def _call(self, name: str, function: Any, tokens: Sequence[int]) -> Any:
        """Feed tokens; the logits of the last one, where the function gives any."""
        self.calls.append((name, len(tokens)))
        self._position += len(tokens)
        while self._position > self._capacity:
            self._grow()
        values = ([list(tokens)], [list(range(self._position))])
        inputs = {key: NDArray(np.array(value, np.int32)) for key, value in zip(self._inputs, values, strict=True)}
        states = {key: NDArray(array) for key, array in self._states.items()}
        outputs = self._loop.run_until_complete(function(inputs, states))
        self._states = {key: np.array(array.numpy()) for key, array in states.items()}
        if not function.desc.output_names:
            return None
        logits = outputs[function.desc.output_names[0]].numpy()
        assert logits.ndim == 3 and logits.dtype == np.float16
        assert logits.shape[2] == self._language["vocab_size"]
        return logits[0, -1]

    def _grow(self) -> None:
        """Double the pair; what is added was never cleared."""
        self._capacity *= 2
        for name in list(self._states)[:2]:
            small = self._states[name]
            grown = np.full((*small.shape[:3], self._capacity, small.shape[4]), np.nan, small.dtype)
            grown[:, :, :, : small.shape[3]] = small
            self._states[name] = grown
