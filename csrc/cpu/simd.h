// Vectors, exp2 and log for one instruction set (the one this file is compiled for), and lines of converted logits.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../eekd.h"

namespace eekd::EEKD_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, class Int>
struct Vectors {
  static constexpr int width = kVectorBytes / sizeof(T);
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
  typedef T Unaligned __attribute__((vector_size(kVectorBytes), aligned(alignof(T))));
  typedef Int IntVec __attribute__((vector_size(kVectorBytes)));
};
template <class T>
struct Simd;
template <>
struct Simd<float> : Vectors<float, int32_t> {};
template <>
struct Simd<double> : Vectors<double, int64_t> {};

template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
inline Vec<T> splat(T x) {
  return Vec<T>{} + x;
}
template <class T>
inline Vec<T> load(const T* p) {  // lines are aligned
  return *reinterpret_cast<const Vec<T>*>(p);
}
template <class T>
inline void store(T* p, Vec<T> v) {
  *reinterpret_cast<Vec<T>*>(p) = v;
}
template <class T>
inline void store_to(T* p, Vec<T> v) {  // anywhere
  *reinterpret_cast<typename Simd<T>::Unaligned*>(p) = v;
}
// k x - less, rounded once: by an FMA, or where there is none in double.
template <class T>
[[gnu::always_inline]] inline Vec<T> scaled_by(Vec<T> x, T k, Vec<T> less) {
#if defined(__x86_64__) && !defined(__FMA__)
  if constexpr (std::is_same_v<T, float>) {
    using Wide = Simd<double>::Vec;
    const double scale = k;
    const auto half = [&](auto part, auto rest) {
      return __builtin_convertvector(part, Wide) * scale - __builtin_convertvector(rest, Wide);
    };
    const Wide low = half(__builtin_shufflevector(x, x, 0, 1), __builtin_shufflevector(less, less, 0, 1));
    const Wide high = half(__builtin_shufflevector(x, x, 2, 3), __builtin_shufflevector(less, less, 2, 3));
    return __builtin_convertvector(__builtin_shufflevector(low, high, 0, 1, 2, 3), Vec<float>);
  }
#endif
  return x * k - less;
}
template <class T>
[[gnu::always_inline]] inline Vec<T> scaled(Vec<T> x, T k, T less) {
  return scaled_by<T>(x, k, splat(less));
}

template <class V>
inline V max(V a, V b) {  // a NaN in b is passed over; the sum of exponentials keeps it
  return b > a ? b : a;
}
// Folds the lanes of a vector in halves, op(lower, upper), down to one element.
template <class V, class Op>
inline auto fold(V v, Op op) {
  constexpr int lanes = sizeof(V) / sizeof(v[0]);
  if constexpr (lanes == 16)
    return fold(op(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                op);
  else if constexpr (lanes == 8)
    return fold(op(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7)), op);
  else if constexpr (lanes == 4)
    return fold(op(__builtin_shufflevector(v, v, 0, 1), __builtin_shufflevector(v, v, 2, 3)), op);
  else
    return op(v[0], v[1]);
}
template <class T>
inline T sum(Vec<T> v) {
  return fold(v, [](auto a, auto b) { return a + b; });
}
template <class T>
inline T largest(Vec<T> v) {
  return fold(v, [](auto a, auto b) { return b > a ? b : a; });
}

template <class Mask>
inline bool every(Mask mask) {
  return fold(mask, [](auto x, auto y) { return x & y; }) != 0;
}
template <class Mask>
inline bool any(Mask mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask(__m512i(mask), __m512i(mask)) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256(__m256i(mask), __m256i(mask));
#endif
  return fold(mask, [](auto x, auto y) { return x | y; }) != 0;
}

