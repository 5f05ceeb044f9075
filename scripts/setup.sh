#!/usr/bin/env bash
# Finds a Python that can carry the project and hands over to setup_env.py. Usage: setup.sh VENV LEVEL
# PYTHON=/path/to/python overrides the choice. A Python that already has a CUDA build of torch is preferred.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

fail() {
    printf 'tilewright: %s\n' "$1" >&2
    exit 1
}

# Prints 'cuda' or 'plain' when the interpreter runs, has a fitting version and can make virtual environments.
probe() {
    "$1" - <<'PY' 2>/dev/null
import ensurepip, importlib.util, pathlib, re, sys, venv

if sys.version_info[:2] not in ((3, 11), (3, 12)):
    sys.exit(1)
spec = importlib.util.find_spec("torch")
kind = "plain"
if spec is not None and spec.origin:
    text = (pathlib.Path(spec.origin).parent / "version.py").read_text()
    release = re.search(r"__version__ = '(\d+)\.(\d+)", text)
    has_cuda = re.search(r"^cuda\b.*= '", text, re.MULTILINE)
    if release and has_cuda and tuple(map(int, release.groups())) >= (2, 11):
        kind = "cuda"
print(kind)
PY
}

command -v g++ >/dev/null || fail "g++ was not found; the generated kernels need it. Install it (Debian/Ubuntu: apt-get install g++)."

chosen=""
for candidate in ${PYTHON:-python3.11 python3.12 python3 python}; do
    command -v "$candidate" >/dev/null || continue
    kind=$(probe "$candidate") || continue
    [ -n "$chosen" ] && [ "$kind" = plain ] && continue
    chosen=$candidate
    [ "$kind" = cuda ] && break
done
[ -n "$chosen" ] || fail "no usable Python 3.11 or 3.12 (with the venv module) was found${PYTHON:+ at PYTHON=$PYTHON}. \
Install one (Debian/Ubuntu: apt-get install python3.12 python3.12-venv) or name it: make PYTHON=/path/to/python3.12 ..."

exec "$chosen" "$here/setup_env.py" "$1" "$2"
