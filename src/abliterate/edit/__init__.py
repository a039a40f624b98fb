"""The edit as data, and its realisations: hooks, weights, adapters, GGUF."""
