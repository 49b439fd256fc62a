"""Metrics, latency, divergence, and what measuring needs."""
