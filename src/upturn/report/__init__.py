"""Showing: a run as one self-contained page, as terminal tables, and as one plain sentence."""
