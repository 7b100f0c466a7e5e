"""The one exception that means "the user can mend this": printed as a single message, without a traceback."""


class UserError(Exception):
    """Bad input found before or during a job.

    The message names the key or file, the value found, what is allowed and, where it helps, what to do.
    Entry points print it on standard error and exit with status 2.
    """
