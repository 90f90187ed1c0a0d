// Products with codes. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// Rows of W are gathered in slices of kSlice columns whose sums stay in registers; the next rows are prefetched.

// Vectors of one slice: 384 fp32 columns with AVX-512.
#if AKSAE_ISA_LEVEL == 512
constexpr int kSliceVectors = 24;
#else
constexpr int kSliceVectors = 8;
#endif
template <class A>
constexpr int64_t kSlice = kSliceVectors * kLanes<A>;
constexpr int64_t kPrefetchDistance = 6;

// Terms of n that are added up in a row before their sum joins the others: two levels of about sqrt(n) terms lose far
// less than one long chain.
AKSAE_INLINE int64_t run_length(int64_t n) { return std::max<int64_t>(16, int64_t(std::sqrt(double(n)))); }

// One slice of sum_j weight(j) * piece(j), j < n, into out (accumulation type). piece(j) points to `cols` <= kSlice
// elements. Every column is summed in runs of run_length(n) terms, in the order of j.
template <class T, class Weight, class Piece>
AKSAE_INLINE void sum_pieces(int64_t n, int64_t cols, const Weight& weight, const Piece& piece, Acc<T>* out) {
  using A = Acc<T>;
  std::fill_n(out, cols, A(0));
  const int64_t run = run_length(n);
  for (int64_t first = 0; first < n; first += run) {
    const int64_t last = std::min(n, first + run);
    if (cols == kSlice<A>) {
      Vector<A> acc[kSliceVectors];
#pragma GCC unroll 24
      for (int v = 0; v < kSliceVectors; ++v) acc[v] = Vector<A>{};
      for (int64_t j = first; j < last; ++j) {
        if (j + kPrefetchDistance < n) prefetch(piece(j + kPrefetchDistance), kSlice<A>);
        const Vector<A> w = splat(weight(j));
        const T* p = piece(j);
#pragma GCC unroll 24
        for (int v = 0; v < kSliceVectors; ++v) acc[v] += w * load(p + v * kLanes<A>);
      }
#pragma GCC unroll 24
      for (int v = 0; v < kSliceVectors; ++v) store(out + v * kLanes<A>, load(out + v * kLanes<A>) + acc[v]);
      continue;
    }
    // The last columns: vector by vector, then one by one.
    int64_t d = 0;
    for (; d + kLanes<A> <= cols; d += kLanes<A>) {
      Vector<A> acc{};
      for (int64_t j = first; j < last; ++j) acc += splat(weight(j)) * load(piece(j) + d);
      store(out + d, load(out + d) + acc);
    }
    for (; d < cols; ++d) {
      A acc = 0;
      for (int64_t j = first; j < last; ++j) acc = std::fma(weight(j), widen(piece(j)[d]), acc);
      out[d] += acc;
    }
  }
}

// For a long sum of scalars of which there is one for many vectors of work: more digits cost nothing there.
template <class A>
using WideSum = std::conditional_t<std::is_same_v<A, float>, double, long double>;

template <class T>
struct CodeRow {
  const T* values;
  const int32_t* indices;
  int64_t count;
};
template <class T>
AKSAE_INLINE CodeRow<T> code_row(const Codes& codes, int64_t b) {
  return {static_cast<const T*>(codes.values) + b * codes.width, codes.indices + b * codes.width, codes.counts[b]};
}
template <class T>
AKSAE_INLINE const T* matrix_row(const Matrix& m, int64_t row) {
  return static_cast<const T*>(m.data) + row * m.stride;
}

// One slice of a decoded row, with the bias.
template <class T>
AKSAE_INLINE void decode_slice(const CodeRow<T>& row, const Matrix& W, const T* bias, int64_t d, int64_t cols,
                               Acc<T>* out) {
  sum_pieces<T>(
      row.count, cols, [&](int64_t j) { return widen(row.values[j]); },
      [&](int64_t j) { return matrix_row<T>(W, row.indices[j]) + d; }, out);
  if (bias)
    for (int64_t i = 0; i < cols; ++i) out[i] += widen(bias[d + i]);
}

