"""A model of transformers with one decoder layer in memory at a time.

The modules are transformers' own, laid out on the meta device. So is everything that decides which checkpoint key fills
which parameter and how (prefixes, experts stored one by one, tied heads): the function that fills a layer is the one
with which `from_pretrained` fills a whole model. That function is not public. This module is the only one that calls
it, and tests/test_oracle.py compares every result with that of `from_pretrained`.

Shapes: P positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coreai_zoo.checkpoint.files import Checkpoint
from coreai_zoo.checkpoint.originals import without_quantization
from coreai_zoo.checkpoint.tokenizer import quiet_transformers
from coreai_zoo.errors import BadInput, EnvironmentLacks, ZooError, listing
from coreai_zoo.gate import Activations, ReferenceModel
from coreai_zoo.gates.peaks import RESIDUAL_STREAM, Peaks

HEAD_CHUNK_ELEMENTS = 1 << 25
"""Elements of the head that are multiplied at a time: 128 MiB in float32."""


class StreamedCausalLM:
    """transformers' causal language model for a config, filled from a checkpoint layer by layer.

    Args:
        checkpoint: its weights.
        hf_config: its config, or the config of a slice of it.
        dtype: the precision of weights and computation, apart from what transformers always keeps in float32.
        reference: how the model is made; None for transformers' own class for the config.
        respelled: checkpoint keys that the class does not know as they are written, as it knows them.

    Raises:
        BadInput: when transformers has no such model, finds a parameter that the checkpoint does not fill, or one of
            another shape.
        EnvironmentLacks: when this transformers has no loader that can be called for a part of a model.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        hf_config: Mapping[str, Any],
        dtype: torch.dtype,
        reference: ReferenceModel | None = None,
        respelled: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self.checkpoint, self.dtype = checkpoint, dtype
        with quiet_transformers():
            self.model = _laid_out(hf_config, dtype, reference or ReferenceModel("transformers", _by_config))
            self._loader = _Loader(self.model, checkpoint, dtype, respelled)
            self._loader.check()
        self.layers = _decoder_layers(self.model)
        held = [f"{name}." for name in self.layers]
        self._embedding, self._head = self.model.get_input_embeddings(), self.model.get_output_embeddings()
        ends = [self._name_of(self._embedding), self._name_of(self._head)]
        self._embedding_key, self._head_key = map(self._key_of, ends)
        rest = [name for name in self._loader.sources if name not in ends and not name.startswith(tuple(held))]
        self._loader.load(rest)

    def run(self, tokens: Sequence[int], on_layer: Callable[[], None] = lambda: None) -> Activations:
        """Logits, hidden states, router logits and peaks of a prompt, all positions at once, in float32.

        Args:
            tokens: the prompt.
            on_layer: called after each layer.
        """
        hidden: list[Tensor] = []
        peaks = Peaks()
        with contextlib.ExitStack() as hooks, torch.inference_mode(), quiet_transformers():
            hooks.callback(self.model.set_output_embeddings, self._head)
            self.model.set_output_embeddings(_HeadInChunks(self._head, self._head_rows))
            embedded = self._embed(tokens)
            hidden.append(embedded)
            peaks.see("embedding", embedded)
            for name, layer in self.layers.items():
                hooks.callback(layer.register_forward_pre_hook(self._before(name, peaks)).remove)
                for unwatch in peaks.watch(name, layer):
                    hooks.callback(unwatch)
                hooks.callback(layer.register_forward_hook(self._after(hidden, peaks, on_layer)).remove)
            options: dict[str, Any] = {"output_router_logits": True} if self._is_routed else {}
            options |= peaks.cache_for(self.model, self.layers.values())
            outputs = self.model(inputs_embeds=embedded, **options)
        routers = [layer.reshape(len(tokens), -1) for layer in outputs.router_logits] if self._is_routed else None
        return Activations(
            _array(outputs.logits[0]),
            [_array(state[0]) for state in hidden],
            None if routers is None else [_array(logits) for logits in routers],
            peaks.found,
        )

    @property
    def _is_routed(self) -> bool:
        return bool(getattr(self.model.config.get_text_config(), "num_experts_per_tok", None))

    # -- layers

    def _before(self, name: str, peaks: Peaks) -> Callable[..., None]:
        prefix = f"{name}."

        def fill(_module: nn.Module, _arguments: object) -> None:
            peaks.running = name
            self._loader.load([target for target in self._loader.sources if target.startswith(prefix)])

        return fill

    def _after(self, hidden: list[Tensor], peaks: Peaks, on_layer: Callable[[], None]) -> Callable[..., None]:
        def empty(layer: nn.Module, _arguments: object, output: Any) -> None:
            hidden.append(output[0] if isinstance(output, tuple) else output)
            peaks.see(f"{peaks.running}: {RESIDUAL_STREAM}", hidden[-1])
            for module in layer.modules():
                for leaf, parameter in module.named_parameters(recurse=False):
                    setattr(module, leaf, nn.Parameter(parameter.to("meta"), requires_grad=False))
            self.checkpoint.release()
            on_layer()

        return empty

    # -- embedding and head

    def _embed(self, tokens: Sequence[int]) -> Tensor:
        """The prompt embedded by the model's own module, [1, P, D], with only the rows that it needs in memory."""
        distinct, places = torch.tensor(list(tokens)).unique(return_inverse=True)
        rows = torch.cat([self.checkpoint.read_rows(self._embedding_key, i, i + 1) for i in distinct.tolist()])
        whole, padding = self._embedding.weight, self._embedding.padding_idx
        self._embedding.weight = nn.Parameter(rows.to(self.dtype), requires_grad=False)
        self._embedding.padding_idx = None  # only training looks at it, and it numbers rows of the whole table
        try:
            embedded: Tensor = self._embedding(places[None])
        finally:
            self._embedding.weight, self._embedding.padding_idx = whole, padding
        return embedded

    def _head_rows(self) -> Iterator[Tensor]:
        """The head's rows from the first to the last, a chunk at a time."""
        info = self.checkpoint.tensors[self._head_key]
        step = max(1, HEAD_CHUNK_ELEMENTS // info.columns)
        for start in range(0, info.rows, step):
            yield self.checkpoint.read_rows(self._head_key, start, min(start + step, info.rows)).to(self.dtype)

    def _name_of(self, module: nn.Module) -> str:
        path = next(name for name, other in self.model.named_modules() if other is module)
        return f"{path}.weight"

    def _key_of(self, name: str) -> str:
        """The checkpoint key of the embedding's or the head's matrix, or of the matrix that it is tied to."""
        keys = self._loader.keys_of(name)
        if len(keys) != 1:
            raise BadInput(f"transformers fills {name} from {len(keys)} tensors of the checkpoint.")
        return keys[0]


class _HeadInChunks(nn.Module):
    """A linear head that multiplies with a few of its rows at a time."""

    def __init__(self, head: nn.Module, rows: Callable[[], Iterable[Tensor]]) -> None:
        super().__init__()
        self._rows, self._bias = rows, getattr(head, "bias", None)

    def forward(self, hidden: Tensor) -> Tensor:
        """[..., D] to [..., V]."""
        logits = torch.cat([F.linear(hidden, rows) for rows in self._rows()], dim=-1)
        return logits if self._bias is None else logits + self._bias


def _array(tensor: Tensor) -> Any:
    return tensor.float().numpy()


def _laid_out(hf_config: Mapping[str, Any], dtype: torch.dtype, reference: ReferenceModel) -> Any:
    """The model on the meta device. Its weights are not quantized, whatever the config has left over of that."""
    try:
        with torch.device("meta"):
            return reference.make(without_quantization(hf_config), dtype).eval()
    except ZooError:
        raise
    except Exception as error:  # whatever its configuration classes make of a field
        raise BadInput(f"{reference.name} cannot make a model of this config: {error}.") from error


def _by_config(hf_config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The language model of the class that transformers has for the model type.

    A multimodal wrapper's class ties its head by the wrapper's flag, where the causal class that is taken out of it
    goes by the text config's. The architecture that the config names decides.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = {key: value for key, value in hf_config.items() if key != "model_type"}
    config = AutoConfig.for_model(str(hf_config.get("model_type")), **fields)
    text = config.get_text_config()
    if text is not config and not any(name.endswith("ForCausalLM") for name in config.architectures or ()):
        text.tie_word_embeddings = config.tie_word_embeddings
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _decoder_layers(model: Any) -> dict[str, nn.Module]:
    """The decoder layers in order: the modules that transformers never splits when it spreads a model."""
    kinds = set(model._no_split_modules or ())  # noqa: SLF001  # transformers' name for them
    layers = {name: module for name, module in model.named_modules() if type(module).__name__ in kinds}
    if not layers:
        raise BadInput(f"transformers does not say what the layers of a {type(model).__name__} are.")
    return layers


class _Loader:
    """transformers' own loading of a checkpoint into a model, for any part of it.

    Attributes:
        sources: the checkpoint keys that fill each parameter (the first one, where a key fills several).
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, dtype: torch.dtype, respelled: Mapping[str, str]) -> None:
        try:
            from transformers import conversion_mapping, core_model_loading
            from transformers.modeling_utils import LoadStateDictConfig

            self._fill = core_model_loading.convert_and_load_state_dict_in_model
            rename = core_model_loading.rename_source_key
            mapping = conversion_mapping.get_model_conversion_mapping(model)
        except (ImportError, AttributeError) as error:
            import transformers

            raise EnvironmentLacks(
                f"The oracle cannot load a part of a model with transformers {transformers.__version__}: {error}.",
                "Install the version that this zoo is tested with: pip install transformers==5.23.0",
            ) from error
        self._model, self._checkpoint = model, checkpoint
        self._options = {"dtype": dtype, "dtype_plan": model._get_dtype_plan(dtype), "weight_mapping": mapping}  # noqa: SLF001
        self._config = LoadStateDictConfig
        kinds = (core_model_loading.WeightRenaming, core_model_loading.WeightConverter)
        renamings, converters = ([rule for rule in mapping if isinstance(rule, kind)] for kind in kinds)
        names, prefix = model.state_dict(), model.base_model_prefix
        self.sources: dict[str, list[str]] = {}
        self._spelled: dict[str, str] = {}
        for key in checkpoint.tensors:
            # transformers' own reading comes first: the respelling is ours, and what the oracle is there to check.
            for spelled in dict.fromkeys((key, respelled.get(key, key))):
                target, _ = rename(spelled, renamings, converters, prefix, names)
                if target not in names and spelled in names:
                    target, _ = rename(spelled, [], [], prefix, names)
                if target in names:
                    self.sources.setdefault(target, []).append(key)
                    self._spelled[key] = spelled
                    break

    def check(self) -> None:
        """Let transformers load the whole checkpoint without its values, and report as `from_pretrained` does.

        That also initialises what is not a weight, such as the frequencies of rotary embeddings.
        """
        config = self._config(device_map={"": "meta"}, **self._options)
        values = {
            self._spelled.get(key, key): torch.empty(info.shape, dtype=getattr(torch, info.dtype), device="meta")
            for key, info in self._checkpoint.tensors.items()
        }
        info, _ = self._fill(self._model, values, config)
        mismatched = [
            f"{name} is {list(found)} in the checkpoint, not {list(shape)}"
            for name, found, shape in sorted(info.mismatched_keys)
        ]
        failed = mismatched + sorted(info.conversion_errors)
        if failed:
            raise BadInput(f"transformers cannot load {self._checkpoint.directory}: {listing(failed, 6)}.")
        info = self._model._finalize_model_loading(self._model, self._config(**self._options), info)  # noqa: SLF001
        missing = [name for name in sorted(info.missing_keys) if not self.keys_of(name)]
        if missing:
            raise BadInput(
                f"transformers leaves {len(missing)} parameters of {self._checkpoint.directory} unfilled: "
                f"{listing(missing, 6)}."
            )

    def keys_of(self, name: str) -> list[str]:
        """The keys that fill a parameter, or else the parameter that it is tied to."""
        tied = self._model.all_tied_weights_keys
        partners = [tied[name]] if name in tied else []
        partners += [other for other, source in tied.items() if source == name]
        return next((self.sources[other] for other in (name, *partners) if other in self.sources), [])

    def load(self, names: Sequence[str]) -> None:
        """Fill parameters, by the names in `sources`."""
        values = {}
        for name in names:
            for key in self.sources[name]:
                info = self._checkpoint.tensors[key]
                # Views of the mapped files: what reads them is their conversion, on several threads of transformers.
                values[self._spelled[key]] = self._checkpoint.read_rows(key, 0, info.rows).reshape(info.shape)
        with quiet_transformers():
            self._fill(self._model, values, self._config(device_map={"": "cpu"}, **self._options))
