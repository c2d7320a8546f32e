"""Files and directories that are written whole or not at all. Any room may import it."""
