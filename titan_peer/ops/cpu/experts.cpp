// CPU kernels of the expert operators, behind a plain C interface: compiled on first use, called through ctypes.
//
// All sums are float32. Each token, run of pairs or (head, axis) is owned by one thread and summed in one fixed order, so
// results do not depend on the number of threads or their scheduling. The kernels are bound by the latency of reading
// expert rows from memory, so the rows of the next experts, known from the indices, are prefetched.
//
// Shapes: T tokens, K experts per token, N experts, E expert hidden size, D model dim, O output dim.

#include "rows.h"

using namespace titan_peer;

namespace {

// The noise of stochastic rounding: a hash of (seed, row, element), so a step can be repeated bit for bit.
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

// Prefetch all cache lines of a table row.
inline void prefetch(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 3);
}
inline void prefetch_to_write(const void* row, int64_t bytes) {
    const char* p = static_cast<const char*>(row);
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 1, 3);
}

// exp, accurate to 2 units in the last place, in plain arithmetic so that loops over it are vectorised.
inline float exponential(float x) {
    x = std::min(std::max(x, -87.0f), 88.0f);
    const float whole = std::nearbyint(x * 1.44269504f);
    const float r = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // |r| <= ln(2) / 2
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    const int32_t bits = (int32_t(whole) + 127) << 23;
    float power;
    std::memcpy(&power, &bits, 4);
    return p * power;
}

enum Activation { kGelu = 0, kGeluTanh = 1, kRelu = 2, kSilu = 3 };

inline float sigmoid(float z) { return 1.0f / (1.0f + exponential(-z)); }

// The activation of z and its derivative; Kind is a template parameter so that loops contain no branch.
template <int Kind>
inline void activate(float z, float& value, float& slope) {
    if (Kind == kGelu) {
        // normal distribution by Abramowitz and Stegun 7.1.26: absolute error 1e-7
        const float t = 1.0f / (1.0f + 0.3275911f * 0.70710678f * std::fabs(z));
        const float bell = exponential(-0.5f * z * z);
        const float poly = ((((1.061405429f * t - 1.453152027f) * t + 1.421413741f) * t - 0.284496736f) * t + 0.254829592f) * t;
        const float tail = 0.5f * poly * bell;
        const float cdf = z < 0 ? tail : 1.0f - tail;
        value = z * cdf;
        slope = cdf + z * 0.39894228f * bell;
    } else if (Kind == kGeluTanh) {
        const float u = 0.79788456f * (z + 0.044715f * z * z * z);
        const float s = sigmoid(2.0f * u);  // tanh u = 2 s - 1
        value = z * s;
        slope = s + 2.0f * z * s * (1.0f - s) * 0.79788456f * (1.0f + 3 * 0.044715f * z * z);
    } else if (Kind == kRelu) {
        value = z > 0 ? z : 0;
        slope = z > 0 ? 1.0f : 0.0f;
    } else {
        const float s = sigmoid(z);
        value = z * s;
        slope = s * (1.0f + z * (1.0f - s));
    }
}

template <int Kind>
inline void activate_all(const float* __restrict z, float* __restrict values, float* __restrict slopes, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) activate<Kind>(z[i], values[i], slopes[i]);
}

inline void activate_all(const float* z, float* values, float* slopes, int64_t n, int activation) {
    switch (activation) {
        case kGelu: return activate_all<kGelu>(z, values, slopes, n);
        case kGeluTanh: return activate_all<kGeluTanh>(z, values, slopes, n);
        case kRelu: return activate_all<kRelu>(z, values, slopes, n);
        default: return activate_all<kSilu>(z, values, slopes, n);
    }
}

// The rows of one token's experts: K * E rows of `width` numbers each, grouped by expert.
template <class Row>
struct Rows {
    const Row* table;
    const int64_t* chosen;
    int64_t K, E, width;

    const Row* operator[](int64_t i) const {
        return E == 1 ? table + chosen[i] * width : table + (chosen[i / E] * E + i % E) * width;
    }
    // How many rows are prefetched ahead: as many as fit into a part of the L1 cache.
    int64_t ahead() const { return std::min<int64_t>(std::max<int64_t>(16384 / (width * sizeof(Row)), 4), 16); }
    void ask_for(int64_t first, int64_t last) const {
        for (int64_t i = first; i < std::min(last, K * E); ++i) prefetch((*this)[i], width * sizeof(Row));
    }
    // out[i] = row i . x
    void dots(const float* x, float* out) const {
        const int64_t n = K * E;
        int64_t i = 0, lead = ahead();
        ask_for(0, lead);
        for (; i + 4 <= n; i += 4) {
            ask_for(i + lead, i + lead + 4);
            dot4((*this)[i], (*this)[i + 1], (*this)[i + 2], (*this)[i + 3], x, width, out + i);
        }
        for (; i < n; ++i) out[i] = dot((*this)[i], x, width);
    }
    // y = sum of factors[i] * row i
    void weighted_sum(const float* factors, float* y) const {
        const int64_t n = K * E;
        int64_t i = 0, lead = ahead();
        std::fill(y, y + width, 0.0f);
        ask_for(0, lead);
        for (; i + 4 <= n; i += 4) {
            ask_for(i + lead, i + lead + 4);
            add_scaled4(y, (*this)[i], (*this)[i + 1], (*this)[i + 2], (*this)[i + 3], factors + i, width);
        }
        for (; i < n; ++i) add_scaled(y, (*this)[i], factors[i], width);
    }
};

