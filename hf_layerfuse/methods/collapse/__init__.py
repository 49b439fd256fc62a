"""LayerCollapse: choose which MLPs become linear."""
