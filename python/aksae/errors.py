"""The failure a user can act on."""


class UserError(ValueError):
    """Bad input: one clear line naming the argument, what it got and what it needs."""
