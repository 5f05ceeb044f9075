"""Every pass, and the whole pipeline, keeps the meaning of random modules.

Two comparisons, both under the reference evaluator: with every float as float64 to 1e-5, which only constants folded in
float32 may use up; and, for float32 modules, in their own dtype to 1e-3 of each result's size, since sums may be
reordered.
"""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.strategies import Case, examples, modules
from tilewright.ir.module import Module, walk
from tilewright.ir.verify import verify_module
from tilewright.passes.base import PassOptions
from tilewright.passes.pipeline import PASSES, PIPELINE, run_passes


def options_for(case: Case, splits: int = 0, vendor: bool = False, plain: bool = False) -> PassOptions:
    """A decode program where the case can be one, else a prefill program."""
    decode = case.dims["S"] == 1
    return PassOptions(
        case.fixed if decode else (),
        splits=splits if decode else 0,
        vendor_matmul=vendor,
        plain_rows=plain,
        plain_weights=plain,
    )


def assert_close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float, text: str) -> None:
    assert len(found) == len(expected)
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        size = max(1.0, float(b.double().abs().max())) if b.numel() else 1.0
        torch.testing.assert_close(
            a, b, rtol=tolerance, atol=tolerance * size, msg=lambda m, n=n: f"result {n}: {m}\n{text}"
        )


def check(case: Case, module: Module) -> None:
    """``module`` is valid, and gives what ``case.module`` gives, results and KV state."""
    verify_module(module)
    after, before = dict(case.state), dict(case.state)
    exact = case.run(module, exact=True, state=after)
    assert_close(exact, case.run(exact=True, state=before), 1e-5, str(module))
    assert after.keys() == before.keys()
    assert_close(list(after.values()), [before[name] for name in after], 1e-5, str(module))
    if all(v.dtype.name != "bf16" for f in case.module.functions for op in f.ops for v in op.results):
        assert_close(case.run(module), case.run(), 1e-3, str(module))


@pytest.mark.parametrize("name", [n for n in PASSES if n != "last_tokens"])
@examples(25)
@given(modules(), st.integers(0, 3))
def test_each_pass_keeps_the_meaning(name: str, case: Case, splits: int) -> None:
    """A rewrite that is wrong for some shape, dtype or use of a value."""
    check(case, PASSES[name].run(case.module, options_for(case, splits, vendor=True)))


@examples(60)
@given(modules(), st.integers(0, 3), st.booleans(), st.booleans())
def test_the_pipeline_keeps_the_meaning(case: Case, splits: int, vendor: bool, plain: bool) -> None:
    """Passes that are right alone and wrong together; and a result that still holds unfused ops."""
    module = run_passes(case.module, options_for(case, splits, vendor, plain))
    check(case, module)
    for function in module.functions:
        if not function.name.endswith(".weights"):
            assert {op.opcode for op in function.ops} <= {"kernel", "param", "call", "call_torch"}


@examples(25)
@given(modules(), st.integers(0, 2))
def test_running_a_pass_again_keeps_the_meaning(case: Case, splits: int) -> None:
    """A pass that cannot read its own output: the pipeline runs several of them twice."""
    options = options_for(case, splits)
    unfused = tuple(p for p in PIPELINE if p.name != "fuse")
    once = run_passes(case.module, options, unfused)
    check(case, run_passes(once, options, unfused))


@examples(40)
@given(modules(), st.data())
def test_last_tokens_slices_the_first_result(case: Case, data: st.DataObject) -> None:
    """Logits of the wrong positions."""
    last = data.draw(st.integers(1, case.dims["S"]))
    module = PASSES["last_tokens"].run(case.module, PassOptions(last_tokens=True))
    verify_module(module)
    expected = list(case.run(exact=True))
    first = case.module.main.returns[0]
    if first.type.rank >= 2 and first.shape[1].is_Symbol and first.shape[1].name == "S":
        expected[0] = expected[0][:, -last:]
        assert "L" in {name for name, _, _ in module.symbols}
    sized = case._replace(dims=case.dims | {"L": last})
    assert_close(sized.run(module, exact=True), expected, 1e-5, str(module))


def kinds(module: Module) -> list[str]:
    return [op.opcode for f in module.functions for op in walk(f.ops)]


@examples(40)
@given(modules(calls=False))
def test_passes_shrink(case: Case) -> None:
    """Dead or repeated ops that survive would be computed on every step."""

    def run(*names: str) -> Module:
        return run_passes(case.module, PassOptions(), tuple(PASSES[n] for n in names))

    once = run("dce")
    assert len(kinds(once)) <= len(kinds(case.module))
    assert run("dce", "dce") == once
    shared = run("cse", "dce")
    assert len(kinds(shared)) <= len(kinds(once))
    assert run("cse", "dce", "cse", "dce") == shared
    canonical = run("canonicalize", "cse", "dce")
    again = run("canonicalize", "cse", "dce", "canonicalize", "cse", "dce")
    assert kinds(again) == kinds(canonical)
