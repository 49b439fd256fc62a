"""Layer Fusion: choose which layers to fuse."""
