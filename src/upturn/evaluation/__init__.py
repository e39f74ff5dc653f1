"""Measuring: turn curves, flips between turns, intervals and equal-token baselines, from scored attempts."""
