// CPU kernels of the expert operators, behind a plain C interface: compiled on first use, called through ctypes.
//
// All sums are float32. Each token, run of pairs or (head, axis) is owned by one thread and summed in one fixed order, so
// results do not depend on the number of threads or their scheduling. What bounds these kernels is the latency of reading
// expert rows from memory, so the rows of coming experts, known from the indices, are prefetched.
//
// Shapes: T tokens, K experts a token, N experts, E expert hidden size, D model dim, O output dim.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

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

// What stochastic rounding draws from: a hash of (seed, row, element), so a step can be repeated bit for bit.
inline uint32_t hash(uint64_t key) {
    key ^= key >> 33;
    key *= 0xff51afd7ed558ccdULL;
    key ^= key >> 33;
    key *= 0xc4ceb9fe1a85ec53ULL;
    return uint32_t(key >> 32);
}
inline void narrow(float v, uint64_t, float& out) { out = v; }
inline void narrow(float v, uint64_t key, bfloat16& out) {
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    out.bits = uint16_t((bits + (hash(key) & 0xffff)) >> 16);
}

// A table row takes several cache lines; ask for all of them.
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

enum Activation { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

inline float sigmoid(float z) { return 1.0f / (1.0f + std::exp(-z)); }

inline float activate(float z, int activation) {
    switch (activation) {
        case kGelu: return 0.5f * z * (1.0f + std::erf(z * 0.70710678f));
        case kGeluTanh: return 0.5f * z * (1.0f + std::tanh(0.79788456f * (z + 0.044715f * z * z * z)));
        case kRelu: return z > 0 ? z : 0;
        default: return z * sigmoid(z);
    }
}

inline float derivative(float z, int activation) {
    switch (activation) {
        case kGelu:
            return 0.5f * (1.0f + std::erf(z * 0.70710678f)) + z * 0.39894228f * std::exp(-0.5f * z * z);
        case kGeluTanh: {
            float t = std::tanh(0.79788456f * (z + 0.044715f * z * z * z));
            return 0.5f * (1.0f + t) + 0.5f * z * (1.0f - t * t) * 0.79788456f * (1.0f + 3 * 0.044715f * z * z);
        }
        case kRelu: return z > 0 ? 1.0f : 0.0f;
        default: {
            float s = sigmoid(z);
            return s * (1.0f + z * (1.0f - s));
        }
    }
}

constexpr int kAhead = 4;  // experts whose rows are asked for before they are needed

template <class Row>
int forward(const float* x, const int64_t* indices, const float* gates, const Row* down, const Row* up, float* y,
            float* z, int64_t T, int64_t K, int64_t N, int64_t E, int64_t D, int64_t O, int activation, int threads) {
    for (int64_t i = 0; i < T * K; ++i)
        if (uint64_t(indices[i]) >= uint64_t(N)) return 1;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const int64_t* chosen = indices + t * K;
        const float* xt = x + t * D;
        float* yt = y + t * O;
        float* zt = z + t * K * E;
        for (int64_t j = 0; j < std::min<int64_t>(kAhead, K); ++j) prefetch(down + chosen[j] * E * D, E * D * sizeof(Row));
        for (int64_t j = 0; j < K; ++j) {
            if (j + kAhead < K) prefetch(down + chosen[j + kAhead] * E * D, E * D * sizeof(Row));
            for (int64_t e = 0; e < E; ++e) zt[j * E + e] = dot(down + (chosen[j] * E + e) * D, xt, D);
        }
        std::fill(yt, yt + O, 0.0f);
        for (int64_t j = 0; j < std::min<int64_t>(kAhead, K); ++j) prefetch(up + chosen[j] * E * O, E * O * sizeof(Row));
        for (int64_t j = 0; j < K; ++j) {
            if (j + kAhead < K) prefetch(up + chosen[j + kAhead] * E * O, E * O * sizeof(Row));
            for (int64_t e = 0; e < E; ++e) {
                float hidden = gates[t * K + j] * activate(zt[j * E + e], activation);
                add_scaled(yt, up + (chosen[j] * E + e) * O, hidden, O);
            }
        }
    }
    return 0;
}

