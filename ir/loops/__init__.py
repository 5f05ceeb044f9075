"""The loop form of a fused kernel: what both printers print.

Every tensor op of a kernel's body becomes a function of its index; views disappear into index expressions, and a
concat splits the iteration space at its seams. RoPE's ``concat(-x2, x1)`` and a gate beside its up-projection thus
turn into one segment with several dot products that share their row of ``a`` and read other rows of the weight:

    %k = kernel %x, %w, %cos, %sin { matmul, view, concat, mul, add }
    =>
    segment x0 < 9, x1 < 32:
      %q[x0, x1]      = dot(x[k0], w[64*x0 + x1, k0]) * cos[x1] - dot(x[k0], w[64*x0 + x1 + 32, k0]) * sin[x1]
      %q[x0, x1 + 32] = ...

Passes use it to decide whether a fusion is legal; printers and the memory planner read nothing else of a kernel.
"""

from .forms import (
    PRIMITIVES,
    AttentionForm,
    MatmulForm,
    attention_form,
    elementwise_inputs,
    flops,
    product_form,
    sole_op,
)
from .nodes import (
    Apply,
    Axis,
    Const,
    Dot,
    Index,
    Load,
    Loops,
    Node,
    Reduce,
    Segment,
    Store,
    free_symbols,
    post_order,
)
from .scalarize import scalarize
from .text import print_loops, print_node

__all__ = [
    "PRIMITIVES", "Apply", "AttentionForm", "Axis", "Const", "Dot", "Index", "Load", "Loops",
    "MatmulForm", "Node", "Reduce", "Segment", "Store", "attention_form", "elementwise_inputs", "flops",
    "free_symbols", "post_order", "print_loops", "print_node", "product_form", "scalarize",
    "sole_op",
]  # fmt: skip
