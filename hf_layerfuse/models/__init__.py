"""Building, loading, saving and verifying fused models."""

from . import modeling  # noqa: F401 - registers the architectures that every module here looks up
