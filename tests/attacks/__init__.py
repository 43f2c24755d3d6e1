"""Attacks on the program: what it must survive, tried out by tools that run for as long as one likes."""
