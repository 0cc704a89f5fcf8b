"""Speed claims, one module each: `python -m benchmarks.wkv6` prints a ratio against a named peer and keeps it."""
