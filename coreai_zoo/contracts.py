"""Engine contracts: what the functions of a bundle look like to the engine that loads it.

A contract says which functions there are, their inputs, the names of the key / value pair and the output. The overlay
adds its own states through the `zoo_extra_states` hook. Facts and their sources: docs/contracts.md.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from attrs import evolve, field, frozen
from attrs.validators import ge, optional

from coreai_zoo.engine import COREAI_MODELS, PREFILL, Engine
from coreai_zoo.signature import Axis, InputSpec, KVCache, StateSpec, TensorSpec, TraceSpec
from coreai_zoo.systems import System

# The pipelined engine allocates KV at 256 and doubles it; the trace only has to leave the axis free.
_TRACED_CAPACITY = 256
_TRACED_POSITIONS = 7
MINIMUM_CONTEXT = 8
"""Positions that a bundle allows at the least: what is traced with has to be among them."""


@frozen
class Prefill:
    """A function of its own that reads a prompt, many tokens per call, and gives nothing.

    Attributes:
        most_tokens: tokens that a call takes at the most; None for as many as the context has.
        chunk: tokens that a layer with a recurrence computes at once: 1 for one after the other, without a loop; None
            where the graph may have one.
    """

    most_tokens: int | None = field(validator=optional(ge(2)))
    chunk: int | None = field(validator=optional(ge(1)))

    def __attrs_post_init__(self) -> None:
        if self.chunk is not None and (self.most_tokens is None or self.most_tokens % self.chunk):
            raise ValueError(f"{self.most_tokens} tokens are no whole chunks of {self.chunk}")

    @property
    def steps(self) -> int:
        """How many times a recurrence stands in the graph, one behind the other; a loop stands there once."""
        return 1 if self.chunk is None or self.most_tokens is None else self.most_tokens // self.chunk


@frozen
class Contract:
    """One engine contract.

    Attributes:
        name: as on the command line.
        summary: one line.
        query_length: tokens per call when decoding: 1, or None when the engine may pass any number.
        prerequisites: what a machine needs to run such a bundle, beside its system, for the card.
        usage: how an engine of this contract is called, for the card: Markdown in which BUNDLE is the bundle's folder.
        fixed_context: whether the KV pair has its full length from the start, and `position_ids` names the new tokens
            only; else both grow with the tokens.
        default_context: positions that a bundle allows unless it is told, or None for what the model allows.
        backends: names of the backends that write such bundles.
        compute_dtype: dtype of states, of what the decoder computes, and of what is stored unquantized.
        engine: the engine whose rules designs and bundles are held against; None for one whose rules are not known
            here, and then there are none.
        prefill: the function that reads prompts; None where the one that decodes reads them.
        systems: the first version of each operating system that runs such a bundle; none where nothing is known of
            that, and then no `--target` is for it.
        on_devices: what is known of such bundles on devices, a sentence for the card; empty where nothing is to say.
    """

    name: str
    summary: str
    query_length: int | None
    prerequisites: tuple[str, ...]
    usage: str = ""
    fixed_context: bool = False
    default_context: int | None = None
    compute_dtype: str = "float16"
    backends: tuple[str, ...] = ("coreai",)
    engine: Engine | None = COREAI_MODELS
    prefill: Prefill | None = None
    systems: tuple[System, ...] = ()
    on_devices: str = ""

    def __attrs_post_init__(self) -> None:
        if self.query_length not in (None, 1):
            raise ValueError(
                f"the contract {self.name} decodes {self.query_length} tokens per call: nothing runs such a bundle; "
                "a function that reads prompts may take them, see `functions`"
            )

    @property
    def logits_dtype(self) -> str:
        """Of the logits: float16, which is what engines read, and without one what the decoder computes in."""
        return self.compute_dtype if self.engine is None else "float16"

    @property
    def needed_system(self) -> str:
        """The systems that run it, in words; empty where none is known."""
        return f"{' or '.join(map(str, self.systems))} or later" if self.systems else ""

    @property
    def needs(self) -> tuple[str, ...]:
        """What a machine needs to run such a bundle, a phrase each, its system first."""
        return (self.needed_system, *self.prerequisites) if self.systems else self.prerequisites

    def system_of(self, target: System) -> System | None:
        """The first version of the target's system that runs it; None where the target does not."""
        return next((system for system in self.systems if target.runs(system)), None)

    def functions(
        self, kv: KVCache, extra: Sequence[StateSpec], vocab_size: int, max_context: int
    ) -> Mapping[str, TraceSpec]:
        """The signature of each function of a bundle, by name; the first one decodes.

        `main` takes `input_ids` [1, S] int32; `position_ids` [1, T] int32, the whole range 0..T-1, so that the S new
        tokens are written at T - S; the KV pair [layers, 1, heads, capacity, head_dim]; then `extra`. It gives `logits`
        [1, S, V]. With a fixed context `position_ids` is [1, S] and the capacity is `max_context`.

        `prefill`, where there is one, takes the same, any number of tokens up to its limit, and gives nothing. An
        engine lays out its inputs by those of `main`, so `main` declares as many tokens, whatever a call of it has.

        A contract with other functions is a subclass with a method of its own; all its functions have the same states.

        Raises:
            ValueError: when names collide.
        """
        main = self.signature(self.query_length, kv, extra, vocab_size, max_context)
        if self.prefill is None:
            return {"main": main}
        most_tokens = min(self.prefill.most_tokens or max_context, max_context)
        prompt = evolve(self.signature(None, kv, extra, vocab_size, max_context, most_tokens), outputs=())
        return {"main": _declared_like(main, prompt), PREFILL: prompt}

    def signature(
        self,
        query_length: int | None,
        kv: KVCache,
        extra: Sequence[StateSpec],
        vocab_size: int,
        max_context: int,
        most_tokens: int | None = None,
    ) -> TraceSpec:
        """The signature of a function that takes `query_length` tokens per call, or any number up to `most_tokens`."""
        length = query_length if query_length is not None else "query"
        capacity = max_context if self.fixed_context else "capacity"
        pair = tuple(
            StateSpec(
                name=name,
                shape=(kv.layers, 1, kv.heads, capacity, kv.head_dim),
                dtype=self.compute_dtype,
                kind="kv_cache",
            )
            for name in ("keyCache", "valueCache")
        )
        axes = {}
        if not self.fixed_context:
            least = query_length or 1
            axes["positions"] = Axis(least, max_context, max(_TRACED_POSITIONS, least + 1))
            axes["capacity"] = Axis(least, _largest_capacity(max_context), max(_TRACED_CAPACITY, least + 1))
        if query_length is None:
            axes["query"] = Axis(1, most_tokens or max_context, _TRACED_POSITIONS - 2)
        positions = (
            InputSpec("position_ids", (1, length), "int32", holds="new_positions")
            if self.fixed_context
            else InputSpec("position_ids", (1, "positions"), "int32", holds="positions")
        )
        return TraceSpec(
            inputs=(InputSpec("input_ids", (1, length), "int32", holds="tokens"), positions),
            states=(*pair, *extra),
            outputs=(TensorSpec("logits", (1, length, vocab_size), self.logits_dtype),),
            axes=axes,
        )


