"""Families of plans: plans for the layers of a model, and plans for its conv graph.

Every plan belongs to one family; `family_of` returns it. The methods of a family cover only loading, because this file
is part of the code that is saved with a checkpoint. Other modules keep their own tables by family.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from ..errors import PlanError, UnsupportedModelError
from ..plan import CONV_GRAPH_KINDS, Layout, Plan
from .architectures import ConvGraphArchitecture, architecture_for, architecture_of
from .surgery.conv_graph import reshape_conv_graph
from .surgery.layers import reshape, tied_weights
from .surgery.weights import expanded_weights


class PlanFamily(ABC):
    """Differences between the families of plans.

    Attributes:
        units: Name of the units that a plan counts.
        saves_parameters: Whether every plan with edits reduces the number of parameters.
    """

    units: ClassVar[str]
    saves_parameters: ClassVar[bool]

    @abstractmethod
    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        """Give a newly built model the shape that its plan defines, in place.

        Returns:
            The shared matrices: name of a copy -> name of the matrix that is kept.

        Raises:
            PlanError: The plan does not fit the config of the model.
        """

    @abstractmethod
    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        """Weights with which the stock class computes the same as a fused model.

        Raises:
            PlanError: The plan does not fit the config of the model.
            UnsupportedModelError: The stock class cannot represent the fused model.
        """


class _Layers(PlanFamily):
    """Plans that fuse, drop or linearise blocks of layers."""

    units = "layers"
    saves_parameters = True

    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        architecture, layout = architecture_of(plan, model), _layout_of(plan, model)
        reshape(model, architecture, layout)
        return tied_weights(model, architecture, layout)

    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        layout = _layout_of(plan, model)
        others = [i for i, slot in enumerate(layout.slots) for source in slot.blocks.values() if source and source.form]
        if others:
            raise UnsupportedModelError(
                f"the MLPs of layers {', '.join(map(str, others))} are linear, or becoming linear, which "
                f"{type(model).__name__} cannot represent without this library: save the model as it is, without "
                "expanded=True."
            )
        return expanded_weights(model, architecture_of(plan, model), layout)


class _ConvGraph(PlanFamily):
    """Plans that merge convolutions of a conv graph."""

    units = "convolutions"
    saves_parameters = False  # merging saves time, and may enlarge kernels

    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        reshape_conv_graph(model, architecture_for(model, ConvGraphArchitecture), plan)
        return {}

    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        raise UnsupportedModelError(
            f"convolutions of {type(model).__name__} were merged, which the stock class cannot represent: save the "
            "model as it is, without expanded=True."
        )


LAYERS, CONV_GRAPH = _Layers(), _ConvGraph()


def family_of(plan: Plan) -> PlanFamily:
    """Family of a plan: `LAYERS` or `CONV_GRAPH`."""
    return CONV_GRAPH if plan.kinds == CONV_GRAPH_KINDS else LAYERS


def _layout_of(plan: Plan, model: PreTrainedModel) -> Layout:
    """Layout of the plan of a fused model, after checking that its config has the same number of layers."""
    layout, architecture = plan.layout(), architecture_of(plan, model)
    depth = getattr(architecture.config_of(model.config), architecture.depth)
    if len(layout.slots) != depth:
        raise PlanError(
            f"the plan in config.json leads to {len(layout.slots)} layers, but {architecture.depth} is {depth}: the "
            "file was changed by hand; restore the original."
        )
    return layout
