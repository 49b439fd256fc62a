"""Finding the architecture of a model from one forward pass, and verifying it."""

from .blocks import DiscoveredBlock
from .discovery import Discovery, discover_architecture
from .unknown import ensure_architecture, is_unknown

__all__ = ["DiscoveredBlock", "Discovery", "discover_architecture", "ensure_architecture", "is_unknown"]
