"""What recurrent ops mean, beside Hugging Face's functions, and what the verifier says of those that mean nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.mamba import modeling_mamba as theirs
from transformers.models.mamba2 import modeling_mamba2 as mamba2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from tilewright.ir.builder import Builder
from tilewright.ir.errors import VerifyError
from tilewright.ir.module import Function, Module
from tilewright.ir.parser import parse_module
from tilewright.ir.printer import print_module
from tilewright.ir.reference import evaluate
from tilewright.ir.types import tensor_type
from tilewright.ir.verify import verify_module

B, C, K, N, G, H = 2, 6, 4, 3, 2, 4


def convolution(bias: bool = True) -> Module:
    b = Builder()
    operands = [b.param_value("x", tensor_type("f32", ["B", "S", C]))]
    operands += [b.param_value("w", tensor_type("f32", [K, C]))]
    operands += [b.param_value("bias", tensor_type("f32", [C]))] if bias else []
    y, _ = b.add_multi("causal_conv1d", *operands, slot="conv")
    return module_of(b, y)


def scan() -> Module:
    b = Builder()
    x, dt = (b.param_value(n, tensor_type("f32", ["B", "S", C])) for n in ("x", "dt"))
    decay = b.param_value("decay", tensor_type("f32", [N, C]))
    ends = [b.param_value(n, tensor_type("f32", ["B", "S", N])) for n in ("into", "out_of")]
    y, _ = b.add_multi("selective_scan", x, dt, decay, *ends, slot="scan")
    return module_of(b, y)


def linear(compares: bool = True, rates: int = 1) -> Module:
    b = Builder()
    q, k = (b.param_value(n, tensor_type("f32", ["B", "S", G, N])) for n in ("q", "k"))
    operands = [q, k, b.param_value("v", tensor_type("f32", ["B", "S", H, C]))]
    operands += [b.param_value("decay", tensor_type("f32", ["B", "S", H, rates]))]
    operands += [b.param_value("beta", tensor_type("f32", ["B", "S", H]))] if compares else []
    y, _ = b.add_multi("linear_attention", *operands, slot="memory")
    return module_of(b, y)


def module_of(b: Builder, result: object) -> Module:
    main = Function("main", tuple(b.params), tuple(b.ops), (result,))  # type: ignore[arg-type]
    return Module((main,), (("B", 1, 4), ("S", 1, 16)))


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def in_pieces(module: Module, given: dict[str, Tensor], pieces: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The results of all pieces, and the state that they leave; operands with tokens have them at axis 1."""
    state: dict[str, Tensor] = {}
    found, start = [], 0
    for size in pieces:
        piece = {n: t[:, start : start + size] if t.ndim >= 3 else t for n, t in given.items()}
        found += evaluate(module, piece, {}, {"B": B, "S": size}, state, exact=True)
        start += size
    (left,) = state.values()
    return torch.cat(found, dim=1), left


