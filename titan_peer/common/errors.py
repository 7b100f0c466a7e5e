"""The exception for errors that the user can correct, printed as a message without a traceback; and the exit statuses."""


class UserError(Exception):
    """Bad input found before or during a job.

    The message names the key or file, the value found, what is allowed and, if it helps, what to do.
    Entry points print it on standard error and exit with status 2.
    """


USER_ERROR_STATUS = 2
NOT_FINITE_STATUS = 3
"""The loss or the gradient is NaN or infinite."""
FINAL_STATUSES = (USER_ERROR_STATUS, NOT_FINITE_STATUS)
"""Exit statuses of a job that would end in the same way if it were started again."""
