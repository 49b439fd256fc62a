"""LayerMerge: which convolutions become one."""
