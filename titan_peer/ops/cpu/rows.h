// What the kernels share: number formats of tables, sums over rows, and gradient rows made from their factors.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace titan_peer {

struct bfloat16 {
    uint16_t bits;
};
struct float16 {
    _Float16 value;
};

inline float widen(float v) { return v; }
inline float widen(bfloat16 v) {
    uint32_t bits = uint32_t(v.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
inline float widen(float16 v) { return float(v.value); }

// Prefetch all cache lines of a table row.
inline void prefetch(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}
inline void prefetch_to_write(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 1, 3);
}

template <class Row>
inline float dot(const Row* __restrict row, const float* __restrict x, int64_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; ++i) sum += widen(row[i]) * x[i];
    return sum;
}

template <class Row>
inline void add_scaled(float* __restrict y, const Row* __restrict row, float a, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) y[i] += a * widen(row[i]);
}

// Four rows at a time: x is read once for all of them, and the sums do not depend on one another.
template <class Row>
inline void dot4(const Row* __restrict r0, const Row* __restrict r1, const Row* __restrict r2, const Row* __restrict r3,
                 const float* __restrict x, int64_t n, float* out) {
    float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t i = 0; i < n; ++i) {
        s0 += widen(r0[i]) * x[i];
        s1 += widen(r1[i]) * x[i];
        s2 += widen(r2[i]) * x[i];
        s3 += widen(r3[i]) * x[i];
    }
    out[0] = s0, out[1] = s1, out[2] = s2, out[3] = s3;
}

template <class Row>
inline void add_scaled4(float* __restrict y, const Row* __restrict r0, const Row* __restrict r1,
                        const Row* __restrict r2, const Row* __restrict r3, const float* a, int64_t n) {
    const float a0 = a[0], a1 = a[1], a2 = a[2], a3 = a[3];
#pragma omp simd
    for (int64_t i = 0; i < n; ++i)
        y[i] += (a0 * widen(r0[i]) + a1 * widen(r1[i])) + (a2 * widen(r2[i]) + a3 * widen(r3[i]));
}

// The gradient of row `run` of a table, [E, D]: sum over the run's pairs of weight x vector, in the order of tokens.
struct Factors {
    const int32_t* order;
    const int32_t* run_starts;
    const float* weights;  // [P, E]
    const float* vectors;  // [T, D]
    int64_t K, E, D;

    void row(int64_t run, float* __restrict out) const {
        std::fill(out, out + E * D, 0.0f);
        add_row(run, out);
    }
    void add_row(int64_t run, float* __restrict out) const {
        for (int32_t i = run_starts[run]; i < run_starts[run + 1]; ++i) {
            int64_t pair = order[i];
            const float* vector = vectors + pair / K * D;
            for (int64_t e = 0; e < E; ++e) add_scaled(out + e * D, vector, weights[pair * E + e], D);
        }
    }
};

}  // namespace titan_peer
