"""The arithmetic of the cast: arrays in, arrays out. Knows no file, no name and no config."""