def _declared_like(main: TraceSpec, prompt: TraceSpec) -> TraceSpec:
    """`main` with its tokens declared as those of a function that takes more of them."""
    tokens, *others = main.inputs
    if tokens.shape == prompt.inputs[0].shape:
        return main
    declared = evolve(tokens, shape=prompt.inputs[0].shape, length=main.query_length)
    return evolve(main, inputs=(declared, *others), axes={**main.axes, "query": prompt.axes["query"]})


def _largest_capacity(max_context: int) -> int:
    """The capacity that an engine has allocated when `max_context` positions fit: it starts with 256 and doubles."""
    capacity = _TRACED_CAPACITY
    while capacity < max_context:
        capacity *= 2
    return capacity


def benchmark_command(bundle: str, prompt_tokens: int, answer_tokens: int, runs: int) -> str:
    """The line by which the engine's own tool measures a bundle, which a shell takes as it is."""
    words = ["swift", "run", "-c", "release", "llm-benchmark", "--model", bundle]
    return shlex.join([*words, "-p", str(prompt_tokens), "-g", str(answer_tokens), "-n", str(runs)])


def _engine_usage(of_calls: str) -> str:
    """The lines of the engine's own pages (models/*/README.md there), with what the functions' calls ask of them."""
    return f"""\
In a checkout of [apple/coreai-models](https://github.com/apple/coreai-models), which has both tools:

```
swift run -c release llm-runner --model BUNDLE --warmup off --prompt "Hello"
{benchmark_command("BUNDLE", 128, 128, 3)}
```

{of_calls}

In an app, with the product `CoreAILM` of that package:

```swift
import CoreAILanguageModels
import FoundationModels

let model = try await CoreAILanguageModel(resourcesAt: URL(filePath: "BUNDLE"))
let session = LanguageModelSession(model: model)
print(try await session.respond(to: "Hello").content)
```"""


