"""Stage 2: the prior, a sparse transformer over text and image tokens."""
