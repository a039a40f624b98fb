"""From activations to a verified choice of direction."""
