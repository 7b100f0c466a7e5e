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

}  // extern "C"