template <class Row>
void backward(const float* dy, const int64_t* indices, const float* gates, const float* z, const Row* down,
              const Row* up, float* dx, float* dgates, float* dz, float* hidden, int64_t T, int64_t K, int64_t E,
              int64_t D, int64_t O, int activation, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < T; ++t) {
        const int64_t* chosen = indices + t * K;
        const float* dyt = dy + t * O;
        float* dxt = dx + t * D;
        for (int64_t j = 0; j < std::min<int64_t>(kAhead, K); ++j) prefetch(up + chosen[j] * E * O, E * O * sizeof(Row));
        for (int64_t j = 0; j < K; ++j) {
            if (j + kAhead < K) prefetch(up + chosen[j + kAhead] * E * O, E * O * sizeof(Row));
            float gate = gates[t * K + j], dgate = 0;
            for (int64_t e = 0; e < E; ++e) {
                int64_t i = (t * K + j) * E + e;
                float u = dot(up + (chosen[j] * E + e) * O, dyt, O);
                float a = activate(z[i], activation);
                dgate += u * a;
                hidden[i] = gate * a;
                dz[i] = gate * u * derivative(z[i], activation);
            }
            dgates[t * K + j] = dgate;
        }
        std::fill(dxt, dxt + D, 0.0f);
        for (int64_t j = 0; j < std::min<int64_t>(kAhead, K); ++j) prefetch(down + chosen[j] * E * D, E * D * sizeof(Row));
        for (int64_t j = 0; j < K; ++j) {
            if (j + kAhead < K) prefetch(down + chosen[j + kAhead] * E * D, E * D * sizeof(Row));
            for (int64_t e = 0; e < E; ++e)
                add_scaled(dxt, down + (chosen[j] * E + e) * D, dz[(t * K + j) * E + e], D);
        }
    }
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
        for (int32_t i = run_starts[run]; i < run_starts[run + 1]; ++i) {
            int64_t pair = order[i];
            const float* vector = vectors + pair / K * D;
            for (int64_t e = 0; e < E; ++e) add_scaled(out + e * D, vector, weights[pair * E + e], D);
        }
    }
};

struct AdamW {
    float grad_scale, lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
};

template <class Param, class Moment>
void adamw_rows(Param* param, Moment* exp_avg, Moment* exp_avg_sq, float* row_second_moment, const Factors& factors,
                const int32_t* row_ids, int64_t R, const AdamW& a, uint64_t seed, int threads) {
    const int64_t width = factors.E * factors.D;
    const float decay = 1.0f - a.lr * a.weight_decay;
    const float step_size = a.lr / a.bias_correction1;
    const float root_correction = std::sqrt(a.bias_correction2);
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> gradient(width);
        float* __restrict g = gradient.data();
#pragma omp for schedule(dynamic, 256)
        for (int64_t r = 0; r < R; ++r) {
            if (r + 1 < R) {
                int64_t next = row_ids[r + 1] * width;
                prefetch_to_write(param + next, width * sizeof(Param));
                prefetch_to_write(exp_avg + next, width * sizeof(Moment));
                if (exp_avg_sq) prefetch_to_write(exp_avg_sq + next, width * sizeof(Moment));
            }
            factors.row(r, g);
            const int64_t row = row_ids[r];
            Param* __restrict p = param + row * width;
            Moment* __restrict m = exp_avg + row * width;
            const uint64_t key = (seed * 0x9e3779b97f4a7c15ULL) ^ (uint64_t(row) * width * 3);
            if (exp_avg_sq) {
                Moment* __restrict v = exp_avg_sq + row * width;
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    float gi = g[i] * a.grad_scale;
                    float mi = widen(m[i]) + (1.0f - a.beta1) * (gi - widen(m[i]));
                    float vi = widen(v[i]) * a.beta2 + (1.0f - a.beta2) * gi * gi;
                    float pi = widen(p[i]) * decay - step_size * mi / (std::sqrt(vi) / root_correction + a.eps);
                    narrow(pi, key + 3 * i, p[i]);
                    narrow(mi, key + 3 * i + 1, m[i]);
                    narrow(vi, key + 3 * i + 2, v[i]);
                }
            } else {
                float square = 0;
#pragma omp simd reduction(+ : square)
                for (int64_t i = 0; i < width; ++i) square += g[i] * g[i];
                square *= a.grad_scale * a.grad_scale / float(width);
                float vr = row_second_moment[row] * a.beta2 + (1.0f - a.beta2) * square;
                row_second_moment[row] = vr;
                const float rate = step_size / (std::sqrt(vr) / root_correction + a.eps);
#pragma omp simd
                for (int64_t i = 0; i < width; ++i) {
                    float gi = g[i] * a.grad_scale;
                    float mi = widen(m[i]) + (1.0f - a.beta1) * (gi - widen(m[i]));
                    narrow(widen(p[i]) * decay - rate * mi, key + 3 * i, p[i]);
                    narrow(mi, key + 3 * i + 1, m[i]);
                }
            }
        }
    }
}

