"""Durable steps: what is done is read back, what has changed is redone, and a kill costs seconds."""
