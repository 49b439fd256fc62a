"""MobileNetV2: inverted residual layers with linear bottlenecks."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .base import root_of
from .conv_graph import ConvGraphArchitecture, Convolutions, Skip, Unit

_LAYERS = ("expand_1x1", "conv_3x3", "reduce_1x1")


class MobileNetV2Architecture(ConvGraphArchitecture):
    """The conv graph excludes the last convolution, before the pooling, as in the paper."""

    model_type = "mobilenet_v2"

    def convolutions(self, model: PreTrainedModel) -> Convolutions:
        root, base = root_of(model), model.base_model
        stem = [name for name in ("first_conv", *_LAYERS) if getattr(base.conv_stem, name) is not None]
        units = [Unit.of(f"{root}conv_stem.{name}") for name in stem]
        skips, barriers = [], set()
        for i, block in enumerate(base.layer):
            path, start = f"{root}layer.{i}", len(units) - 1
            expand, depthwise, reduce = (f"{path}.{name}" for name in _LAYERS)
            act = f"{path}.activation" if block.use_residual else None
            units += [Unit.of(expand), Unit.of(depthwise), Unit.of(reduce, act)]
            if block.use_residual:
                skips.append(Skip(start, len(units) - 1, path, _LAYERS, None, "activation"))
            if block.conv_3x3.convolution.stride[0] > 1:
                barriers.add(len(units) - 1)
        return Convolutions(units, skips, frozenset(barriers))

    def activation(self, config: PreTrainedConfig) -> nn.Module:
        return ACT2FN[config.hidden_act] if isinstance(config.hidden_act, str) else config.hidden_act

    def same_padding(self, config: PreTrainedConfig) -> bool:
        return config.tf_padding
