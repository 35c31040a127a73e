"""A plugin for an architecture that does not exist, written as a stranger would: through the public hooks only.

The toy is a decoder without positions: embedding, then layers of a running mean, causal attention (GQA) and a ReLU MLP,
each normed before and added to its input, then norm and head. Its checkpoint spells everything differently from its
parameters. The running mean is what no other model here has: a float32 state beside the key / value pair.

Shapes: S new tokens of T so far, D hidden, L layers, V vocabulary. Batch is always 1.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from coreai_zoo import hookimpl
from coreai_zoo.composites import SDPA, RMSNorm
from coreai_zoo.contracts import Contract
from coreai_zoo.errors import BadInput
from coreai_zoo.overlay import Drop, LayerRewrite, Overlay, Transform, WeightMap, WeightRule
from coreai_zoo.recipes import HeadQuantization, QuantizationSpec
from coreai_zoo.signature import KVCache, StateSpec, TensorSpec, TraceSpec

MODEL_TYPE = "toy_mean"


@dataclasses.dataclass(frozen=True)
class ToyConfig:
    """Everything that the decoder is built from."""

    vocab_size: int
    hidden_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    max_context_length: int


# ---------------------------------------------------------------------------------------------------------------------
# The decoder
# ---------------------------------------------------------------------------------------------------------------------


class RunningMean(nn.Module):
    """The mean of all hidden states so far, token after token."""

    def forward(self, x: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """`x` [1, S, D], `mean` [1, D] and `count` [S] of tokens up to each, all fp32; [1, S, D] and the new mean."""
        means = []
        for t in range(x.shape[1]):
            mean = mean + (x[:, t] - mean) / count[t]
            means.append(mean)
        return torch.stack(means, dim=1), mean


class RunningMeanStep(nn.Module):
    """`RunningMean` for exactly one token."""

    def forward(self, x: Tensor, mean: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """As `RunningMean` with S = 1."""
        mean = mean + (x.squeeze(1) - mean) / count
        return mean.unsqueeze(1), mean


class Attention(nn.Module):
    """Grouped-query attention without positions."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q = nn.Linear(config.hidden_size, config.heads * config.head_dim, bias=False)
        self.k = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.v = nn.Linear(config.hidden_size, config.kv_heads * config.head_dim, bias=False)
        self.o = nn.Linear(config.heads * config.head_dim, config.hidden_size, bias=False)
        self.sdpa = SDPA(scale=config.head_dim**-0.5)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, length: int) -> Tensor:
        """`x` [1, S, D], `keys` and `values` [1, Hkv, capacity, Dh], `length` T; [1, S, D]."""
        query, key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for projection in (self.q, self.k, self.v)
        )
        keys[:, :, length - x.shape[1] : length] = key
        values[:, :, length - x.shape[1] : length] = value
        out: Tensor = self.o(self.sdpa(query, keys[:, :, :length], values[:, :, :length]).transpose(1, 2).flatten(2))
        return out


class Layer(nn.Module):
    """Mean, attention, MLP."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.mean = RunningMean()
        self.mean_norm = RMSNorm(config.hidden_size, 1e-5)
        self.attention = Attention(config)
        self.attention_norm = RMSNorm(config.hidden_size, 1e-5)
        self.up = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.mlp_norm = RMSNorm(config.hidden_size, 1e-5)

    def forward(
        self, x: Tensor, keys: Tensor, values: Tensor, mean: Tensor, position_ids: Tensor
    ) -> tuple[Tensor, Tensor]:
        """[1, S, D] to [1, S, D] and this layer's new mean [1, D]."""
        count = position_ids[0, -x.shape[1] :].float() + 1
        means, mean = self.mean(x.float(), mean, count)
        x = x + self.mean_norm(means.to(x.dtype))
        x = x + self.attention(self.attention_norm(x), keys, values, position_ids.shape[1])
        return x + self.down(torch.relu(self.up(self.mlp_norm(x)))), mean


class ToyDecoder(nn.Module):
    """The whole function."""

    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.hidden_size, 1e-5)
        self.head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(
        self, input_ids: Tensor, position_ids: Tensor, keys: Tensor, values: Tensor, mean_state: Tensor
    ) -> Tensor:
        """`input_ids` [1, S], `position_ids` [1, T], the states; logits [1, S, V]."""
        x = self.embed(input_ids)
        means = []
        for index, layer in enumerate(self.layers):
            x, mean = layer(x, keys[index], values[index], mean_state[index], position_ids)
            means.append(mean)
        mean_state.copy_(torch.stack(means))
        logits: Tensor = self.head(self.norm(x))
        return logits


# ---------------------------------------------------------------------------------------------------------------------
# What the host is told
# ---------------------------------------------------------------------------------------------------------------------


