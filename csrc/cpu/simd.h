// Vectors of the instruction set that AKSAE_LANE_BYTES and AKSAE_ISA name. Included once by each cpu/isa_*.cpp, inside
// namespace aksae::AKSAE_ISA, after its target pragma; so everything here exists once for each instruction set.

constexpr int kVectorBytes = AKSAE_LANE_BYTES;

struct bf16 {
  uint16_t bits;
};

#define AKSAE_INLINE inline __attribute__((always_inline))

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vector = typename VectorOf<A>::type;
template <class A>
constexpr int kLanes = kVectorBytes / int(sizeof(A));

// The type sums are held in, for a storage type.
template <class T>
struct AccOf {
  using type = T;
};
template <>
struct AccOf<bf16> {
  using type = float;
};
template <class T>
using Acc = typename AccOf<T>::type;

AKSAE_INLINE float widen(float x) { return x; }
AKSAE_INLINE double widen(double x) { return x; }
AKSAE_INLINE float widen(bf16 x) { return std::bit_cast<float>(uint32_t(x.bits) << 16); }

AKSAE_INLINE void narrow(float x, float& out) { out = x; }
AKSAE_INLINE void narrow(double x, double& out) { out = x; }
// Round to nearest even; NaN stays NaN.
AKSAE_INLINE void narrow(float x, bf16& out) {
  const uint32_t u = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  out.bits = x != x ? uint16_t(0x7fc0) : uint16_t(rounded);
}

template <class A>
AKSAE_INLINE Vector<A> splat(A x) {
  return x - Vector<A>{};
}

AKSAE_INLINE Vector<float> load(const float* p) {
  Vector<float> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
AKSAE_INLINE Vector<double> load(const double* p) {
  Vector<double> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
AKSAE_INLINE Vector<float> load(const bf16* p) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
  Half half;
  __builtin_memcpy(&half, p, sizeof half);
  return (Vector<float>)(__builtin_convertvector(half, Full) << 16);
}

template <class A>
AKSAE_INLINE void store(A* p, Vector<A> v) {
  __builtin_memcpy(p, &v, sizeof v);
}
AKSAE_INLINE void store(bf16* p, Vector<float> v) {
  typedef uint16_t Half __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Full __attribute__((vector_size(kVectorBytes)));
  const Full u = (Full)v;
  const Full rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const Full is_nan = (Full)(v != v);
  const Half half = __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), Half);
  __builtin_memcpy(p, &half, sizeof half);
}