// 1 / x of a normal number up to 2^126, to 1e-7: a division takes as long as all else about a column.
[[gnu::always_inline]] inline Vec<float> inverse(Vec<float> x) {
  [[maybe_unused]] const auto refined = [x](auto guess) { return Vec<float>(guess) * (2.f - x * Vec<float>(guess)); };
#if defined(__AVX512F__)
  return refined(_mm512_rcp14_ps(__m512(x)));
#elif defined(__AVX2__)
  return refined(_mm256_rcp_ps(__m256(x)));
#else
  return 1.f / x;
#endif
}
inline Vec<double> inverse(Vec<double> x) { return 1.0 / x; }

// 2^x to 1e-7: 0 far below the smallest normal number, NaN for NaN, and beyond 2^127 that or more. The polynomials
// are minimax fits of (2^r - 1) / r, weighted for the relative error of 2^r.
#if defined(__AVX512F__)
// 2^x = 2^(i/16) 2^r 2^k with the integers k and i from 0 to 15 of floor(16 x) and |r| <= 1/32.
[[gnu::always_inline]] inline Vec<float> exp2(Vec<float> x) {
  // clang-format off
  alignas(64) static constexpr float kRoots[16] = {
      1.0f, 1.0442737340927124f, 1.0905077457427979f, 1.1387885808944702f, 1.1892070770263672f,
      1.2418577671051025f, 1.2968395948410034f, 1.3542555570602417f, 1.4142135381698608f, 1.4768261909484863f,
      1.5422108173370361f, 1.610490322113037f, 1.6817928552627563f, 1.7562521696090698f, 1.8340080976486206f,
      1.9152065515518188f};
  // clang-format on
  constexpr float kRound = 786432.f;  // 1.5 * 2^19: adding it rounds to sixteenths, their number in the low bits
  const Vec<float> shifted = x + kRound, n = shifted - kRound, r = x - n;
  const Vec<float> root = Vec<float>(_mm512_permutexvar_ps(__m512i(shifted), _mm512_load_ps(kRoots)));
  Vec<float> p = r * 5.5502135306596756e-2f + 2.4023428559303284e-1f;
  p = p * r + 6.9314718246459961e-1f;
  return Vec<float>(_mm512_scalef_ps(__m512(root * (p * r) + root), __m512(n)));  // floors n; 0 for n = -inf
}
#else
[[gnu::always_inline]] inline Vec<float> exp2(Vec<float> x) {
  constexpr float kRound = 12583039.f;  // 1.5 * 2^23 + 127: adding it leaves the exponent of 2^round(x) in the low bits
  const Vec<float> low = splat(-127.f), high = splat(127.f);
#if defined(__AVX2__)
  x = Vec<float>(_mm256_min_ps(__m256(high), _mm256_max_ps(__m256(low), __m256(x))));  // the second, if one is NaN
#else
  x = low > x ? low : x;
  x = high < x ? high : x;
#endif
  const Vec<float> shifted = x + kRound, r = x - (shifted - kRound);
  Vec<float> p = r * 1.3264727313071489e-3f + 9.671512991189957e-3f;
  p = p * r + 5.5507335811853409e-2f;
  p = p * r + 2.4022242426872253e-1f;
  p = p * r + 6.9314700365066528e-1f;
  p = p * r + 1.f;
  const auto bits = reinterpret_cast<Simd<float>::IntVec>(shifted) << 23;  // of 2^n, 0 for n = -127
  return p * reinterpret_cast<Vec<float>>(bits);  // a product, for any sum of a NaN's bits may be a number
}
#endif

// log2 x for normal x > 0, to 1e-7. x = 2^n (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)); the polynomial is a minimax
// fit of log2(1 + f) / f.
[[gnu::always_inline]] inline Vec<float> log2(Vec<float> x) {
  using IntVec = Simd<float>::IntVec;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;
  const IntVec bits = reinterpret_cast<IntVec>(x) - kSqrtHalf;
  const Vec<float> n = __builtin_convertvector(bits >> 23, Vec<float>);
  const Vec<float> f = reinterpret_cast<Vec<float>>((bits & 0x7fffff) + kSqrtHalf) - 1.f;
  Vec<float> p = f * -0.14574450254440308f + 0.23689046502113342f;
  p = p * f - 0.2500690519809723f;
  p = p * f + 0.28670743107795715f;
  p = p * f - 0.36008721590042114f;
  p = p * f + 0.48093944787979126f;
  p = p * f - 0.7213571667671204f;
  p = p * f + 1.4426947832107544f;
  return n + f * p;
}

