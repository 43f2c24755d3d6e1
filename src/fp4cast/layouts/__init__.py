"""NVFP4 checkpoints that we write, one file a layout. Knows names, shapes and configs, but computes no scale."""
