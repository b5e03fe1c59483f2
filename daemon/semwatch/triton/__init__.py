"""A Triton server in the place of the embedded runtime: its installation, its view of the models, its client."""
