"""Losses: pure tensors in, a sum and its weight out. One file each; the folder is the registry."""
