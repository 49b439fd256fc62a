"""Pure functions on tensors: torch and scipy only; no modules, no files, no configs."""
