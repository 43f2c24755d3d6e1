"""The numerics study: every algorithm, every scenario, measured on what would be written. It begins in `survey`."""
