"""The errors that users meet, in one place; each message says what is wrong, where, and what to do."""

from tilewright.ir.errors import (
    CacheError,
    CaptureError,
    CompilerNotFoundError,
    DeviceError,
    InputError,
    KernelBuildError,
    LoweringError,
    OptionError,
    ParseError,
    TilewrightError,
    VerifyError,
)


class MissingPackageError(TilewrightError):
    """An optional package is not installed."""


class WeightsError(TilewrightError):
    """A model's weights or tokenizer are not installed, or cannot be read."""


__all__ = [
    "CacheError",
    "CaptureError",
    "CompilerNotFoundError",
    "DeviceError",
    "InputError",
    "KernelBuildError",
    "LoweringError",
    "MissingPackageError",
    "OptionError",
    "ParseError",
    "TilewrightError",
    "VerifyError",
    "WeightsError",
]
