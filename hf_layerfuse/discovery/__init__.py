"""Finding the architecture of a model from one forward pass, and verifying it."""

from .blocks import DiscoveredBlock
from .discovery import Discovery, discover_architecture

__all__ = ["DiscoveredBlock", "Discovery", "discover_architecture"]
