"""Command line: parsing and printing only."""
