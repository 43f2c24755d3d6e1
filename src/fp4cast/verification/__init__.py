"""The independent witness: reads SRC and DST and compares values. Knows nothing of how DST was made."""
