"""Stage 1: the discrete VAE, pixels ↔ a grid of codes."""