template <class T>
void sparse_decode(ParallelFor run, Codes codes, Matrix W, const void* b, void* y) {
  using A = Acc<T>;
  parallel(run, codes.rows, 4, [&](int64_t begin, int64_t end) {
    alignas(64) A slice[kSlice<A>];
    for (int64_t row = begin; row < end; ++row)
      for (int64_t d = 0; d < W.cols; d += kSlice<A>) {
        const int64_t cols = std::min(kSlice<A>, W.cols - d);
        decode_slice(code_row<T>(codes, row), W, static_cast<const T*>(b), d, cols, slice);
        T* const out = static_cast<T*>(y) + row * W.cols + d;
        for (int64_t i = 0; i < cols; ++i) narrow(slice[i], out[i]);
      }
  });
}

// out[j] += <slice, W[indices[j]]> over columns [d, d + cols).
template <class T>
AKSAE_INLINE void add_dots(const CodeRow<T>& row, const Matrix& W, int64_t d, int64_t cols, const Acc<T>* slice,
                           Acc<T>* out) {
  constexpr int kPieces = 4;
  const auto some = [&]<int Pieces>(int64_t j) __attribute__((always_inline)) {
    const T* pieces[Pieces];
    Acc<T> sums[Pieces];
    for (int i = 0; i < Pieces; ++i) pieces[i] = matrix_row<T>(W, row.indices[j + i]) + d;
    dots<Pieces, 1>(pieces, &slice, 0, cols, sums, 1, [](int64_t) {});
    for (int i = 0; i < Pieces; ++i) out[j + i] += sums[i];
  };
  int64_t j = 0;
  for (; j + kPieces <= row.count; j += kPieces) some.template operator()<kPieces>(j);
  for (; j < row.count; ++j) some.template operator()<1>(j);
}

// The pieces of a slice are read a second time while they are in cache, for their products with the residual.
template <class T>
void decode_mse(ParallelFor run, Codes codes, Matrix W, const void* b, Matrix target, void* loss, void* residual,
                void* value_grad) {
  using A = Acc<T>;
  parallel(run, codes.rows, 4, [&](int64_t begin, int64_t end) {
    alignas(64) A slice[kSlice<A>];
    for (int64_t row = begin; row < end; ++row) {
      const CodeRow<T> code = code_row<T>(codes, row);
      A* const value_grads = value_grad ? static_cast<A*>(value_grad) + row * codes.width : nullptr;
      if (value_grads) std::fill_n(value_grads, codes.width, A(0));
      // Squares all have one sign: a chain of slices in A would lose more than PyTorch's sum.
      WideSum<A> total = 0;
      for (int64_t d = 0; d < W.cols; d += kSlice<A>) {
        const int64_t cols = std::min(kSlice<A>, W.cols - d);
        decode_slice(code, W, static_cast<const T*>(b), d, cols, slice);
        const T* const wanted = matrix_row<T>(target, row) + d;
        for (int64_t i = 0; i < cols; ++i) slice[i] -= widen(wanted[i]);
        total += dot(slice, slice, cols);
        if (residual) std::copy_n(slice, cols, static_cast<A*>(residual) + row * W.cols + d);
        if (value_grads) add_dots<T>(code, W, d, cols, slice, value_grads);
      }
      static_cast<A*>(loss)[row] = A(total);
    }
  });
}

template <class T>
void sparse_value_grad(ParallelFor run, Codes pattern, Matrix grad, Matrix W, void* out, bool unrounded) {
  using A = Acc<T>;
  parallel(run, pattern.rows, 4, [&](int64_t begin, int64_t end) {
    alignas(64) A slice[kSlice<A>];
    const auto sums = buffer<A>(pattern.width);
    for (int64_t row = begin; row < end; ++row) {
      const CodeRow<T> code = code_row<T>(pattern, row);
      std::fill_n(sums.get(), code.count, A(0));
      for (int64_t d = 0; d < grad.cols; d += kSlice<A>) {
        const int64_t cols = std::min(kSlice<A>, grad.cols - d);
        for (int64_t i = 0; i < cols; ++i) slice[i] = widen(matrix_row<T>(grad, row)[d + i]);
        add_dots<T>(code, W, d, cols, slice, sums.get());
      }
      const auto write = [&](auto* dots) {
        for (int64_t j = 0; j < code.count; ++j) narrow(sums[j], dots[j]);
        std::fill(dots + code.count, dots + pattern.width, std::remove_pointer_t<decltype(dots)>{});
      };
      unrounded ? write(static_cast<A*>(out) + row * pattern.width) : write(static_cast<T*>(out) + row * pattern.width);
    }
  });
}

