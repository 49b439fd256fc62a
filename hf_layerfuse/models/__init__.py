"""Fused models: built, loaded, saved, verified."""
