// Dot products. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// A product is the sum of two chains of vectors, even and odd, their lanes added pairwise, then the last columns one by
// one; for every kDotDepth columns, in order. Its bits do not depend on what else is multiplied along with it.

// 512 rows of that many columns fit a second-level cache.
template <class A>
constexpr int64_t kDotDepth = 48 * kLanes<A>;

// scores[i * stride + j] = <x[i], w[j]> over columns [first, last), at most kDotDepth of them; added to the scores
// unless first is 0. fetch(d) is called for every vector of columns from d on,
// to bring what comes next into cache.
template <int Rows, int Latents, class X, class W, class Fetch>
AKSAE_INLINE void dots(const X* const* x, const W* const* w, int64_t first, int64_t last, Acc<X>* scores,
                       int64_t stride, const Fetch& fetch) {
  using A = Acc<X>;
  constexpr int kStep = 2 * kLanes<A>;
  Vector<A> acc[Rows][Latents][2];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) acc[i][j][0] = acc[i][j][1] = Vector<A>{};
  int64_t d = first;
  const auto step = [&](int chain, int64_t at) __attribute__((always_inline)) {
    fetch(at);
    Vector<A> rows[Rows];
#pragma GCC unroll 8
    for (int i = 0; i < Rows; ++i) rows[i] = load(x[i] + at);
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) {
      const Vector<A> latent = load(w[j] + at);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) acc[i][j][chain] += rows[i] * latent;
    }
  };
  for (; d + kStep <= last; d += kStep) step(0, d), step(1, d + kLanes<A>);
  for (; d + kLanes<A> <= last; d += kLanes<A>) step(0, d);
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < Latents; ++j) {
      A sum = sum_lanes<A>(acc[i][j][0] + acc[i][j][1]);
      for (int64_t t = d; t < last; ++t) sum = std::fma(widen(x[i][t]), widen(w[j][t]), sum);
      A& score = scores[i * stride + j];
      score = first ? score + sum : sum;
    }
}

// <a, b> over n columns.
template <class X, class W>
AKSAE_INLINE Acc<X> dot(const X* a, const W* b, int64_t n) {
  Acc<X> sum = 0;
  for (int64_t first = 0; first < n; first += kDotDepth<Acc<X>>)
    dots<1, 1>(&a, &b, first, std::min(n, first + kDotDepth<Acc<X>>), &sum, 1, [](int64_t) {});
  return sum;
}
