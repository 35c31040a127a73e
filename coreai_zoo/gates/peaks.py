"""The largest absolute values that a model of transformers computes on a prompt, seen without a change of the result.

What a layer's parts add to the residual stream is seen by hooks. The states are seen on their way into a cache that
keeps none of them: a layer is handed back what it gave, which is what it goes on with where there is no cache. So a
recurrent state is seen as it is after the prompt, keys, values and what goes into a convolution at every position.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor, nn

RESIDUAL_STREAM = "residual stream"
_CACHE_ARGUMENTS = ("cache", "past_key_values")  # as transformers calls it, and as it called it before


class Peaks:
    """The largest |value| of each place that was seen, collected while a model runs.

    Attributes:
        found: by the place, first seen first: `embedding`; `PATH`, the output of the module there;
            `PATH: residual stream`, after a layer; `PATH: keys` and so on, states of the layer there. One that is not
            a number stays so.
        running: the path of the layer that runs.
    """

    def __init__(self) -> None:
        self.found: dict[str, float] = {}
        self.running = ""

    def see(self, place: str, tensor: Tensor) -> None:
        """Count the values of a tensor, none of which is copied."""
        if not tensor.numel():
            return
        low, high = (float(end) for end in tensor.aminmax())
        # NumPy's maximum keeps a NaN, where Python's depends on the order.
        self.found[place] = float(np.maximum.reduce([self.found.get(place, 0.0), -low, high]))

    def watch(self, path: str, layer: nn.Module) -> Iterator[Callable[[], None]]:
        """See what the parts of a layer compute; gives what ends that. A norm's output is of a size that it chooses."""
        for name, part in layer.named_children():
            if "norm" not in f"{name} {type(part).__name__}".lower():
                yield part.register_forward_hook(self._saw(f"{path}.{name}")).remove

    def _saw(self, place: str) -> Callable[..., None]:
        def look(_module: nn.Module, _arguments: object, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, Tensor) and value.is_floating_point():
                self.see(place, value)

        return look

    def cache_for(self, model: Any, layers: Iterable[nn.Module]) -> dict[str, Any]:
        """The arguments with which a model shows its states; those of no cache where the result might depend on one."""
        name = next((name for name in _CACHE_ARGUMENTS if name in inspect.signature(model.forward).parameters), None)
        # The generation mixin's word for whether transformers' own cache serves a class.
        serves = getattr(model, "_supports_default_dynamic_cache", lambda: False)
        if name is None or not serves() or not all(map(only_updates_caches, layers)):
            return {"use_cache": False}
        from transformers import DynamicCache

        cache: Any = DynamicCache(config=model.config)
        cache.update, cache.update_conv_state = self._keys_and_values, self._state("convolution state")
        cache.update_recurrent_state = self._state("recurrent state")
        return {name: cache, "use_cache": True}

    def _keys_and_values(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        self.see(f"{self.running}: keys", keys)
        self.see(f"{self.running}: values", values)
        return keys, values

    def _state(self, kind: str) -> Callable[..., Tensor]:
        def update(state: Tensor, *_: object, **__: object) -> Tensor:
            self.see(f"{self.running}: {kind}", state)
            return state

        return update


def only_updates_caches(layer: nn.Module) -> bool:
    """Whether a layer is made of transformers' modules that never look for what a cache has kept."""
    for name in {type(module).__module__ for module in layer.modules()}:
        if name.startswith("torch."):
            continue
        if not name.startswith("transformers.") or "cache.layers" in inspect.getsource(sys.modules[name]):
            return False
    return True
