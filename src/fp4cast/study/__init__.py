"""The numerics study: every algorithm on every scenario; it begins in `survey`. Knows tensors, but no checkpoint."""
