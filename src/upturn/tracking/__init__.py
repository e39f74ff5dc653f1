"""Progress and events: shown in the terminal, kept in the run folder, sent to trackers."""
