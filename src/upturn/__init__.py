"""upturn: make language models able to improve their own answers, and prove it."""

__version__ = "0.1.0"