// The k largest of scores[0..n), descending, the lower index first among equals.
inline void topk_row(const float* scores, int64_t n, int64_t k, float* values, int32_t* places) {
    int64_t filled = 0;
    float threshold = -INFINITY;
    auto insert = [&](float score, int32_t place) {
        int64_t i = filled < k ? filled++ : k - 1;
        for (; i > 0 && values[i - 1] < score; --i) {
            values[i] = values[i - 1];
            places[i] = places[i - 1];
        }
        values[i] = score;
        places[i] = place;
        if (filled == k) threshold = values[k - 1];
    };
    const int64_t warm = std::min(k, n);
    for (int64_t i = 0; i < warm; ++i) insert(scores[i], int32_t(i));
    constexpr int64_t kBlock = 64;
    for (int64_t base = warm; base < n; base += kBlock) {
        const int64_t end = std::min(base + kBlock, n);
        float best = -INFINITY;  // most blocks have nothing above the threshold
#pragma omp simd reduction(max : best)
        for (int64_t i = base; i < end; ++i) best = scores[i] > best ? scores[i] : best;
        if (!(best > threshold)) continue;
        for (int64_t i = base; i < end; ++i)
            if (scores[i] > threshold) insert(scores[i], int32_t(i));
    }
}

}  // namespace

extern "C" {

// All integers are int64, so that callers need no prototypes. dtype codes of tables: 0 float32, 1 bfloat16, 2 float16. Returns 1 if an index is outside the tables.
int64_t titan_peer_forward(int64_t dtype, const float* x, const int64_t* indices, const float* gates, const void* down,
                       const void* up, float* y, float* z, int64_t T, int64_t K, int64_t N, int64_t E, int64_t D,
                       int64_t O, int64_t activation, int64_t threads) {
    auto run = [&](auto row) {
        using Row = decltype(row);
        return int64_t(forward(x, indices, gates, static_cast<const Row*>(down), static_cast<const Row*>(up), y, z, T, K, N, E,
                       D, O, int(activation), int(threads)));
    };
    return dtype == 0 ? run(float()) : dtype == 1 ? run(bfloat16()) : run(float16());
}

void titan_peer_backward(int64_t dtype, const float* dy, const int64_t* indices, const float* gates, const float* z,
                         const void* down, const void* up, float* dx, float* dgates, float* dz, float* hidden,
                         int64_t T, int64_t K, int64_t E, int64_t D, int64_t O, int64_t activation, int64_t threads) {
    auto run = [&](auto row) {
        using Row = decltype(row);
        backward(dy, indices, gates, z, static_cast<const Row*>(down), static_cast<const Row*>(up), dx, dgates, dz,
                 hidden, T, K, E, D, O, activation, threads);
    };
    dtype == 0 ? run(float()) : dtype == 1 ? run(bfloat16()) : run(float16());
}

// Stable radix sort of the P pairs by expert; cost follows P and the digits of N, never N. Returns the number of runs.
// Work space: keys and swap, [2, P] each.
int64_t titan_peer_sort_pairs(const int64_t* indices, int64_t P, int64_t N, uint32_t* keys, int32_t* swap,
                              int32_t* order, int32_t* row_ids, int32_t* run_starts) {
    constexpr int kBits = 11, kBuckets = 1 << kBits;
    int digits = 1;
    while (digits * kBits < 32 && (int64_t(1) << (digits * kBits)) < N) ++digits;
    uint32_t *key_in = keys, *key_out = keys + P;
    int32_t *place_in = swap, *place_out = swap + P;
    for (int64_t i = 0; i < P; ++i) {
        key_in[i] = uint32_t(indices[i]);
        place_in[i] = int32_t(i);
    }
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

// Gradient rows into out [*, E, D]: at their own number (compact) or at their expert's.
void titan_peer_table_gradient(const int32_t* order, const int32_t* row_ids, const int32_t* run_starts, int64_t R,
                               const float* weights, const float* vectors, float* out, int64_t compact, int64_t K,
                               int64_t E, int64_t D, int64_t threads) {
    Factors factors{order, run_starts, weights, vectors, K, E, D};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 64)
    for (int64_t r = 0; r < R; ++r) factors.row(r, out + (compact ? r : int64_t(row_ids[r])) * E * D);
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

// moment_dtype as for tables (0 or 1); row_second_moment [N] replaces exp_avg_sq when that is null.
void titan_peer_rowwise_adamw(int64_t param_dtype, int64_t moment_dtype, void* param, void* exp_avg, void* exp_avg_sq,
                              float* row_second_moment, const int32_t* order, const int32_t* row_ids,
                              const int32_t* run_starts, int64_t R, const float* weights, const float* vectors,
                              int64_t K, int64_t E, int64_t D, float grad_scale, float lr, float beta1, float beta2,
                              float eps, float weight_decay, float bias_correction1, float bias_correction2,
                              uint64_t seed, int64_t threads) {
    Factors factors{order, run_starts, weights, vectors, K, E, D};
    AdamW a{grad_scale, lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2};
    auto run = [&](auto p, auto m) {
        using Param = decltype(p);
        using Moment = decltype(m);
        adamw_rows(static_cast<Param*>(param), static_cast<Moment*>(exp_avg), static_cast<Moment*>(exp_avg_sq),
                   row_second_moment, factors, row_ids, R, a, seed, threads);
    };
    if (param_dtype == 0)
        moment_dtype == 0 ? run(float(), float()) : run(float(), bfloat16());
    else
        moment_dtype == 0 ? run(bfloat16(), float()) : run(bfloat16(), bfloat16());
}

// Each of `rows` score rows [n] of an axis: its k best, descending.
void titan_peer_topk(const float* scores, int64_t rows, int64_t n, int64_t k, float* values, int32_t* places,
                     int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t r = 0; r < rows; ++r) topk_row(scores + r * n, n, k, values + r * k, places + r * k);
}

// The k best sums over C axes. Axis c's best lie at best_values[c], [rows, best_k[c]]; candidate ranks [M, C].
// Rows come as [H, tokens]; results go to values / indices [tokens, H, k].
void titan_peer_combine(const float* const* best_values, const int32_t* const* best_places, const int64_t* best_k,
                        const int64_t* sizes, int64_t C, const int32_t* ranks, int64_t M, int64_t H, int64_t tokens,
                        int64_t k, float* values, int64_t* indices, int64_t threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> sums(M), top(k);
        std::vector<int32_t> which(k);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < tokens; ++t)
            for (int64_t h = 0; h < H; ++h) {
                const int64_t r = h * tokens + t;
                for (int64_t m = 0; m < M; ++m) {
                    float sum = 0;
                    for (int64_t c = 0; c < C; ++c) sum += best_values[c][r * best_k[c] + ranks[m * C + c]];
                    sums[m] = sum;
                }
                topk_row(sums.data(), M, k, top.data(), which.data());
                for (int64_t j = 0; j < k; ++j) {
                    int64_t index = 0;
                    for (int64_t c = 0; c < C; ++c)
                        index = index * sizes[c] + best_places[c][r * best_k[c] + ranks[which[j] * C + c]];
                    values[(t * H + h) * k + j] = top[j];
                    indices[(t * H + h) * k + j] = index;
                }
            }
    }
}

