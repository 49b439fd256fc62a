"""Fused models: built, loaded, saved, verified."""

from . import modeling  # noqa: F401 - it registers the architectures, which every module here looks up
