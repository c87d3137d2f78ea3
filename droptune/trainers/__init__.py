"""Training K assignments, each as if alone: solo, or fused into one program."""
