"""What to try next, and what to end early."""
