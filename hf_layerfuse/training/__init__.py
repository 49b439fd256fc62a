"""Healing on Accelerate."""
