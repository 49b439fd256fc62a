"""Every error of the package: each names the value, what is allowed and the next step."""


class LayerFuseError(ValueError):
    """Base of all errors raised on purpose by hf_layerfuse."""


class RecipeError(LayerFuseError):
    """What the user asks for is unknown, contradictory or out of reach."""


class PlanError(LayerFuseError):
    """A plan cannot be read, or does not fit the model it is applied to."""


class UnsupportedModelError(LayerFuseError):
    """No architecture knows the architecture, or the model is in a state that cannot be fused."""


class CheckpointError(LayerFuseError):
    """A checkpoint is missing, damaged, or would be overwritten."""


class DataError(LayerFuseError):
    """A data set is missing, empty, or lacks the columns a task needs."""


class TrainingError(LayerFuseError):
    """The loss of a training is not finite, or explodes."""


class PublishError(LayerFuseError):
    """The Hub cannot be reached, or refuses a result."""


class VerificationError(LayerFuseError):
    """A fused model does not survive saving and loading, or computes something else when cached."""


class LayerFuseWarning(UserWarning):
    """A result that is valid but most likely not what the user wants."""
