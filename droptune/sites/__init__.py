"""Where dropout acts in a model: found by watching it run, made tunable, set for production."""
