"""Scored drafts into pairs. One file per rule; the folder is the registry."""
