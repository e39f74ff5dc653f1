"""Scored drafts into pairs, or groups of drafts with a number each. One file per rule; the folder is the registry."""
