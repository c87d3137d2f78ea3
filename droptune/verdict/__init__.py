"""Is it real: which confirmations are trained, and what follows from them."""
