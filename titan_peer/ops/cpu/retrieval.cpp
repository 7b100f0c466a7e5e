// CPU kernels of product-key retrieval: the k best combinations of given scores, and the backward.
//
// Shapes: T tokens, H heads, C axes with n sub-keys of Q numbers each, k experts per head.

#include "rows.h"

#ifdef __AVX512F__
#include <immintrin.h>
#endif

using namespace titan_peer;

namespace {

// Numbers per vector register: vectors wider than the processor's registers are compiled into very slow code.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

inline Floats load(const float* from) {
    Floats v;
    std::memcpy(&v, from, sizeof v);
    return v;
}
inline Ints load(const int32_t* from) {
    Ints v;
    std::memcpy(&v, from, sizeof v);
    return v;
}

// Top-k of several rows at once, one row per vector lane: sorting networks have no branches to mispredict, and
// mispredictions take most of the time of a row-by-row selection. An entry is a score and its place in the row.
struct Entry {
    Floats score;
    Ints place;
};

// Put the larger into a. A NaN compares false and stays where it is, so no place is ever lost or duplicated.
inline void order(Entry& a, Entry& b) {
    const Ints swap = a.score < b.score;
    const Floats low = swap ? a.score : b.score;
    const Ints low_place = swap ? a.place : b.place;
    a.score = swap ? b.score : a.score;
    a.place = swap ? b.place : a.place;
    b.score = low;
    b.place = low_place;
}

// Sort a bitonic sequence of K entries (K a power of two) in descending order.
template <int K>
inline void merge_bitonic(Entry* e) {
#pragma GCC unroll 16
    for (int step = K / 2; step > 0; step /= 2)
#pragma GCC unroll 64
        for (int i = 0; i < K; ++i)
            if (!(i & step)) order(e[i], e[i + step]);
}

// Batcher's odd-even merge sort, descending.
template <int K>
inline void sort_entries(Entry* e) {
#pragma GCC unroll 8
    for (int p = 1; p < K; p *= 2)
#pragma GCC unroll 8
        for (int q = p; q > 0; q /= 2)
#pragma GCC unroll 64
            for (int j = q % p; j + q < K; j += 2 * q)
#pragma GCC unroll 64
                for (int i = 0; i < q; ++i)
                    if (i + j + q < K && (i + j) / (2 * p) == (i + j + q) / (2 * p)) order(e[i + j], e[i + j + q]);
}

// The K best of `count` entries, descending, in best[0..K). One copy of this long code serves all callers.
template <int K>
__attribute__((noinline)) void best_entries(const Entry* entries, int64_t count, Entry* best) {
    const Entry nothing = {Floats{} - INFINITY, Ints{}};
    for (int64_t base = 0; base < count; base += K) {
        Entry block[K];
        for (int i = 0; i < K; ++i) block[i] = base + i < count ? entries[base + i] : nothing;
        sort_entries<K>(block);
        if (base == 0) {
            std::copy(block, block + K, best);
            continue;
        }
        // the larger of each pair from opposite ends: the K best of both, as a bitonic sequence
        for (int i = 0; i < K; ++i) order(best[i], block[K - 1 - i]);
        merge_bitonic<K>(best);
    }
}

// A bound that at least K entries of a row reach: the K-th largest of the maxima of kGroups interleaved parts. With 2K parts,
// few entries beyond those K reach it.
template <int K>
constexpr int kGroups = std::max(2 * K, 2 * kLanes);

template <int kParts>
inline void part_maxima(const float* row, int64_t n, float* maxima) {
    Floats most[kParts / kLanes];
    for (auto& m : most) m = Floats{} - INFINITY;
    int64_t i = 0;
    for (; i + kParts <= n; i += kParts)
        for (int g = 0; g < kParts / kLanes; ++g) {
            const Floats v = load(row + i + g * kLanes);
            most[g] = most[g] < v ? v : most[g];
        }
    std::memcpy(maxima, most, sizeof most);
    for (int j = 0; i < n; ++i, ++j) maxima[j] = maxima[j] < row[i] ? row[i] : maxima[j];
}

// Entries of a row that are not below the bound, in order; the outputs have room for n + kLanes each. Returns their number.
inline int64_t not_below(const float* row, int64_t n, float bound, float* scores, int32_t* places) {
    int64_t count = 0, i = 0;
#ifdef __AVX512F__
    Ints place;
    for (int lane = 0; lane < kLanes; ++lane) place[lane] = lane;
    for (; i + kLanes <= n; i += kLanes, place += kLanes) {
        const __m512 v = _mm512_loadu_ps(row + i);
        const __mmask16 kept = _mm512_cmp_ps_mask(v, _mm512_set1_ps(bound), _CMP_NLT_UQ);
        _mm512_storeu_ps(scores + count, _mm512_maskz_compress_ps(kept, v));
        _mm512_storeu_si512(places + count, _mm512_maskz_compress_epi32(kept, __m512i(place)));
        count += __builtin_popcount(kept);
    }
#else
    for (; i + kLanes <= n; i += kLanes) {
        int32_t any = 0;
#pragma omp simd reduction(| : any)
        for (int64_t j = i; j < i + kLanes; ++j) any |= !(row[j] < bound);
        if (!any) continue;  // most blocks have none
        for (int64_t j = i; j < i + kLanes; ++j) {
            scores[count] = row[j];
            places[count] = int32_t(j);
            count += !(row[j] < bound);
        }
    }
#endif
    for (; i < n; ++i) {
        scores[count] = row[i];
        places[count] = int32_t(i);
        count += !(row[i] < bound);
    }
    return count;
}

// A vector with from[lane * stride] in each lane.
inline Floats across(const float* from, int64_t stride, int64_t lanes) {
    Floats v{};
    if (lanes == kLanes)  // the compiler knows this count
        for (int lane = 0; lane < kLanes; ++lane) v[lane] = from[lane * stride];
    else
        for (int lane = 0; lane < lanes; ++lane) v[lane] = from[lane * stride];
    return v;
}

// The K best of up to kLanes rows of n scores, one row per lane.
template <int K>
class Selection {
public:
    explicit Selection(int64_t widest)
        : scores(widest + kLanes), places(widest + kLanes), entries(std::max<int64_t>(widest, kGroups<K>)) {}

