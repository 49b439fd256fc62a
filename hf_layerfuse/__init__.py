"""Make a pretrained Hugging Face model smaller and faster by fusing its layers.

`__init__.pyi` lists the public names. Each is imported on first use, so that importing the package is fast.
"""

from importlib.metadata import version
from typing import Any

import lazy_loader
import wrapt

_lazy, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
__version__ = version("hf-layerfuse")

_NAMES_OF_0_1 = {
    "ChainAdapter": "ConvGraphArchitecture",
    "ConvAdapter": "ConvArchitecture",
    "Found": "SearchResult",
    "ModelAdapter": "Architecture",
    "TransformerAdapter": "TransformerArchitecture",
    "adapter_for": "architecture_for",
    "register_adapter": "register_architecture",
    "straighten": "linearize_mlps",
}
"""Names of public classes and functions in 0.1, kept for one release."""


def __getattr__(name: str) -> Any:
    return _lazy(_NAMES_OF_0_1.get(name, name))


def _register_fused_classes(read: Any, instance: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    from .models import modeling  # noqa: F401 - it registers the fused classes with the Auto classes

    return read(*args, **kwargs)


# Every Auto class first reads the config of a checkpoint. The fused classes are registered at that moment, when both
# libraries are fully imported. During the import of transformers, they would not be.
@wrapt.when_imported("transformers.models.auto.configuration_auto")
def _register_before_reading(configuration_auto: Any) -> None:
    wrapt.wrap_function_wrapper(configuration_auto, "AutoConfig.from_pretrained", _register_fused_classes)
