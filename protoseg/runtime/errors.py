"""The error that a user can mend."""


class UserError(ValueError):
    """Something the user can mend: one line that says what is wrong, where, and what to do."""