class ToyOverlay:
    """The overlay; see `coreai_zoo.overlay.Overlay`."""

    name = "toy"

    def read_config(self, hf_config: Mapping[str, Any]) -> ToyConfig:
        """Parse `config.json`."""
        fields = {field.name: hf_config.get(field.name) for field in dataclasses.fields(ToyConfig)}
        bad = [name for name, value in fields.items() if not isinstance(value, int) or value < 1]
        if bad:
            raise BadInput(f"This toy config lacks {', '.join(bad)}.")
        return ToyConfig(**fields)  # type: ignore[arg-type]  # checked above

    def facts(self, config: ToyConfig) -> Mapping[str, Any]:
        """What an entry states."""
        return {**dataclasses.asdict(config), "ffn": "dense"}

    def kv_cache(self, config: ToyConfig) -> KVCache:
        """Every layer attends."""
        return KVCache(layers=config.layers, heads=config.kv_heads, head_dim=config.head_dim)

    def decoder(self, config: ToyConfig, contract: Contract) -> nn.Module:
        """The decoder in the contract's dtype."""
        return ToyDecoder(config).to(getattr(torch, contract.compute_dtype))

    def config_of_facts(self, facts: Mapping[str, Any]) -> dict[str, Any]:
        """The config is its facts."""
        return {"model_type": MODEL_TYPE, **{name: size for name, size in facts.items() if name != "ffn"}}

    def with_layers(self, hf_config: Mapping[str, Any], layers: int) -> dict[str, Any]:
        """The first layers."""
        return {**hf_config, "layers": layers}


class PairContract(Contract):
    """An engine that decodes with `step`, one token per call, and reads a prompt with `pair`, two tokens per call."""

    def functions(
        self, kv: KVCache, extra: Sequence[StateSpec], vocab_size: int, max_context: int
    ) -> Mapping[str, TraceSpec]:
        """Both functions, the one that decodes first; their outputs are called `scores`."""
        return {
            name: self._scoring(self.signature(length, kv, extra, vocab_size, max_context))
            for name, length in (("step", 1), ("pair", 2))
        }

    def _scoring(self, function: TraceSpec) -> TraceSpec:
        (logits,) = function.outputs
        scores = TensorSpec("scores", logits.shape, logits.dtype)
        return TraceSpec(function.inputs, function.states, (scores,), function.axes)


PAIR = PairContract(
    name="toy-pair",
    summary="decodes one token per call, reads a prompt two at a time",
    query_length=1,
    prerequisites=("a box of toys",),
)


def _from_decibel(decibel: Tensor) -> Tensor:
    return 10 ** (decibel / 20)


FROM_DECIBEL = Transform("10 ** (weight / 20)", _from_decibel)


def _rows() -> Iterable[WeightRule]:
    yield WeightRule("tok.table", "embed.weight", "embedding")
    yield WeightRule("unembed", "head.weight", "head")
    yield WeightRule("gain", "norm.weight", "norm", FROM_DECIBEL)
    block, layer = "block.{i}.", "layers.{i}."
    for ours, theirs in (("mean_norm", "m"), ("attention_norm", "a"), ("mlp_norm", "f")):
        yield WeightRule(f"{block}gain_{theirs}", f"{layer}{ours}.weight", "norm", FROM_DECIBEL)
    for name in "qkvo":
        yield WeightRule(f"{block}w{name}", f"{layer}attention.{name}.weight", "attention")
    for name in ("up", "down"):
        yield WeightRule(f"{block}{name}", f"{layer}{name}.weight", "mlp")


class ToyPlugin:
    """Every hook that the toy needs. `entry` is the file that it brings."""

    def __init__(self, entry: Path) -> None:
        self.entry = entry

    @hookimpl
    def zoo_entries(self) -> Iterable[Path]:
        return [self.entry]

    @hookimpl
    def zoo_claim_overlay(self, model_type: str) -> Overlay | None:
        return ToyOverlay() if model_type == MODEL_TYPE else None

    @hookimpl
    def zoo_contracts(self) -> Iterable[Contract]:
        return [PAIR]

    @hookimpl
    def zoo_layer_rewrites(self, overlay: Overlay, function: TraceSpec) -> Iterable[LayerRewrite]:
        if overlay.name != "toy" or function.query_length != 1:
            return ()
        step = LayerRewrite(
            name="mean-step",
            pattern="layers.*.mean",
            reason="one token per call needs no loop",
            apply=lambda _mean: RunningMeanStep(),
        )
        return (step,)

    @hookimpl
    def zoo_extra_states(self, overlay: Overlay, config: Any) -> Iterable[StateSpec]:
        if overlay.name != "toy":
            return ()
        return (StateSpec(name="meanState", shape=(config.layers, 1, config.hidden_size), dtype="float32"),)

    @hookimpl
    def zoo_weight_map(self, overlay: Overlay) -> WeightMap | None:
        if overlay.name != "toy":
            return None
        return WeightMap(rules=tuple(_rows()), drops=(Drop("optimizer.**", "left over from training"),))

    @hookimpl
    def zoo_head_quantization(self, overlay: Overlay) -> HeadQuantization | None:
        if overlay.name != "toy":
            return None
        return HeadQuantization(QuantizationSpec("int8", "symmetric", 16), "Toys have rough heads.")
