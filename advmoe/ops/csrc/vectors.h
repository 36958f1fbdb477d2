// Vectors of fp32, filled from and put into fp32 and bf16 memory.

#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#else
constexpr int kLanes = 8;
#endif

template <int L>
struct VectorOf {
    typedef float type __attribute__((vector_size(L * 4), aligned(4), may_alias));
    typedef uint32_t bits __attribute__((vector_size(L * 4)));
    typedef uint16_t upper __attribute__((vector_size(L * 2), aligned(2), may_alias));
};
template <int L>
using Vector = typename VectorOf<L>::type;

// bf16 is the upper half of fp32.
struct Half {
    uint16_t bits;
};

template <int L>
inline Vector<L> load(const float* from) {
    return *reinterpret_cast<const Vector<L>*>(from);
}

template <int L>
inline Vector<L> load(const Half* from) {
    using Bits = typename VectorOf<L>::bits;
    const typename VectorOf<L>::upper upper = *reinterpret_cast<const typename VectorOf<L>::upper*>(from);
    const Bits bits = __builtin_convertvector(upper, Bits) << 16;
    Vector<L> values;
    std::memcpy(&values, &bits, sizeof values);
    return values;
}

template <int L>
inline void store(Vector<L> values, float* to) {
    *reinterpret_cast<Vector<L>*>(to) = values;
}

// To the nearest, ties to even; what is not a number stays so. CPUs with an instruction for it take what is below the
// smallest normal number for 0.
template <int L>
inline void store(Vector<L> values, Half* to) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
    if constexpr (L == 16) {
        const __m256bh rounded = _mm512_cvtneps_pbh((__m512)values);
        std::memcpy(to, &rounded, sizeof rounded);
    } else {
        const __m128bh rounded = _mm256_cvtneps_pbh((__m256)values);
        std::memcpy(to, &rounded, sizeof rounded);
    }
#else
    using Bits = typename VectorOf<L>::bits;
    Bits bits;
    std::memcpy(&bits, &values, sizeof bits);
    const Bits quiet = (bits >> 16) | 0x40u, rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Bits chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
    *reinterpret_cast<typename VectorOf<L>::upper*>(to) = __builtin_convertvector(chosen, typename VectorOf<L>::upper);
#endif
}

inline float value_of(float x) { return x; }
inline float value_of(Half x) {
    const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

template <int L>
inline float total(Vector<L> v) {
    float sum = 0;
    for (int i = 0; i < L; ++i) sum += v[i];
    return sum;
}

template <class T>
float product(const T* a, const T* b, int64_t count) {
    Vector<kLanes> sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= count; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += load<kLanes>(a + i + j * kLanes) * load<kLanes>(b + i + j * kLanes);
    for (; i + kLanes <= count; i += kLanes) sum[0] += load<kLanes>(a + i) * load<kLanes>(b + i);
    float rest = 0;
    for (; i < count; ++i) rest += value_of(a[i]) * value_of(b[i]);
    return total<kLanes>((sum[0] + sum[1]) + (sum[2] + sum[3])) + rest;
}

}  // namespace
