"""Prompts with their verifiers. One file each; the folder is the registry."""
