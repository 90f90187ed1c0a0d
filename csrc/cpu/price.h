// Latents at a price. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// A row walks over its candidates, and its residual changes as it goes. A change waits until the next candidate is
// looked at: residual, the row of W that changes it and the row that is looked at then go through the core once.

// Rows of W are fetched so many candidates ahead of their turn.
constexpr int64_t kCandidatesAhead = 3;

// Unsigned numbers that ascend where values descend; NaN is the least. Zeros of either sign are alike.
template <class A>
using Rank = std::make_unsigned_t<Key<A>>;
template <class A>
AKSAE_INLINE Rank<A> to_rank(A value) {
  if (value != value) return 0;
  const auto bits = std::bit_cast<Rank<A>>(value + A(0));
  const Rank<A> sign = Rank<A>(1) << (8 * sizeof(A) - 1);
  return bits & sign ? bits : ~(bits | sign);
}

// The slots of a row in the order they are visited: larger values first, NaN before all, ties by smaller index.
template <class A>
struct VisitingOrder {
  static constexpr int kDigits = sizeof(A);
  Buffer<Rank<A>> ranks, moved_ranks;
  Buffer<int32_t> slots, moved_slots;

  explicit VisitingOrder(int64_t width)
      : ranks(buffer<Rank<A>>(width)),
        moved_ranks(buffer<Rank<A>>(width)),
        slots(buffer<int32_t>(width)),
        moved_slots(buffer<int32_t>(width)) {}

  // A radix sort, byte by byte: branches of a sort by comparison would cost as much as the walk itself.
  template <class T>
  const int32_t* of(const CodeRow<T>& row) {
    for (int64_t j = 0; j < row.count; ++j) slots[j] = int32_t(j);
    if (!std::is_sorted(row.indices, row.indices + row.count))
      std::stable_sort(slots.get(), slots.get() + row.count,
                       [&](int32_t a, int32_t b) { return row.indices[a] < row.indices[b]; });
    int32_t hits[kDigits][256] = {};
    for (int64_t j = 0; j < row.count; ++j) {
      const Rank<A> rank = ranks[j] = to_rank<A>(widen(row.values[slots[j]]));
      for (int digit = 0; digit < kDigits; ++digit) ++hits[digit][uint8_t(rank >> (8 * digit))];
    }
    for (int digit = 0; digit < kDigits; ++digit) {
      int32_t first[256], sum = 0;
      for (int value = 0; value < 256; ++value) first[value] = sum, sum += hits[digit][value];
      const auto digit_of = [&](int64_t j) { return uint8_t(ranks[j] >> (8 * digit)); };
      if (row.count == 0 || hits[digit][digit_of(0)] == row.count) continue;
      for (int64_t j = 0; j < row.count; ++j) {
        const int32_t place = first[digit_of(j)]++;
        moved_ranks[place] = ranks[j], moved_slots[place] = slots[j];
      }
      std::swap(ranks, moved_ranks), std::swap(slots, moved_slots);
    }
    return slots.get();
  }
};

// r += step * change, then <r, w> and <w, w>. Sums as in `dots`.
template <class A>
struct Projection {
  A dot, square;
};
template <bool Changes, class T>
AKSAE_INLINE Projection<Acc<T>> project(Acc<T>* r, const T* w, int64_t n, Acc<T> step, const T* change, const T* next) {
  using A = Acc<T>;
  Projection<A> sum{};
  for (int64_t first = 0; first < n; first += kDotDepth<A>) {
    const int64_t last = std::min(n, first + kDotDepth<A>);
    Vector<A> dot[2] = {}, square[2] = {};
    const Vector<A> steps = splat(step);
    int64_t d = first;
    const auto some = [&](int chain) __attribute__((always_inline)) {
      Vector<A> residual = load(r + d);
      if constexpr (Changes) {
        residual += steps * load(change + d);
        store(r + d, residual);
      }
      const Vector<A> piece = load(w + d);
      dot[chain] += residual * piece;
      square[chain] += piece * piece;
      d += kLanes<A>;
    };
    while (d + 2 * kLanes<A> <= last) {
      prefetch(next + d, 2 * kLanes<A>);
      some(0), some(1);
    }
    while (d + kLanes<A> <= last) some(0);
    A one_dot = sum_lanes<A>(dot[0] + dot[1]), one_square = sum_lanes<A>(square[0] + square[1]);
    for (; d < last; ++d) {
      if constexpr (Changes) r[d] = std::fma(step, widen(change[d]), r[d]);
      const A piece = widen(w[d]);
      one_dot = std::fma(r[d], piece, one_dot);
      one_square = std::fma(piece, piece, one_square);
    }
    sum.dot += one_dot, sum.square += one_square;
  }
  return sum;
}

