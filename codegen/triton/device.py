"""What the cost model and the printers know of a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Device:
    """A GPU in numbers: rates that kernels reach, not those of data sheets, where the two are known to differ.

    arch: compute capability, 90 for 9.0. bandwidth and cache_bandwidth: bytes/s of device memory and of the
    second-level cache. latency: seconds from a load's issue to its data. tensor_flops: half-precision FLOP/s of its
    tensor cores; vector_flops: float32 FLOP/s of its other units. shared: bytes of shared memory that the programs of
    one multiprocessor have together, and that one program may have. launch: seconds that a kernel in a CUDA graph costs
    beside its work.
    """

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float
    cache_bandwidth: float
    latency: float
    tensor_flops: float
    vector_flops: float
    shared: int
    launch: float

    @property
    def has_dependent_launch(self) -> bool:
        """Whether a kernel may start before its predecessor has ended (programmatic dependent launch)."""
        return self.arch >= 90

    @property
    def has_f8(self) -> bool:
        """Whether it has instructions that convert 8-bit floats."""
        return self.arch >= 89

    @property
    def has_descriptors(self) -> bool:
        """Whether a unit of its own copies blocks of matrices to shared memory (the tensor memory accelerator)."""
        return self.arch >= 90


# Bandwidths and tensor rate of the H100 as measured: of reading memory, of the tiles of a product of 1024 rows on their
# way to its programs, of a bfloat16 product of 8192 cubed. Latency after Luo et al., "Benchmarking and Dissecting the
# Nvidia Hopper GPU Architecture", 2024. Nothing of the A100 was measured.
H100 = Device("H100 80 GB", 90, 132, 3.06e12, 9.5e12, 0.65e-6, 798e12, 60e12, 227 * 1024, 1.3e-6)
A100 = Device("A100 80 GB", 80, 108, 1.75e12, 6.5e12, 0.6e-6, 270e12, 19e12, 163 * 1024, 1.5e-6)


def device_like(
    name: str, arch: int, multiprocessors: int, bandwidth: float = 0.0, shared: int = 0
) -> Device:
    """The nearest known device, scaled to a number of multiprocessors; with a bandwidth in bytes/s, and the bytes of
    shared memory that a program may have, where these are known (above 0)."""
    nearest = H100 if arch >= 90 else A100
    share = multiprocessors / nearest.multiprocessors
    return replace(
        nearest,
        name=name,
        arch=arch,
        multiprocessors=multiprocessors,
        bandwidth=bandwidth or nearest.bandwidth * share,
        cache_bandwidth=nearest.cache_bandwidth * share,
        shared=shared or nearest.shared,
        tensor_flops=nearest.tensor_flops * share,
        vector_flops=nearest.vector_flops * share,
    )
