"""Files that are written whole or not at all. Any room may import it; it imports no other room."""
