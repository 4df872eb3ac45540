"""One verb a file, from top to bottom, and beside it what that verb alone needs."""
