"""From SRC to DST: decide, write, publish. Knows the order of things; the numbers come from `casting`."""
