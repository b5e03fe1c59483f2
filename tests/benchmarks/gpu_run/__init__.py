"""Speed of the torch networks on a GPU, against the arithmetic floor of the same card."""
