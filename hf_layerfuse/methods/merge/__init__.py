"""LayerMerge: choose which convolutions to merge."""
