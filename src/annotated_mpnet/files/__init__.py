"""Files that are written completely or not at all. Any room may import it; it imports only errors."""
