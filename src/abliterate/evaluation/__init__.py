"""What an edit does: replies, judges, first tokens, divergences, capability."""
