"""Pictures with captions, from anywhere, in one seeded order."""
