"""tilewright: compiles Hugging Face transformers to generated kernels for inference."""

from typing import TYPE_CHECKING, Any

from .errors import (
    CacheError,
    CaptureError,
    CompilerNotFoundError,
    DeviceError,
    InputError,
    KernelBuildError,
    LoweringError,
    MissingPackageError,
    OptionError,
    ParseError,
    TilewrightError,
    VerifyError,
    WeightsError,
)

if TYPE_CHECKING:
    from .api import compile as compile
    from .dynamo import reports as reports
    from .progress import Progress as Progress

__version__ = "0.1.0"

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
    "Progress",
    "TilewrightError",
    "VerifyError",
    "WeightsError",
    "__version__",
    "compile",
    "reports",
]

_LAZY = {"compile": "api", "reports": "dynamo", "Progress": "progress"}


def __getattr__(name: str) -> Any:
    """Imports what needs transformers when it is first asked for, so that ``tilewright.ir`` alone loads fast."""
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_LAZY[name]}", __name__), name)
