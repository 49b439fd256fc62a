"""Model and recipe in, plan out: one file per published system."""
