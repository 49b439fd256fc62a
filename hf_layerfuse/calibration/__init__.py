"""Calibration data, and the layer-wise forward of a model on it."""