// One axis of the retrieval's backward. keys and dkeys [key_sets, n, Q]; queries and dqueries are [T, H, stride] with
// this axis' Q numbers at their start; stride_below is the product of the sizes of the axes after this one.
void titan_peer_retrieve_backward(const float* dvalues, const int64_t* indices, const float* queries,
                                  const float* keys, float* dqueries, float* dkeys, int64_t T, int64_t H, int64_t k,
                                  int64_t key_sets, int64_t n, int64_t Q, int64_t stride, int64_t stride_below,
                                  int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t t = 0; t < T; ++t)
        for (int64_t h = 0; h < H; ++h) {
            float* dq = dqueries + (t * H + h) * stride;
            const float* head_keys = keys + (key_sets > 1 ? h : 0) * n * Q;
            std::fill(dq, dq + Q, 0.0f);
            for (int64_t j = 0; j < k; ++j) {
                const int64_t pair = (t * H + h) * k + j;
                add_scaled(dq, head_keys + indices[pair] / stride_below % n * Q, dvalues[pair], Q);
            }
        }
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (int64_t set = 0; set < key_sets; ++set) {
        float* set_gradient = dkeys + set * n * Q;
        std::fill(set_gradient, set_gradient + n * Q, 0.0f);
        const int64_t first = key_sets > 1 ? set : 0, last = key_sets > 1 ? set + 1 : H;
        for (int64_t t = 0; t < T; ++t)
            for (int64_t h = first; h < last; ++h)
                for (int64_t j = 0; j < k; ++j) {
                    const int64_t pair = (t * H + h) * k + j;
                    add_scaled(set_gradient + indices[pair] / stride_below % n * Q, queries + (t * H + h) * stride,
                               dvalues[pair], Q);
                }
    }
}

}  // extern "C"