    void best_of(const float* rows, int64_t n, int64_t lanes, Entry* best) {
        if (n <= 2 * kGroups<K>) {  // too few for a bound to save work
            for (int64_t i = 0; i < n; ++i) entries[i] = {across(rows + i, n, lanes), Ints{} + int32_t(i)};
            return best_entries<K>(entries.data(), n, best);
        }
        float maxima[kLanes][kGroups<K>];
        for (int64_t lane = 0; lane < lanes; ++lane) part_maxima<kGroups<K>>(rows + lane * n, n, maxima[lane]);
        for (int64_t i = 0; i < kGroups<K>; ++i) entries[i] = {across(maxima[0] + i, kGroups<K>, lanes), Ints{}};
        best_entries<K>(entries.data(), kGroups<K>, best);
        const Floats bound = best[K - 1].score;

        int64_t filled = 0;
        for (int64_t lane = 0; lane < lanes; ++lane) {
            const int64_t count = not_below(rows + lane * n, n, bound[lane], scores.data(), places.data());
            for (; filled < count; ++filled) entries[filled] = {Floats{} - INFINITY, Ints{}};
            for (int64_t i = 0; i < count; ++i) {
                entries[i].score[lane] = scores[i];
                entries[i].place[lane] = places[i];
            }
        }
        best_entries<K>(entries.data(), filled, best);
    }

private:
    std::vector<float> scores;  // of one row
    std::vector<int32_t> places;
    std::vector<Entry> entries;
};

// Scores of axis c lie at scores[c], [H, tokens, sizes[c]]; results go to values and indices, [tokens, H, k], k <= K.
template <int K>
void retrieve(const float* const* scores, const int64_t* best_k, const int64_t* sizes, int64_t C, const int32_t* ranks,
              int64_t M, int64_t H, int64_t tokens, int64_t k, float* values, int64_t* indices, int threads) {
    const int64_t groups = (H * tokens + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads)
    {
        Selection<K> selection(*std::max_element(sizes, sizes + C));
        std::vector<Entry> axes(C * K), sums(M);
#pragma omp for schedule(static)
        for (int64_t group = 0; group < groups; ++group) {
            const int64_t first = group * kLanes, lanes = std::min<int64_t>(kLanes, H * tokens - first);
            for (int64_t c = 0; c < C; ++c)
                selection.best_of(scores[c] + first * sizes[c], sizes[c], lanes, &axes[c * K]);
            for (int64_t m = 0; m < M; ++m) {
                sums[m] = axes[ranks[m * C]];
                for (int64_t c = 1; c < C; ++c) {
                    const Entry& next = axes[c * K + ranks[m * C + c]];
                    sums[m].score += next.score;
                    sums[m].place = sums[m].place * int32_t(sizes[c]) + next.place;
                }
            }
            Entry best[K];
            best_entries<K>(sums.data(), M, best);
            for (int64_t lane = 0; lane < lanes; ++lane) {
                const int64_t h = (first + lane) / tokens, t = (first + lane) % tokens;
                for (int64_t j = 0; j < k; ++j) {
                    values[(t * H + h) * k + j] = best[j].score[lane];
                    indices[(t * H + h) * k + j] = best[j].place[lane];
                }
            }
        }
    }
}

// The k largest of scores[0..n), descending; equal scores in order of index.
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

// The same for any k and any number of experts, one token at a time.
void retrieve_any(const float* const* scores, const int64_t* best_k, const int64_t* sizes, int64_t C,
                  const int32_t* ranks, int64_t M, int64_t H, int64_t tokens, int64_t k, float* values,
                  int64_t* indices, int threads) {
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> row(M), top(k), best(C * k);
        std::vector<int32_t> which(k), places(C * k);
#pragma omp for schedule(static)
        for (int64_t item = 0; item < H * tokens; ++item) {
            const int64_t h = item / tokens, t = item % tokens;
            for (int64_t c = 0; c < C; ++c) {
                topk_row(scores[c] + item * sizes[c], sizes[c], best_k[c], &best[c * k], &places[c * k]);
            }
            for (int64_t m = 0; m < M; ++m) {
                row[m] = 0;
                for (int64_t c = 0; c < C; ++c) row[m] += best[c * k + ranks[m * C + c]];
            }
            topk_row(row.data(), M, k, top.data(), which.data());
            for (int64_t j = 0; j < k; ++j) {
                int64_t index = 0;
                for (int64_t c = 0; c < C; ++c) index = index * sizes[c] + places[c * k + ranks[which[j] * C + c]];
                values[(t * H + h) * k + j] = top[j];
                indices[(t * H + h) * k + j] = index;
            }
        }
    }
}

}  // namespace