// Codes by latent (CSC): the hits of latent f are entries [first[f], first[f + 1]), rows ascending.
template <class A>
struct Columns {
  std::unique_ptr<int64_t[]> first;
  std::unique_ptr<int32_t[]> row;
  std::unique_ptr<A[]> value;
};

template <class T>
Columns<Acc<T>> by_latent(const Codes& codes, int64_t d_sae) {
  Columns<Acc<T>> columns{std::make_unique<int64_t[]>(d_sae + 2), nullptr, nullptr};
  // Counted two places up, so that filling leaves first[f] where it belongs.
  int64_t* const next = columns.first.get() + 1;
  for (int64_t b = 0; b < codes.rows; ++b) {
    const CodeRow<T> code = code_row<T>(codes, b);
    for (int64_t j = 0; j < code.count; ++j) ++next[code.indices[j] + 1];
  }
  for (int64_t f = 0; f < d_sae; ++f) next[f + 1] += next[f];
  columns.row = std::make_unique_for_overwrite<int32_t[]>(next[d_sae]);
  columns.value = std::make_unique_for_overwrite<Acc<T>[]>(next[d_sae]);
  for (int64_t b = 0; b < codes.rows; ++b) {
    const CodeRow<T> code = code_row<T>(codes, b);
    for (int64_t j = 0; j < code.count; ++j) {
      const int64_t entry = next[code.indices[j]]++;
      columns.row[entry] = int32_t(b);
      columns.value[entry] = widen(code.values[j]);
    }
  }
  return columns;
}

template <class T>
void sparse_weight_grad(ParallelFor run, Codes codes, Matrix dense, int64_t d_sae, void* grad, void* sums) {
  using A = Acc<T>;
  prefer_large_pages(grad, d_sae * dense.cols * int64_t(sizeof(T)));
  const Columns<A> columns = by_latent<T>(codes, d_sae);
  // Tasks hold about equal work, a hit or the store of a row counting as one: a few latents may have most of the hits.
  const auto work_before = [&](int64_t f) { return columns.first[f] + f; };
  const int64_t tasks = std::min<int64_t>(d_sae, 64);
  const auto first_latent = [&](int64_t task) {
    const int64_t wanted = work_before(d_sae) * task / tasks;
    int64_t low = 0, high = d_sae;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (work_before(middle) < wanted)
        low = middle + 1;
      else
        high = middle;
    }
    return low;
  };
  parallel(run, tasks, 1, [&](int64_t begin, int64_t end) {
    alignas(64) A slice[kSlice<A>];
    const int64_t last = end == tasks ? d_sae : first_latent(end);
    for (int64_t f = first_latent(begin); f < last; ++f) {
      const int64_t from = columns.first[f], n = columns.first[f + 1] - from;
      T* const out = static_cast<T*>(grad) + f * dense.cols;
      if (n == 0) {
        std::fill_n(out, dense.cols, T{});
      } else {
        for (int64_t d = 0; d < dense.cols; d += kSlice<A>) {
          const int64_t cols = std::min(kSlice<A>, dense.cols - d);
          sum_pieces<T>(
              n, cols, [&](int64_t j) { return columns.value[from + j]; },
              [&](int64_t j) { return matrix_row<T>(dense, columns.row[from + j]) + d; }, slice);
          for (int64_t i = 0; i < cols; ++i) narrow(slice[i], out[d + i]);
        }
      }
      if (sums) {
        WideSum<A> total = 0;
        for (int64_t j = 0; j < n; ++j) total += columns.value[from + j];
        narrow(A(total), static_cast<T*>(sums)[f]);
      }
    }
  });
}

template <class T>
void scatter_codes(ParallelFor run, Codes codes, int64_t d_sae, void* dense) {
  parallel(run, codes.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const CodeRow<T> code = code_row<T>(codes, b);
      T* const out = static_cast<T*>(dense) + b * d_sae;
      std::fill_n(out, d_sae, T{});
      for (int64_t j = 0; j < code.count; ++j) {
        T& slot = out[code.indices[j]];
        narrow(widen(slot) + widen(code.values[j]), slot);
      }
    }
  });
}
