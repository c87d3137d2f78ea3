"""The process that claims, trains and reports, and the one training loop."""
