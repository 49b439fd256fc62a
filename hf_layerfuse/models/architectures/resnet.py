"""ResNet with basic or bottleneck layers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from .base import root_of
from .conv_graph import ConvGraphArchitecture, Convolutions, Skip, Unit


class ResNetArchitecture(ConvGraphArchitecture):
    model_type = "resnet"

    def convolutions(self, model: PreTrainedModel) -> Convolutions:
        root = root_of(model)
        units, skips = [Unit.of(f"{root}embedder.embedder")], []  # boundary 0 is a barrier: a pooling follows
        for i, stage in enumerate(model.base_model.encoder.stages):
            for j, block in enumerate(stage.layers):
                path, start = f"{root}encoder.stages.{i}.layers.{j}", len(units) - 1
                *inner, last = (f"{path}.layer.{k}" for k in range(len(block.layer)))
                units += [*map(Unit.of, inner), Unit.of(last, f"{path}.activation")]
                skips.append(Skip(start, len(units) - 1, path, ("layer",), "shortcut", "activation"))
        return Convolutions(units, skips, frozenset({0}))

    def activation(self, config: PreTrainedConfig) -> nn.Module:
        return ACT2FN[config.hidden_act]
