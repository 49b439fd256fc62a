"""LayerCollapse: which MLPs become linear."""
