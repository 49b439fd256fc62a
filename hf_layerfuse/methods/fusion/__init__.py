"""Layer Fusion: which layers become one."""
