"""The one exception for what a user can put right."""


class UserError(Exception):
    """Something the user gave is wrong: a file, a configuration, an argument.

    The message says in one or two lines what is wrong, where (path, line, tensor), what was expected and what to do.
    The command line prints it without a traceback and exits with status 2; library callers see an ordinary exception.
    Raise it before any work is lost, and never for a bug of our own.
    """
