"""What goes wrong between forms of weights, for every module that reads or writes one."""


class InterchangeError(ValueError):
    """Weights that cannot be taken or given, said in one line."""
