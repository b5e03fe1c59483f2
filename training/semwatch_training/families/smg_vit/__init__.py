"""Stage B: from a crop and its soft mask to features; self-supervision of the encoder."""
