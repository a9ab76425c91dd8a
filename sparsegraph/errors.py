"""The typed errors of sparsegraph. Text: `<what failed> 'name': found X, need Y. Fix: Z`.

Every class carries the exit code that the command line returns for it.
"""

import re


class SparsegraphError(Exception):
    """Parent of all errors that a user can act on."""

    exit_code = 3


class Declined(SparsegraphError):
    """A node that this compiler does not lower; the text says why. Never reaches the user."""


class UsageError(SparsegraphError):
    """A wrong option, recipe, feed name, shape or dtype."""

    exit_code = 2


class CaptureError(SparsegraphError):
    """A model cannot be read: corrupt file, unsafe path, unbound dimension, unknown opset."""


class PassError(SparsegraphError):
    """A pass broke its own contract."""

    exit_code = 4


class UnsupportedError(SparsegraphError):
    """An op, target or feature that the requested machine cannot run."""


class VerifyError(SparsegraphError):
    """Outputs differ from the reference runtime."""

    exit_code = 4


class ArtefactError(SparsegraphError):
    """An artefact is damaged, modified, or made for another machine."""


class BudgetError(SparsegraphError):
    """A budget of time, size or quality that no choice of densities reaches."""

    exit_code = 5


def message(what: str, name: str, found: object, need: object, fix: str) -> str:
    """The one form of every error text."""
    return f"{what} '{name}': found {found}, need {need}. Fix: {fix}"


def one_line(error: BaseException) -> str:
    """What another library says, without line breaks and colours."""
    return " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())[:400]


def brief(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:300] or type(error).__name__
