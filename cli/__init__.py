"""The command line: options in, one call, words and pictures out."""
