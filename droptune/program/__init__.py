"""The user's model, data, loss and metrics: loaded, checked, described."""
