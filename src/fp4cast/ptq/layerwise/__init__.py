"""Calibrate a model one layer at a time. Knows transformers' layers and loader; quantizes and writes nothing."""
