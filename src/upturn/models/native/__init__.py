"""Loops in C for what torch does in many small operations on a CPU, compiled once by the machine's own compiler."""
