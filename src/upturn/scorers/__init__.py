"""Judgements of drafts. One file each; the folder is the registry."""
