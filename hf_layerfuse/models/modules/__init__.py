"""Modules that fused models contain."""
