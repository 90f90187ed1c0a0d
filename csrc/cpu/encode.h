// The product x W^T + b as a source of scores for select_rows. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// A task owns a block of rows of x, packed once, and walks over tiles of latents: pack a tile of W for kDepth columns
// of D, multiply, go on. The tile of scores stays in cache and is filtered there. Every score is the sum, in order, of
// one chain of multiply-adds for each kDepth columns of D, then the bias: its bits do not depend on tiles, edges or
// threads. Chains are short because equal terms, whose roundings all go one way, would leave the contract's bound.

// Registers: kMr rows times two vectors of latents, and room for operands.
#if AKSAE_ISA_LEVEL == 512
constexpr int kMr = 12;
#elif AKSAE_ISA_LEVEL == 2
constexpr int kMr = 6;
#else
constexpr int kMr = 4;
#endif
constexpr int64_t kDepth = 128;

template <class T>
struct EncodeScores {
  using A = Acc<T>;
  static constexpr int kNr = 2 * kLanes<A>;

  Matrix x, W;
  const T* bias;
  int64_t block_rows, tile_cols;

  EncodeScores(Matrix x, Matrix W, const void* bias, int threads)
      : x(x), W(W), bias(static_cast<const T*>(bias)), tile_cols(256) {
    // Long blocks pay for packing W; as many blocks as threads, no longer than what leaves a tile of scores in cache.
    const int64_t share = (x.rows + threads - 1) / threads;
    const int64_t rounds = std::max<int64_t>(1, (share + 511) / 512);
    block_rows = std::max<int64_t>(kMr, round_up((share + rounds - 1) / rounds, kMr));
  }

  struct Scratch {
    std::unique_ptr<A[]> x_packed;  // [D / kDepth][rows / kMr][kDepth][kMr]
    std::unique_ptr<A[]> W_packed;  // [tile / kNr][kDepth][kNr]
    std::unique_ptr<A[]> scores;    // [rows][tile]
    int64_t rows;
  };

  Scratch scratch() const {
    return {std::make_unique_for_overwrite<A[]>(block_rows * x.cols),
            std::make_unique_for_overwrite<A[]>(tile_cols * kDepth),
            std::make_unique_for_overwrite<A[]>(block_rows * tile_cols), 0};
  }

  void open(Scratch& s, int64_t row, int64_t n) const {
    s.rows = n;
    const int64_t panels = round_up(n, kMr) / kMr;
    for (int64_t p = 0; p < x.cols; p += kDepth) {
      const int64_t depth = std::min(kDepth, x.cols - p);
      A* packed = &s.x_packed[p * panels * kMr];
      for (int64_t panel = 0; panel < panels; ++panel, packed += depth * kMr)
        pack<kMr>(x, row + panel * kMr, std::min<int64_t>(kMr, n - panel * kMr), p, depth, packed);
    }
  }

  void tile(Scratch& s, int64_t col, int64_t n) const {
    const int64_t x_panels = round_up(s.rows, kMr) / kMr, W_panels = round_up(n, kNr) / kNr;
    if (x.cols == 0) std::fill_n(&s.scores[0], x_panels * kMr * tile_cols, A(0));
    for (int64_t p = 0; p < x.cols; p += kDepth) {
      const int64_t depth = std::min(kDepth, x.cols - p);
      for (int64_t j = 0; j < W_panels; ++j)
        pack<kNr>(W, col + j * kNr, std::min<int64_t>(kNr, n - j * kNr), p, depth, &s.W_packed[j * depth * kNr]);
      for (int64_t j = 0; j < W_panels; ++j)
        for (int64_t i = 0; i < x_panels; ++i)
          multiply(&s.x_packed[p * x_panels * kMr + i * depth * kMr], &s.W_packed[j * depth * kNr], depth, p > 0,
                   &s.scores[i * kMr * tile_cols + j * kNr]);
    }
    if (!bias) return;
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t j = 0; j < n; ++j) s.scores[r * tile_cols + j] += widen(bias[col + j]);
  }

  const A* row(const Scratch& s, int64_t r) const { return &s.scores[r * tile_cols]; }

 private:
  static int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

  // Rows [first, first + n) of m, columns [p, p + depth), transposed to [depth][Width]; missing rows are zero.
  template <int Width>
  static void pack(Matrix m, int64_t first, int64_t n, int64_t p, int64_t depth, A* out) {
    const T* source = static_cast<const T*>(m.data) + first * m.stride + p;
    if (n == Width) {
      // Constant trip counts: the compiler keeps Width read streams and writes whole vectors.
      for (int64_t d = 0; d < depth; ++d)
        for (int r = 0; r < Width; ++r) out[d * Width + r] = widen(source[r * m.stride + d]);
      return;
    }
    std::fill_n(out, depth * Width, A(0));
    for (int64_t r = 0; r < n; ++r)
      for (int64_t d = 0; d < depth; ++d) out[d * Width + r] = widen(source[r * m.stride + d]);
  }

  // scores[kMr][kNr] (+)= xs[depth][kMr]^T ws[depth][kNr].
  void multiply(const A* xs, const A* ws, int64_t depth, bool accumulate, A* scores) const {
    Vector<A> acc[kMr][2];
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) acc[i][v] = Vector<A>{};
    for (int64_t d = 0; d < depth; ++d, xs += kMr, ws += kNr) {
      const Vector<A> w0 = load(ws), w1 = load(ws + kLanes<A>);
#pragma GCC unroll 16
      for (int i = 0; i < kMr; ++i) {
        const Vector<A> broadcast = splat(xs[i]);
        acc[i][0] += broadcast * w0;
        acc[i][1] += broadcast * w1;
      }
    }
#pragma GCC unroll 16
    for (int i = 0; i < kMr; ++i)
#pragma GCC unroll 2
      for (int v = 0; v < 2; ++v) {
        A* const out = scores + i * tile_cols + v * kLanes<A>;
        store(out, accumulate ? load(out) + acc[i][v] : acc[i][v]);
      }
  }
};

template <class T>
void topk_encode(ParallelFor run, int threads, Matrix x, Matrix W, const void* b, const int32_t* k, CodesOut out) {
  select_rows<T>(run, threads, EncodeScores<T>(x, W, b, threads), x.rows, W.rows, k, out);
}
