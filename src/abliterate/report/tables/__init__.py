"""Parts of the record as tables on a terminal."""
