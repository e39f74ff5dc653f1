"""Loading and saving, chat templates, and log-probs of token trees: the room that knows `transformers`."""
