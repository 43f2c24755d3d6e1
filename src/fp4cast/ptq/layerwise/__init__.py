"""Calibration of one layer at a time. Knows transformers' layers and loader; quantizes and writes nothing."""
