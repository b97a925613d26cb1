"""The built-in data: drawn scenes whose every fact is known."""
