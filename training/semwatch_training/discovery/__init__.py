"""Stage C: how many classes there are, which crop is of which, and the head that is deployed."""
