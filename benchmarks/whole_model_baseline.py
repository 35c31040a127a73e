"""The whole-model way, to compare with: load fp16, coreai-opt's eager quantizer, the public converter, `save_asset`.

    python benchmarks/whole_model_baseline.py CHECKPOINT -o DIR

Everything is the toolchain's documented path, applied to our own overlay, so that the only difference from `zoo build`
is how weights travel. It is what a careful user would write without this project. Prints a JSON line with the seconds
from the start of reading to the asset on disk; memory is measured from outside, by measure.py.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from coreai_opt.quantization import ModuleQuantizerConfig, Quantizer, QuantizerConfig
from coreai_opt.quantization import QuantizationSpec as AppleSpec
from coreai_opt.quantization.spec import PerBlockGranularity
from coreai_torch import ExternalizeSpec, TorchConverter, get_decomp_table
from coreai_torch.composite_ops import SDPA, GatherMM, RMSNormImpl
from torch import nn

from coreai_zoo import composites
from coreai_zoo.build.design import design
from coreai_zoo.build.request import BuildRequest
from coreai_zoo.lowering.trace import dynamic_shapes, example_inputs
from coreai_zoo.plugins import default_plugins
from coreai_zoo.recipes import QuantizationSpec
from coreai_zoo.signature import TraceSpec
from coreai_zoo.weights.plan import WeightPlan

EXTERNALIZED = [
    ExternalizeSpec(RMSNormImpl, composite_op_name="rms_norm", composite_attrs=["axes", "eps"]),
    ExternalizeSpec(
        SDPA, composite_op_name="scaled_dot_product_attention", composite_attrs=["scale", "is_causal", "window_size"]
    ),
    ExternalizeSpec(GatherMM, composite_op_name="gather_mm", composite_attrs=["num_batch_axes"]),
]


def load(directory: Path) -> tuple[nn.Module, TraceSpec, WeightPlan]:
    """The decoder with every weight in memory, its signature, and how its recipe stores each weight."""
    planned = design(BuildRequest(checkpoint=directory, recipe="int8hu", dry=True), default_plugins())
    module = planned.modules[planned.decode].to_empty(device="cpu")
    for tensor in planned.weights.tensors:
        rows = [planned.checkpoint.read_rows(s.key, 0, s.stop - s.start) for s in tensor.sources]
        value = torch.cat(rows) if len(rows) > 1 else rows[0]
        if tensor.transform is not None:
            value = tensor.transform.apply(value.float())
        parameter = module.get_parameter(tensor.name)
        parameter.data = value.to(parameter.dtype).reshape(parameter.shape)
        parameter.requires_grad = False
    return module, planned.signatures[planned.decode], planned.weights


def quantize(module: nn.Module, spec: TraceSpec, plan: WeightPlan) -> nn.Module:
    """coreai-opt's eager quantizer with one config per quantized linear."""

    def config(weight: QuantizationSpec) -> ModuleQuantizerConfig:
        apple = AppleSpec(
            dtype=getattr(torch, weight.dtype),
            qscheme=weight.scheme,
            granularity=PerBlockGranularity(axis=1, block_size=weight.block_size),
        )
        return ModuleQuantizerConfig(op_state_spec={"weight": apple}, op_input_spec=None, op_output_spec=None)

    named = {
        planned.name.removesuffix(".weight"): config(planned.quantization)
        for planned in plan.tensors
        if planned.quantization is not None and isinstance(_owner(module, planned.name), nn.Linear)
    }
    quantizer = Quantizer(
        module, QuantizerConfig(global_config=None, module_name_configs=named, execution_mode="eager")
    )
    quantizer.prepare(example_inputs(spec))
    finalized: nn.Module = quantizer.finalize()
    return finalized


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def convert(module: nn.Module, spec: TraceSpec, path: Path) -> None:
    """The documented conversion."""
    for child in list(module.modules()):
        match child:
            case composites.RMSNorm():
                child.impl = RMSNormImpl(eps=child.impl.eps)
            case composites.SDPA():
                child.impl = SDPA(scale=child.impl.scale, is_causal=True)
            case composites.GatherMM():
                child.impl = GatherMM()

    def traced(decoder: nn.Module) -> Any:
        example, shapes = example_inputs(spec), dynamic_shapes(spec)
        program = torch.export.export(decoder, example, dynamic_shapes=shapes, strict=False)
        return program.run_decompositions(get_decomp_table())

    classes = {type(child) for child in module.modules()}
    with torch.no_grad():
        TorchConverter().add_pytorch_module(
            module,
            export_fn=traced,
            externalize_modules=[spec for spec in EXTERNALIZED if spec.target_class in classes],
            input_names=[tensor.name for tensor in spec.inputs],
            state_names=[state.name for state in spec.states],
            output_names=[tensor.name for tensor in spec.outputs],
        ).to_coreai().save_asset(path)


def main() -> None:
    """Parse the command line, convert, print the time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    started = time.monotonic()
    module, spec, plan = load(arguments.checkpoint)
    loaded = time.monotonic()
    quantized = quantize(module, spec, plan)
    finished = time.monotonic()
    convert(quantized, spec, arguments.output / "whole_model.aimodel")
    print(
        json.dumps(
            {
                "load": loaded - started,
                "quantize": finished - loaded,
                "convert": time.monotonic() - finished,
                "seconds": time.monotonic() - started,
            }
        )
    )


if __name__ == "__main__":
    main()
