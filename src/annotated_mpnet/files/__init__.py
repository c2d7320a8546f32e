"""Files that are written whole or not at all, and read into typed records or refused.

`atomic.py` writes a file or a directory; `output.py` decides where a command may write its own;
`records.py` reads JSON. Any room may import them.
"""
