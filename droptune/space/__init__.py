"""The search space: which sites share a rate, and where each is searched."""
