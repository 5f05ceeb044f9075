// Reads a buffer once with all threads. Each reads its own contiguous part as four streams side by side, which keeps
// more prefetches under way than one stream does and comes closest to what the memory gives.
#include <cstddef>
#include <cstdint>

namespace {
constexpr std::size_t STREAMS = 4, PIECE = 32;
}

// The sum of data[0 .. count); count is a multiple of threads * 128.
extern "C" std::uint64_t read_all(const std::uint64_t* data, std::size_t count, int threads) {
    const std::size_t length = count / (std::size_t(threads) * STREAMS);
    std::uint64_t sum = 0;
#pragma omp parallel for schedule(static) reduction(+ : sum) num_threads(threads)
    for (int thread = 0; thread < threads; ++thread) {
        const std::uint64_t* const part = data + std::size_t(thread) * STREAMS * length;
        for (std::size_t i = 0; i < length; i += PIECE) {
            for (std::size_t stream = 0; stream < STREAMS; ++stream) {
                const std::uint64_t* const piece = part + stream * length + i;
                std::uint64_t total = 0;
#pragma omp simd reduction(+ : total)
                for (std::size_t k = 0; k < PIECE; ++k) total += piece[k];
                sum += total;
            }
        }
    }
    return sum;
}