// fp64 is for checking, not for speed.
inline Vec<double> exp2(Vec<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::exp2(x[i]);
  return x;
}
inline Vec<double> log2(Vec<double> x) {
  for (int i = 0; i < Simd<double>::width; ++i) x[i] = std::log2(x[i]);
  return x;
}

// The storage types, and vectors of T read from n elements of them, the lanes beyond n filled with -inf.
struct BFloat16 {
  uint16_t bits;
  operator float() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
  }
};
struct Float16 {
  uint16_t bits;
  operator float() const {
#if defined(__F16C__)
    return _cvtsh_ss(bits);
#else
    _Float16 h;
    std::memcpy(&h, &bits, 2);
    return static_cast<float>(h);
#endif
  }
};

// Asks the cache for p[i, i + n), which need not exist.
template <class S>
inline void prefetch(const S* p, int64_t i, int n) {
  const uintptr_t begin = reinterpret_cast<uintptr_t>(p) + i * sizeof(S);
  for (uintptr_t at = 0; at < n * sizeof(S); at += 64)
    __builtin_prefetch(reinterpret_cast<const void*>(begin + at), 0, 2);
}

template <class T, class S>
inline Vec<T> gather(const S* p, int n) {
  alignas(kVectorBytes) T lanes[Simd<T>::width];
  for (int i = 0; i < Simd<T>::width; ++i)
    lanes[i] = i < n ? static_cast<T>(p[i]) : -std::numeric_limits<T>::infinity();
  return load(lanes);
}
template <class T, class S>
inline Vec<T> load_from(const S* p) {
  if constexpr (sizeof(S) == sizeof(T)) {
    return *reinterpret_cast<const typename Simd<T>::Unaligned*>(p);
#if defined(__AVX512F__)
  } else if constexpr (std::is_same_v<S, BFloat16> && sizeof(T) == 4) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return Vec<T>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(T) == 4) {
    return Vec<T>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  } else if constexpr (std::is_same_v<S, BFloat16> && sizeof(T) == 4) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return Vec<T>(_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)));
  } else if constexpr (std::is_same_v<S, Float16> && sizeof(T) == 4) {
    return Vec<T>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
  } else {
    return gather<T>(p, Simd<T>::width);
  }
}
template <class T, class S>
inline Vec<T> load_from(const S* p, int n) {
  if (n >= Simd<T>::width) return load_from<T>(p);
#if defined(__AVX2__) && !defined(__AVX512F__)
  alignas(32) static constexpr int32_t kFirst[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  if constexpr (std::is_same_v<S, float> && sizeof(T) == 4) {
    const __m256 mask = _mm256_castsi256_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(kFirst + 8 - n)));
    return Vec<T>(_mm256_blendv_ps(__m256(splat(-std::numeric_limits<float>::infinity())),
                                   _mm256_maskload_ps(p, _mm256_castps_si256(mask)), mask));
  }
#endif
#if defined(__AVX512F__)
  const auto mask = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (std::is_same_v<S, float> && sizeof(T) == 4)
    return Vec<T>(_mm512_mask_loadu_ps(splat(-std::numeric_limits<float>::infinity()), mask, p));
  if constexpr (std::is_same_v<S, BFloat16> && sizeof(T) == 4) {
    const __m256i bits = _mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(0xff80)), mask, p);
    return Vec<T>(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16)));
  }
  if constexpr (std::is_same_v<S, Float16> && sizeof(T) == 4)
    return Vec<T>(_mm512_cvtph_ps(_mm256_mask_loadu_epi16(_mm256_set1_epi16(static_cast<short>(0xfc00)), mask, p)));