AKSAE_INLINE float square_root(float x) { return std::sqrt(x); }
AKSAE_INLINE double square_root(double x) { return std::sqrt(x); }
AKSAE_INLINE Vector<float> square_root(Vector<float> v) {
#if AKSAE_ISA_LEVEL == 512
  return (Vector<float>)_mm512_sqrt_ps((__m512)v);
#elif AKSAE_ISA_LEVEL == 2
  return (Vector<float>)_mm256_sqrt_ps((__m256)v);
#else
  for (int i = 0; i < kLanes<float>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}
AKSAE_INLINE Vector<double> square_root(Vector<double> v) {
#if AKSAE_ISA_LEVEL == 512
  return (Vector<double>)_mm512_sqrt_pd((__m512d)v);
#elif AKSAE_ISA_LEVEL == 2
  return (Vector<double>)_mm256_sqrt_pd((__m256d)v);
#else
  for (int i = 0; i < kLanes<double>; ++i) v[i] = std::sqrt(v[i]);
  return v;
#endif
}

template <class A>
AKSAE_INLINE A sum_lanes(Vector<A> v) {
  // Halves are added pairwise: the order of the lanes is fixed.
  A lanes[kLanes<A>];
  __builtin_memcpy(lanes, &v, sizeof v);
#pragma GCC unroll 4
  for (int width = kLanes<A> / 2; width > 0; width /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// Bit i is set where v[i] is not <= limit[i]: greater, or unordered.
AKSAE_INLINE uint64_t mask_not_le(Vector<float> v, Vector<float> limit) {
#if AKSAE_ISA_LEVEL == 512
  return _mm512_cmp_ps_mask((__m512)v, (__m512)limit, _CMP_NLE_UQ);
#elif AKSAE_ISA_LEVEL == 2
  return uint32_t(_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, (__m256)limit, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_ps(_mm_cmpnle_ps((__m128)v, (__m128)limit)));
#else
  const auto out = ~(v <= limit);
  uint64_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) mask |= uint64_t(out[i] & 1) << i;
  return mask;
#endif
}
AKSAE_INLINE uint64_t mask_not_le(Vector<double> v, Vector<double> limit) {
#if AKSAE_ISA_LEVEL == 512
  return _mm512_cmp_pd_mask((__m512d)v, (__m512d)limit, _CMP_NLE_UQ);
#elif AKSAE_ISA_LEVEL == 2
  return uint32_t(_mm256_movemask_pd(_mm256_cmp_pd((__m256d)v, (__m256d)limit, _CMP_NLE_UQ)));
#elif defined(__SSE2__)
  return uint32_t(_mm_movemask_pd(_mm_cmpnle_pd((__m128d)v, (__m128d)limit)));
#else
  const auto out = ~(v <= limit);
  uint64_t mask = 0;
  for (int i = 0; i < kLanes<double>; ++i) mask |= uint64_t(out[i] & 1) << i;
  return mask;
#endif
}

// Memory for n numbers, not initialised, at the start of a cache line: tiles that straddle two cost twice.
struct Free {
  void operator()(void* p) const { std::free(p); }
};
template <class A>
using Buffer = std::unique_ptr<A[], Free>;
template <class A>
Buffer<A> buffer(int64_t n) {
  void* const p = std::aligned_alloc(64, (n * sizeof(A) + 64) / 64 * 64);
  if (!p) throw std::bad_alloc();
  return Buffer<A>(static_cast<A*>(p));
}

// Memory that nobody has touched comes page by page; in large pages it comes three times as fast. A mere hint.
inline void prefer_large_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = uintptr_t(1) << 21;
  const uintptr_t begin = (uintptr_t(memory) + kPage - 1) / kPage * kPage,
                  end = (uintptr_t(memory) + bytes) / kPage * kPage;
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

template <class T>
AKSAE_INLINE void prefetch(const T* p, int64_t n) {
  for (int64_t byte = 0; byte < n * int64_t(sizeof(T)); byte += 64)
    __builtin_prefetch(reinterpret_cast<const char*>(p) + byte);
}

// 0, 1, 2, ...
AKSAE_INLINE VectorOf<float>::bits iota() {
  VectorOf<float>::bits v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = i;
  return v;
}

// Writes the lanes that mask names next to each other; what follows them, up to a whole vector, is overwritten.
template <class E, class V>
AKSAE_INLINE void store_packed(E* p, V v, uint64_t mask) {
  static_assert(sizeof(E) == 4 && sizeof(V) == kVectorBytes);
#if AKSAE_ISA_LEVEL == 512
  _mm512_storeu_si512(p, _mm512_maskz_compress_epi32(__mmask16(mask), (__m512i)v));
#else
  E lanes[kLanes<float>];
  __builtin_memcpy(lanes, &v, sizeof v);
  for (; mask; mask &= mask - 1) *p++ = lanes[__builtin_ctzll(mask)];
#endif
}

// Bit i is set where lane i of the comparison's result is.
AKSAE_INLINE uint64_t mask_of(VectorOf<float>::bits v) {
#if AKSAE_ISA_LEVEL == 512
  return _mm512_movepi32_mask((__m512i)v);
#elif AKSAE_ISA_LEVEL == 2
  return uint32_t(_mm256_movemask_ps((__m256)v));
#else
  uint64_t mask = 0;
  for (int i = 0; i < kLanes<float>; ++i) mask |= uint64_t(v[i] & 1) << i;
  return mask;
#endif
}

// body(begin, end) over [0, n) on several threads.
template <class Body>
AKSAE_INLINE void parallel(ParallelFor run, int64_t n, int64_t grain, const Body& body) {
  run(
      n, grain,
      [](const void* closure, int64_t begin, int64_t end) { (*static_cast<const Body*>(closure))(begin, end); }, &body);
}