// Marks the candidates of a row that pay; `residual` starts as x less the bias.
template <class T>
AKSAE_INLINE void walk(const CodeRow<T>& row, const int32_t* order, const Matrix& W, Acc<T> price, int64_t passes,
                       Acc<T>* residual, uint8_t* kept) {
  using A = Acc<T>;
  std::fill_n(kept, row.count, uint8_t(price == -std::numeric_limits<A>::infinity()));
  if (price == -std::numeric_limits<A>::infinity()) return;
  const auto piece = [&](int64_t i) { return matrix_row<T>(W, row.indices[order[i]]); };
  A step = 0;
  const T* change = nullptr;
  for (int64_t pass = 0, changes = 1; pass < passes && changes; ++pass) {
    changes = 0;
    for (int64_t i = 0; i < row.count; ++i) {
      const int32_t slot = order[i];
      const T *const w = piece(i), *const next = piece(std::min(i + kCandidatesAhead, row.count - 1));
      const Projection<A> sum = change ? project<true, T>(residual, w, W.cols, step, change, next)
                                       : project<false, T>(residual, w, W.cols, step, change, next);
      const A value = widen(row.values[slot]);
      const A linear = 2 * value * sum.dot, quadratic = value * value * sum.square;
      // A NaN joins, and what is NaN does not leave.
      const bool moves = kept[slot] ? linear + quadratic < price : !(linear - quadratic <= price);
      step = kept[slot] ? value : -value;
      change = moves ? w : nullptr;
      kept[slot] ^= moves;
      changes += moves;
    }
  }
}

// out.indices are slots of the candidates, in the order of their latents.
template <class T>
void price_select(ParallelFor run, Codes candidates, Matrix W, const void* b, Matrix x, const void* price,
                  int64_t passes, CodesOut out, int32_t* latents) {
  using A = Acc<T>;
  parallel(run, candidates.rows, 4, [&](int64_t begin, int64_t end) {
    VisitingOrder<A> visiting(candidates.width);
    const auto residual = buffer<A>(x.cols);
    const auto kept = buffer<uint8_t>(candidates.width);
    for (int64_t row = begin; row < end; ++row) {
      const CodeRow<T> code = code_row<T>(candidates, row);
      const T *const from = matrix_row<T>(x, row), *const bias = static_cast<const T*>(b);
      for (int64_t d = 0; d < x.cols; ++d) residual[d] = widen(from[d]) - (bias ? widen(bias[d]) : A(0));
      walk(code, visiting.of(code), W, static_cast<const A*>(price)[row], passes, residual.get(), kept.get());

      T* const values = static_cast<T*>(out.values) + row * out.width;
      int32_t *const slots = out.indices + row * out.width, *const row_latents = latents + row * out.width;
      int64_t count = 0;
      for (int64_t j = 0; j < code.count; ++j)
        if (kept[j]) slots[count++] = int32_t(j);
      if (!std::is_sorted(code.indices, code.indices + code.count))
        std::stable_sort(slots, slots + count, [&](int32_t a, int32_t b) { return code.indices[a] < code.indices[b]; });
      for (int64_t j = 0; j < count; ++j) values[j] = code.values[slots[j]], row_latents[j] = code.indices[slots[j]];
      std::fill(values + count, values + out.width, T{});
      std::fill(slots + count, slots + out.width, -1);
      std::fill(row_latents + count, row_latents + out.width, -1);
      out.counts[row] = int32_t(count);
    }
  });
}
