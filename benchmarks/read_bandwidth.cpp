// Reads a buffer once with all threads, each its own contiguous part, as a decode step reads weights.
#include <cstddef>
#include <cstdint>

extern "C" std::uint64_t read_all(const std::uint64_t* data, std::size_t count, int threads) {
    std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) num_threads(threads)
    for (std::size_t i = 0; i < count; i += 64) {
        std::uint64_t part = 0;
#pragma omp simd reduction(+ : part)
        for (std::size_t k = 0; k < 64; ++k) part += data[i + k];
        sum += part;
    }
    return sum;
}