extern "C" {

// The k best sums over C axes. Axis c's scores lie at scores[c], [H, tokens, sizes[c]], of which the best_k[c] largest are
// used; candidate ranks [M, C]. Results go to values and indices, [tokens, H, k].
void titan_peer_retrieve(const float* const* scores, const int64_t* best_k, const int64_t* sizes, int64_t C,
                         const int32_t* ranks, int64_t M, int64_t H, int64_t tokens, int64_t k, float* values,
                         int64_t* indices, int64_t threads) {
    double experts = 1;
    for (int64_t c = 0; c < C; ++c) experts *= double(sizes[c]);
    auto run = [&](auto kernel) {
        kernel(scores, best_k, sizes, C, ranks, M, H, tokens, k, values, indices, int(threads));
    };
    if (experts > 2147483647.0 || k > 32) return run(retrieve_any);
    k <= 2 ? run(retrieve<2>) : k <= 4 ? run(retrieve<4>) : k <= 8 ? run(retrieve<8>) : k <= 16 ? run(retrieve<16>) : run(retrieve<32>);
}

// One axis of the retrieval's backward. keys and dkeys [key_sets, n, Q]; queries and dqueries are [T, H, stride] with
// this axis' Q numbers at their start; stride_below is the product of the sizes of the axes after this one. Work space:
// places [T, H, k], the chosen sub-keys, stored because the divisions that find them cost more than the rest.
void titan_peer_retrieve_backward(const float* dvalues, const int64_t* indices, const float* queries,
                                  const float* keys, float* dqueries, float* dkeys, int32_t* places, int64_t T,
                                  int64_t H, int64_t k, int64_t key_sets, int64_t n, int64_t Q, int64_t stride,
                                  int64_t stride_below, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t item = 0; item < T * H; ++item) {
        const float* head_keys = keys + (key_sets > 1 ? item % H : 0) * n * Q;
        const float* dv = dvalues + item * k;
        int32_t* place = places + item * k;
        for (int64_t j = 0; j < k; ++j) place[j] = int32_t(uint64_t(indices[item * k + j]) / stride_below % n);
        float* dq = dqueries + item * stride;
        std::fill(dq, dq + Q, 0.0f);
        auto key = [&](int64_t j) { return head_keys + place[j] * Q; };
        int64_t j = 0;
        for (; j + 4 <= k; j += 4) add_scaled4(dq, key(j), key(j + 1), key(j + 2), key(j + 3), dv + j, Q);
        for (; j < k; ++j) add_scaled(dq, key(j), dv[j], Q);
    }
    std::fill(dkeys, dkeys + key_sets * n * Q, 0.0f);
    constexpr int64_t kTokens = 32;  // a block of tokens, so that neighbouring heads' queries are still in cache
#pragma omp parallel num_threads(threads)
    for (int64_t block = 0; block < T; block += kTokens) {
#pragma omp for schedule(static) nowait  // the same thread owns a set in every block: no barrier, one order of sums
        for (int64_t set = 0; set < key_sets; ++set) {
            const int64_t first = key_sets > 1 ? set : 0, last = key_sets > 1 ? set + 1 : H;
            for (int64_t t = block; t < std::min(block + kTokens, T); ++t)
                for (int64_t item = t * H + first; item < t * H + last; ++item)
                    for (int64_t j = item * k; j < (item + 1) * k; ++j)
                        add_scaled(dkeys + (set * n + places[j]) * Q, queries + item * stride, dvalues[j], Q);
        }
    }
}

}  // extern "C"
