"""The one error class a person is meant to read."""


class UserError(Exception):
    """Something the person running the command can fix.

    The message says what is wrong, where (file and line), and what to do, in one or two
    sentences. Commands print it without a traceback and exit with code 2. Every other
    exception is a bug and keeps its traceback.
    """
