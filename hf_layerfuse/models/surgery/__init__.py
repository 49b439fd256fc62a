"""Reshaping a model by a plan."""
