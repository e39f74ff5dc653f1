"""Which earlier drafts the next one sees. One file each; the folder is the registry."""
