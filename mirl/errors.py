"""Mistakes that a user can mend."""


class UserError(ValueError):
    """A user's mistake: one line that says what was given, what is allowed and what to do.

    The command line prints it and exits with code 2, without a traceback.
    """