// A token's present experts: a negative index marks an absent place.
struct Present {
    std::vector<int64_t> place, chosen;

    explicit Present(int64_t K) : place(K), chosen(K) {}
    int64_t find(const int64_t* indices, int64_t K) {
        int64_t count = 0;
        for (int64_t j = 0; j < K; ++j) {
            place[count] = j;
            chosen[count] = indices[j];
            count += indices[j] >= 0;
        }
        return count;
    }
};

template <class Row>
int forward(const float* x, const int64_t* indices, const float* gates, const Row* down, const Row* up, float* y,
            float* z, int64_t T, int64_t K, int64_t N, int64_t E, int64_t D, int64_t O, int activation, int threads) {
    for (int64_t i = 0; i < T * K; ++i)
        if (indices[i] >= N) return 1;
#pragma omp parallel num_threads(threads)
    {
        Present present(K);
        std::vector<float> dots(K * E), hidden(K * E), slopes(K * E);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; ++t) {
            const int64_t count = present.find(indices + t * K, K);
            const int64_t* chosen = present.chosen.data();
            Rows<Row>{down, chosen, count, E, D}.dots(x + t * D, dots.data());
            activate_all(dots.data(), hidden.data(), slopes.data(), count * E, activation);
            float* zt = z + t * K * E;
            if (count < K) std::fill(zt, zt + K * E, 0.0f);
            for (int64_t i = 0; i < count; ++i)
                for (int64_t e = 0; e < E; ++e) {
                    zt[present.place[i] * E + e] = dots[i * E + e];
                    hidden[i * E + e] *= gates[t * K + present.place[i]];
                }
            Rows<Row>{up, chosen, count, E, O}.weighted_sum(hidden.data(), y + t * O);
        }
    }
    return 0;
}

template <class Row>
void backward(const float* dy, const int64_t* indices, const float* gates, const float* z, const Row* down,
              const Row* up, float* dx, float* dgates, float* dz, float* hidden, int64_t T, int64_t K, int64_t E,
              int64_t D, int64_t O, int activation, int threads) {
#pragma omp parallel num_threads(threads)
    {
        Present present(K);
        std::vector<float> dots(K * E), values(K * E), slopes(K * E);
#pragma omp for schedule(static)
        for (int64_t t = 0; t < T; ++t) {
            const int64_t count = present.find(indices + t * K, K);
            const int64_t* chosen = present.chosen.data();
            const float* zt = z + t * K * E;
            float *dzt = dz + t * K * E, *hidden_t = hidden + t * K * E, *dgates_t = dgates + t * K;
            Rows<Row>{up, chosen, count, E, O}.dots(dy + t * O, dots.data());
            activate_all(zt, values.data(), slopes.data(), K * E, activation);
            if (count < K) {
                std::fill(dzt, dzt + K * E, 0.0f);
                std::fill(hidden_t, hidden_t + K * E, 0.0f);
                std::fill(dgates_t, dgates_t + K, 0.0f);
            }
            for (int64_t i = 0; i < count; ++i) {
                const int64_t j = present.place[i];
                const float gate = gates[t * K + j];
                float dgate = 0;
                for (int64_t e = 0; e < E; ++e) {
                    const float u = dots[i * E + e];
                    dgate += u * values[j * E + e];
                    hidden_t[j * E + e] = gate * values[j * E + e];
                    // written back in place of u: the compact form of dz, for the weighted sum
                    dots[i * E + e] = dzt[j * E + e] = gate * u * slopes[j * E + e];
                }
                dgates_t[j] = dgate;
            }
            Rows<Row>{down, chosen, count, E, D}.weighted_sum(dots.data(), dx + t * D);
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

struct AdamW {
    float grad_scale, lr, beta1, beta2, eps, weight_decay, bias_correction1, bias_correction2;
};

template <class Param, class Moment>
void adamw_rows(Param* param, Moment* exp_avg, Moment* exp_avg_sq, float* row_second_moment, const Factors& factors,
                const int32_t* row_ids, int64_t R, const AdamW& a, uint64_t seed, int threads) {
    const int64_t width = factors.E * factors.D;
    const float decay = 1.0f - a.lr * a.weight_decay;
    // m / c1 / (sqrt(v / c2) + eps) = m (sqrt(c2) / c1) / (sqrt(v) + eps sqrt(c2)): one division per element
    const float root_correction = std::sqrt(a.bias_correction2);
    const float step_size = a.lr / a.bias_correction1 * root_correction, eps = a.eps * root_correction;
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
                    float pi = widen(p[i]) * decay - step_size * mi / (std::sqrt(vi) + eps);
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
                const float rate = step_size / (std::sqrt(vr) + eps);
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

}  // namespace

extern "C" {

// Whether the kernels are multi-threaded, that is, compiled with OpenMP.
int64_t titan_peer_has_threads() {
#ifdef _OPENMP
    return 1;
#else
    return 0;
#endif
}

// All integers are int64, so that callers need no prototypes. dtype codes of tables: 0 float32, 1 bfloat16, 2 float16.
// Returns 1 if an index is outside the tables.
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

}  // extern "C"
