// CPU kernels of expert tables' gradients: (token, expert) pairs sorted by expert, gradient rows and their norms.

#include "rows.h"

using namespace titan_peer;

extern "C" {

// Stable radix sort of the P pairs by expert, without those with a negative index; the cost grows with P and the digits of N,
// not with N. Returns the number of runs, or -1 if an index is not below N. Work space: keys and swap, [2, P] each.
int64_t titan_peer_sort_pairs(const int64_t* indices, int64_t P, int64_t N, uint32_t* keys, int32_t* swap,
                              int32_t* order, int32_t* row_ids, int32_t* run_starts) {
    constexpr int kBits = 11, kBuckets = 1 << kBits;
    int digits = 1;
    while (digits * kBits < 32 && (int64_t(1) << (digits * kBits)) < N) ++digits;
    uint32_t *key_in = keys, *key_out = keys + P;
    int32_t *place_in = swap, *place_out = swap + P;
    int64_t present = 0;
    bool outside = false;
    for (int64_t i = 0; i < P; ++i) {
        key_in[present] = uint32_t(indices[i]);
        place_in[present] = int32_t(i);
        present += indices[i] >= 0;
        outside |= indices[i] >= N;
    }
    if (outside) return -1;
    P = present;
    std::vector<int64_t> start(kBuckets);
    for (int digit = 0; digit < digits; ++digit) {
        const int shift = digit * kBits;
        std::fill(start.begin(), start.end(), 0);
        for (int64_t i = 0; i < P; ++i) ++start[(key_in[i] >> shift) & (kBuckets - 1)];
        int64_t sum = 0;
        for (auto& s : start) {
            int64_t count = s;
            s = sum;
            sum += count;
        }
        for (int64_t i = 0; i < P; ++i) {
            int64_t to = start[(key_in[i] >> shift) & (kBuckets - 1)]++;
            key_out[to] = key_in[i];
            place_out[to] = place_in[i];
        }
        std::swap(key_in, key_out);
        std::swap(place_in, place_out);
    }
    int64_t R = 0;
    for (int64_t i = 0; i < P; ++i) {
        order[i] = place_in[i];
        if (i == 0 || key_in[i] != key_in[i - 1]) {
            row_ids[R] = int32_t(key_in[i]);
            run_starts[R++] = int32_t(i);
        }
    }
    run_starts[R] = int32_t(P);
    return R;
}

// Gradient rows into out [*, E, D]: at the run's number (compact) or at the expert's; with `add`, added to its contents.
void titan_peer_table_gradient(const int32_t* order, const int32_t* row_ids, const int32_t* run_starts, int64_t R,
                               const float* weights, const float* vectors, float* out, int64_t compact, int64_t add,
                               int64_t K, int64_t E, int64_t D, int64_t threads) {
    Factors factors{order, run_starts, weights, vectors, K, E, D};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (int64_t r = 0; r < R; ++r) {
        float* to = out + (compact ? r : int64_t(row_ids[r])) * E * D;
        add ? factors.add_row(r, to) : factors.row(r, to);
    }
}

// Squared norms of the gradient rows into squares [R]; the caller sums them in order.
void titan_peer_row_norms(const int32_t* order, const int32_t* run_starts, int64_t R, const float* weights,
                          const float* vectors, double* squares, int64_t K, int64_t E, int64_t D, int64_t threads) {
    Factors factors{order, run_starts, weights, vectors, K, E, D};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> gradient(E * D);
        float* g = gradient.data();
#pragma omp for schedule(dynamic, 256)
        for (int64_t r = 0; r < R; ++r) {
            factors.row(r, g);
            squares[r] = dot(g, g, E * D);
        }
    }
}

}  // extern "C"
