"""One batch through the network and back."""
