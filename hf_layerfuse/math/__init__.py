"""Pure functions on tensors. They use only torch, NumPy and SciPy: no modules, files or configs."""
