"""Calibration data, and hidden states of a model one layer at a time."""
