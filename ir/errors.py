"""Typed errors: every failure that a user can meet, each naming what is wrong, where, and what to do.

They live in the lowest package because the IR, the runtime and the compiler all raise them;
``tilewright.errors`` re-exports them for users.
"""


class TilewrightError(Exception):
    """Base of every error that tilewright raises on purpose."""


class OptionError(TilewrightError, ValueError):
    """An option of ``tilewright.compile`` or of the command line has an unusable value."""


class InputError(TilewrightError, ValueError):
    """The tensors given to a compiled model do not fit it (dtype, shape, length, batch, range)."""


class CaptureError(TilewrightError):
    """The model could not be captured as a graph."""


class LoweringError(TilewrightError):
    """A captured graph could not be translated into the IR."""


class VerifyError(TilewrightError):
    """A module, loop form or program breaks a rule of its stage."""


class ParseError(TilewrightError, ValueError):
    """A piece of IR text is malformed."""


class CompilerNotFoundError(TilewrightError):
    """No usable C++ compiler was found."""


class KernelBuildError(TilewrightError):
    """Generated source failed to compile or to load."""


class CacheError(TilewrightError):
    """The cache folder can not be trusted or used."""


class DeviceError(TilewrightError):
    """The requested backend does not fit the device or what is installed."""
