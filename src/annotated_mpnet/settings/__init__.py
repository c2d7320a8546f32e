"""What a command can be told: flags, presets and configuration files.

    config.py        the settings of a run, as dataclasses: one field, one flag
    commands.py      the four commands and their own flags
    fields.py        name, type, range and help of each field, read from the dataclasses
    parsing.py       command line -> command
    foreign_flags.py what other tools call these flags
    config_file.py   presets, --config, --print-config
    reference.py     docs/configuration.md

Every room above `mpnet/` may import this one. It imports neither torch nor any other room, so
`--help` answers at once.
"""
