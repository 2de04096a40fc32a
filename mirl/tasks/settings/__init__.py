"""Options of the commands that train: one dataclass each.

It is the Python arguments, the flags, `config.yaml` and what a resumed run must agree with.
"""
