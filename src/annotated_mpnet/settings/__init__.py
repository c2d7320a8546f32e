"""What a command can be told: flags, presets and configuration files.

    config.py        the settings of a run, as dataclasses: one field, one flag
    commands.py      the four commands and their own flags
    fields.py        name, type, range and help of each field, read from the dataclasses
    parsing.py       command line -> command
    foreign_flags.py what other tools call these flags
    config_file.py   presets, --config, --print-config

Every room above `mpnet/` may import this one. Of the others it imports only `errors` and
`mpnet/config.py`, neither of which needs torch, so `--help` answers at once.
"""
