"""Progress and metrics, as files first."""
