"""How a plan reshapes a model."""
