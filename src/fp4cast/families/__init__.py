"""MXFP4 checkpoints that we read, one file a family. Knows how codes and scales are stored, not what they become."""