PIECES = [(7,), (1,) * 7, (2, 1, 4), (5, 2)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pieces", PIECES)
def test_a_convolution_is_hugging_faces(pieces: tuple[int, ...], bias: bool) -> None:
    """However the tokens come in pieces, and though fewer of them than taps come at first."""
    given = {"x": drawn(B, 7, C), "w": drawn(K, C, seed=1)} | ({"bias": drawn(C, seed=2)} if bias else {})
    found, left = in_pieces(convolution(bias), given, pieces)
    x = given["x"].transpose(1, 2)
    expected = theirs.causal_conv1d_fn(x, given["w"].t(), given.get("bias"))
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(left, given["x"][:, 1 - K :])


@pytest.mark.parametrize("pieces", PIECES)
def test_a_scan_is_hugging_faces(pieces: tuple[int, ...]) -> None:
    given = {
        "x": drawn(B, 7, C), "dt": drawn(B, 7, C, seed=1).exp(), "decay": -drawn(N, C, seed=2).exp(),
        "into": drawn(B, 7, N, seed=3), "out_of": drawn(B, 7, N, seed=4),
    }  # fmt: skip
    found, left = in_pieces(scan(), given, pieces)
    x, dt, into, out_of = (given[n].transpose(1, 2) for n in ("x", "dt", "into", "out_of"))
    decay = given["decay"].t()
    expected, state = theirs.mamba_selective_scan(x, dt, decay, into, out_of, return_last_state=True)
    # Theirs rounds what goes into the state to float32.
    torch.testing.assert_close(found.transpose(1, 2), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.transpose(1, 2), state, rtol=1e-5, atol=1e-5)
    held = torch.zeros(B, C, N, dtype=torch.float64)
    for s in range(7):
        step = (x[..., s], dt[..., s], decay, into[..., s], out_of[..., s])
        one = theirs.mamba_selective_state_update(held, *step)
        torch.testing.assert_close(found[:, s], one, rtol=1e-5, atol=1e-5)


def parts() -> dict[str, Tensor]:
    return {
        "q": drawn(B, 7, G, N), "k": drawn(B, 7, G, N, seed=1), "v": drawn(B, 7, H, C, seed=2),
        "decay": -drawn(B, 7, H, 1, seed=3).exp(), "beta": drawn(B, 7, H, seed=4).sigmoid(),
    }  # fmt: skip


@pytest.mark.parametrize("pieces", PIECES)
def test_a_gated_delta_rule_is_hugging_faces(pieces: tuple[int, ...]) -> None:
    """Theirs divides queries by the root of their size, and computes in float32."""
    given = parts()
    found, left = in_pieces(linear(), given, pieces)
    q, k = (given[n].repeat_interleave(H // G, dim=2) for n in ("q", "k"))
    theirs_, state = qwen.torch_recurrent_gated_delta_rule(
        q * N**0.5, k, given["v"], g=given["decay"][..., 0], beta=given["beta"], output_final_state=True
    )
    torch.testing.assert_close(found, theirs_, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, state.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", PIECES)
def test_a_decay_of_each_row_is_hugging_faces(pieces: tuple[int, ...]) -> None:
    given = parts() | {"decay": -drawn(B, 7, H, N, seed=5).exp()}
    found, left = in_pieces(linear(rates=N), given, pieces)
    q, k = (given[n].repeat_interleave(H // G, dim=2) for n in ("q", "k"))
    theirs_, state = kimi.recurrent_kimi_delta_attention(
        q * N**0.5, k, given["v"], given["decay"], given["beta"], None, output_final_state=True
    )
    torch.testing.assert_close(found, theirs_, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, state.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pieces", PIECES)
def test_mamba_2_is_linear_attention(pieces: tuple[int, ...]) -> None:
    """Its queries, keys and values are C, B and the inputs by their time steps."""
    given = {n: t for n, t in parts().items() if n != "beta"}
    dt, rate = drawn(B, 7, H, seed=6).exp(), -drawn(H, seed=7).exp()
    x = given["v"]
    given |= {"v": x * dt[..., None], "decay": (rate * dt)[..., None]}
    found, left = in_pieces(linear(compares=False), given, pieces)
    expected, state = mamba2.mamba2_chunk_scan(
        x, dt, rate, given["k"], given["q"], chunk_size=4, return_final_states=True
    )
    torch.testing.assert_close(found, expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left.transpose(2, 3), state.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [convolution, scan, linear])
def test_text_goes_both_ways(make: object) -> None:
    module = make()  # type: ignore[operator]
    verify_module(module)
    assert parse_module(print_module(module)) == module


PARAMS = {
    "x": "f32[B, S, 6]", "w": "f32[4, 6]", "d": "f32[3, 6]", "e": "f32[B, S, 3]", "h": "bf16[B, S, 6]",
    "q": "f32[B, S, 2, 3]", "v": "f32[B, S, 4, 6]", "o": "f32[B, S, 3, 6]", "g": "f32[B, S, 4, 1]",
    "b": "f32[B, S, 4]",
}  # fmt: skip
TEXT = """
entry @main
symbol B [1, 4]
symbol S [1, 16]

func @main({params}) -> (%y) {{
  %y, %s = {op}
}}
"""
CONV = "f32[B, S, 6], f32[B, 3, 6]"
SCAN = "f32[B, S, 6], f32[B, 3, 6]"
LINEAR = "f32[B, S, 4, 6], f32[B, 4, 3, 6]"
WRONG = {
    "taps first": (f'causal_conv1d %x, %e {{slot = "s"}} : ({CONV})', r"weight is \[K, 6\]"),
    "a bias": (f'causal_conv1d %x, %w, %d {{slot = "s"}} : ({CONV})', r"bias is \[6\]"),
    "no slot": (f'causal_conv1d %x, %w {{slot = ""}} : ({CONV})', "needs a slot"),
    "too few operands": (f'causal_conv1d %x {{slot = "s"}} : ({CONV})', "takes 2 or 3 operands"),
    "a step": (f'selective_scan %x, %e, %d, %e, %e {{slot = "s"}} : ({SCAN})', "dt is f32"),
    "a decay": (f'selective_scan %x, %x, %e, %e, %e {{slot = "s"}} : ({SCAN})', r"decay is f32\[N, 6\]"),
    "ends": (f'selective_scan %x, %x, %d, %e, %x {{slot = "s"}} : ({SCAN})', "input and output are"),
    "a type": (f'selective_scan %h, %h, %d, %e, %e {{slot = "s"}} : ({SCAN})', "input and output are bf16"),
    "no rates": (f'linear_attention %q, %q, %v {{slot = "s"}} : ({LINEAR})', "takes 4 or 5 operands"),
    "values": (f'linear_attention %q, %q, %x, %g {{slot = "s"}} : ({LINEAR})', r"v is \[B, S, H, D\]"),
    "keys": (
        f'linear_attention %q, %v, %v, %g {{slot = "s"}} : ({LINEAR})',
        r"q and k are f32\[B, S, G, N\]",
    ),
    "groups": (f'linear_attention %q, %q, %o, %g {{slot = "s"}} : ({LINEAR})', "2 groups of 3 heads"),
    "fading": (f'linear_attention %q, %q, %v, %q {{slot = "s"}} : ({LINEAR})', "decay is"),
    "parts": (f'linear_attention %q, %q, %v, %g, %g {{slot = "s"}} : ({LINEAR})', "beta is"),
    "no memory": (f'linear_attention %q, %q, %v, %g {{slot = ""}} : ({LINEAR})', "needs a slot"),
    "rank": (f'selective_scan %w, %w, %d, %e, %e {{slot = "s"}} : ({SCAN})', r"x is \[B, S, C\]"),
    "the state": (
        'selective_scan %x, %x, %d, %e, %e {slot = "s"} : (f32[B, S, 6], bf16[B, 3, 6])',
        "result types are",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_means_nothing_is_refused(case: str) -> None:
    op, message = WRONG[case]
    params = ", ".join(f"%{name}: {type}" for name, type in PARAMS.items())
    with pytest.raises(VerifyError, match=message):
        verify_module(parse_module(TEXT.format(op=op, params=params)))
