"""Options of commands: one dataclass each. Nothing here imports PyTorch outside functions, because help must not wait.

It is the Python arguments and the flags; of a command that trains also `config.yaml` and what a resumed run must agree
with.
"""