_WARM_UP = """\
A call takes one token, and the runner would warm up with more than one: keep `--warmup off`, or pass
`--warmup exact --warmup-length 1`. No environment variable is needed."""


def _usage_with_prefill(most_tokens: int) -> str:
    told = f"The engine reads a prompt with `prefill`, up to {most_tokens} tokens per call."
    return _engine_usage(f"{_WARM_UP.replace('A call takes', 'A call that decodes takes')}\n{told}")


_MACOS_27_0 = (System("macOS", "27.0"),)

_READS_CHUNK_SIZE = (
    "an engine of [apple/coreai-models](https://github.com/apple/coreai-models) from its pull request 240 on, which "
    "reads `prefill_chunk_size` and sends prompts to a function `prefill`",
)

STATIC_S1 = Contract(
    name="static-s1",
    summary="decode-only, loop-free, one token per call; prefill runs as single steps",
    query_length=1,
    systems=_MACOS_27_0,
    prerequisites=(
        "an engine of [apple/coreai-models](https://github.com/apple/coreai-models) from its pull request 227 on "
        "(commit 27a66f9; the release 0.2.0 is older), or from 237 on for a chat of more than one turn",
    ),
    usage=_engine_usage(
        f"{_WARM_UP} The engine feeds a prompt token by token, so\nreading one is as slow as writing one."
    ),
)

FIXED_S1 = Contract(
    name="fixed-s1",
    summary="decode-only, loop-free, one token per call, no dynamic axis: the context is allocated whole",
    query_length=1,
    systems=(System("macOS", "15"), System("iOS", "18")),
    prerequisites=("a caller that carries the states from call to call (MLState)",),
    fixed_context=True,
    default_context=4096,
    backends=("coreml",),
    engine=None,
)


def _chunked(name: str, summary: str, most_tokens: int, chunk: int, on_devices: str) -> Contract:
    """`static-s1` with a `prefill` that needs no loop."""
    return evolve(
        STATIC_S1,
        name=name,
        summary=summary,
        prefill=Prefill(most_tokens, chunk),
        usage=_usage_with_prefill(most_tokens),
        prerequisites=_READS_CHUNK_SIZE,
        on_devices=on_devices,
    )


CHUNKED = _chunked(
    "chunked",
    "decodes like static-s1; a function `prefill` reads up to 256 tokens of a prompt per call, loop-free",
    most_tokens=256,
    chunk=64,
    on_devices="No device is known to have run a `prefill` of this form, nor any bundle of this contract.",
)

CHUNKED_UNROLLED = _chunked(
    "chunked-unrolled",
    "like chunked, but 16 tokens per call, as 16 steps in a row: a form that others have run on devices",
    most_tokens=16,
    chunk=1,
    on_devices="Others have run a `prefill` of this form on devices, but no bundle of this contract.",
)

DYNAMIC = evolve(
    STATIC_S1,
    name="dynamic",
    summary="any number of tokens per call; the recurrence is a loop, which needs macOS 27.2",
    query_length=None,
    prefill=Prefill(most_tokens=None, chunk=None),
    usage=_engine_usage(
        "A call takes any number of tokens, and the engine reads a prompt with the function `prefill`."
    ),
    systems=(System("macOS", "27.2"),),
    on_devices="Apple's exporter writes this form for macOS 27.2, but no device is known to have run a bundle of this "
    "contract.",
)

DYNAMIC_BF16 = evolve(
    DYNAMIC,
    name="dynamic-bf16",
    summary="like dynamic, computed in bfloat16: the range of float32, and three bits less than half precision",
    compute_dtype="bfloat16",
)

CONTRACTS: Mapping[str, Contract] = MappingProxyType(
    {contract.name: contract for contract in (STATIC_S1, CHUNKED_UNROLLED, CHUNKED, DYNAMIC, DYNAMIC_BF16, FIXED_S1)}
)
"""Of those that need the same system, the one first of which most has been seen on devices: `--target` goes by it."""
