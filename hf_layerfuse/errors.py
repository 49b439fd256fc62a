"""All errors and warnings. Each error names the value, the allowed values and the next step."""


class LayerFuseError(ValueError):
    """Base class of all errors that hf_layerfuse raises."""


class RecipeError(LayerFuseError):
    """A recipe has unknown fields or contradictory values, or its target cannot be met.

    Attributes:
        recipe: Class that has the fields in the message; None where they do not belong to one class.
    """

    recipe: type | None = None


class PlanError(LayerFuseError):
    """A plan cannot be read, or does not fit the model."""


class UnsupportedModelError(LayerFuseError):
    """The architecture is unknown, or the model cannot be fused in its current state."""


class CheckpointError(LayerFuseError):
    """A checkpoint is missing, damaged, or would be overwritten."""


class DataError(LayerFuseError):
    """A data set is missing or empty, or lacks the columns that the task needs."""


class TrainingError(LayerFuseError):
    """The training loss is not finite, or explodes."""


class PublishError(LayerFuseError):
    """The Hub cannot be reached, or refuses a result."""


class VerificationError(LayerFuseError):
    """A fused model changes when it is saved and loaded, or when it decodes with a cache."""


class LayerFuseWarning(UserWarning):
    """A result is valid, but probably not the result that the user wants."""
