"""Modules that stand in fused models."""
