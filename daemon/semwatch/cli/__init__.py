"""The command rooms: one module for each group of commands that `__main__` hangs into the tree."""
