"""The families of plans: plans of the layers of a model, and plans of the convolutions of a chain.

A plan is of one family, which `family_of` finds. What loading needs of a family are its methods, because this file goes
with the code that is put beside a checkpoint. What needs more than that is a table by family, in the file that has it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import PlanError, UnsupportedModelError
from ..plan import CHAIN, Layout, Plan
from .architectures import ConvGraphArchitecture, LayerArchitecture, architecture_for
from .surgery.conv_graph import reshape_chain
from .surgery.layers import reshape, tied_weights
from .surgery.weights import expanded_weights


class PlanFamily(ABC):
    """What differs between plans of different families.

    Attributes:
        units: the word for what a plan counts.
        saves_parameters: whether every plan that changes something leads to fewer parameters.
    """

    units: ClassVar[str]
    saves_parameters: ClassVar[bool]

    @abstractmethod
    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        """Give a model that was just built the shape that its plan leads to, in place.

        Returns:
            The shared matrices: name of a copy -> name of the one that is kept.

        Raises:
            PlanError: the plan does not fit the config of the model.
        """

    @abstractmethod
    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        """The weights with which the stock class computes what a fused model computes.

        Raises:
            PlanError: the plan does not fit the config of the model.
            UnsupportedModelError: the stock class has no place for what became of the model.
        """


class _Layers(PlanFamily):
    """Blocks of the layers of a model are fused, dropped or made linear."""

    units = "layers"
    saves_parameters = True

    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        architecture, layout = architecture_for(model, LayerArchitecture), _layout_of(plan, model.config)
        reshape(model, architecture, layout)
        return tied_weights(model, architecture, layout)

    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        layout = _layout_of(plan, model.config)
        others = [i for i, slot in enumerate(layout.slots) for source in slot.blocks.values() if source and source.form]
        if others:
            raise UnsupportedModelError(
                f"the MLPs of layers {', '.join(map(str, others))} are linear, or on the way to it, for which "
                f"{type(model).__name__} has no place without this library: save the model as it is, without "
                "expanded=True."
            )
        return expanded_weights(model, architecture_for(model, LayerArchitecture), layout)


class _ConvGraph(PlanFamily):
    """Convolutions of a chain are merged."""

    units = "convolutions"
    saves_parameters = False  # merged convolutions may have larger kernels: it is time that they save

    def reshape(self, model: PreTrainedModel, plan: Plan) -> dict[str, str]:
        reshape_chain(model, architecture_for(model, ConvGraphArchitecture), plan)
        return {}

    def expanded(self, model: PreTrainedModel, plan: Plan) -> dict[str, Tensor]:
        raise UnsupportedModelError(
            f"convolutions of {type(model).__name__} were merged, for which the stock class has no place: save the "
            "model as it is, without expanded=True."
        )


LAYERS, CONV_GRAPH = _Layers(), _ConvGraph()


def family_of(plan: Plan) -> PlanFamily:
    """The family that a plan is of: `LAYERS` or `CONV_GRAPH`."""
    return CONV_GRAPH if plan.kinds == CHAIN else LAYERS


def _layout_of(plan: Plan, config: PreTrainedConfig) -> Layout:
    """The shape that a plan in a fused config asks for, if the config has as many layers."""
    layout = plan.layout()
    if len(layout.slots) != config.num_hidden_layers:
        raise PlanError(
            f"the plan in config.json leads to {len(layout.slots)} layers, and num_hidden_layers is "
            f"{config.num_hidden_layers}: the file was changed by hand; restore the original."
        )
    return layout