#endif
  return gather<T>(p, n);
}

// Calls f with the elements from `index` on, as a pointer of their type.
template <class F>
inline auto with_elements(const void* data, DType dtype, int64_t index, F f) {
  switch (dtype) {
    case DType::f64: return f(static_cast<const double*>(data) + index);
    case DType::f32: return f(static_cast<const float*>(data) + index);
    case DType::bf16: return f(static_cast<const BFloat16*>(data) + index);
    default: return f(static_cast<const Float16*>(data) + index);
  }
}

template <class T>
inline T read(const Matrix& a, int64_t row, int64_t column) {
  return with_elements(a.data, a.dtype, row * a.stride + column, [](auto p) { return static_cast<T>(*p); });
}

// line[0, n) = elements [column, column + n) of a row, converted, and padded with -inf to a whole vector.
template <class T>
inline void read_line(const Matrix& a, int64_t row, int64_t column, int n, T* line, int64_t ahead = 0) {
  with_elements(a.data, a.dtype, row * a.stride + column, [=](auto p) {
    constexpr int w = Simd<T>::width;
    int i = 0;
    for (; i + 4 * w <= n; i += 4 * w) {
      if (ahead) prefetch(p, i + ahead, 4 * w);
      for (int u = 0; u < 4; ++u) store(line + i + u * w, load_from<T>(p + i + u * w));
    }
    for (; i < n; i += w) store(line + i, load_from<T>(p + i, n - i));
  });
}

// The n elements at p[offset] = line[0, n), rounded to nearest even.
template <class T>
inline void write_line(void* p, int64_t offset, DType dtype, int n, const T* __restrict line) {
  int i = 0;
  switch (dtype) {
    case DType::f64: {
      double* __restrict to = static_cast<double*>(p) + offset;
      for (; i < n; ++i) to[i] = line[i];
      break;
    }
    case DType::f32: {
      float* __restrict to = static_cast<float*>(p) + offset;
      if constexpr (sizeof(T) == 4)
        std::memcpy(to, line, n * sizeof(T));
      else
        for (; i < n; ++i) to[i] = static_cast<float>(line[i]);
      break;
    }
    case DType::bf16: {
      uint16_t* __restrict to = static_cast<uint16_t*>(p) + offset;
      for (; i < n; ++i) {
        const float x = static_cast<float>(line[i]);
        uint32_t bits;
        std::memcpy(&bits, &x, 4);
        const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        to[i] = static_cast<uint16_t>((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
      }
      break;
    }
    case DType::f16: {
      uint16_t* __restrict to = static_cast<uint16_t*>(p) + offset;
#if defined(__F16C__)
      if constexpr (sizeof(T) == 4)
        for (; i + 8 <= n; i += 8)
          _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                           _mm256_cvtps_ph(_mm256_loadu_ps(line + i), _MM_FROUND_TO_NEAREST_INT));
      for (; i < n; ++i) to[i] = _cvtss_sh(static_cast<float>(line[i]), _MM_FROUND_TO_NEAREST_INT);
#else
      for (; i < n; ++i) {
        const _Float16 h = static_cast<_Float16>(line[i]);
        std::memcpy(to + i, &h, 2);
      }
#endif
      break;
    }
  }
}

// Asks the cache for the n elements at p[offset], which need not exist, to write to them.
inline void prefetch_to_write(const void* p, int64_t offset, DType dtype, int n) {
  with_elements(p, dtype, offset, [=](auto to) {
    const auto begin = reinterpret_cast<uintptr_t>(to);
    for (uintptr_t i = 0; i < n * sizeof(*to); i += 64)
      __builtin_prefetch(reinterpret_cast<const void*>(begin + i), 1, 2);
  });
}

}  // namespace eekd::EEKD_ISA
