// Encoding with bf16 units. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// bf16 inputs: the units' products are the scores. fp32 inputs: they find candidates, an error bound proves that
// nothing else can win, and the candidates alone are multiplied in fp32.
//
// The bound. Write s = sum_d x_d w_d + b for the exact score of row x and latent w; ~ marks operands rounded to bf16;
// p is the units' product and r the fp32 product of DotScores, plus b. By Cauchy-Schwarz
//   |sum x w - sum x~ w~| <= |x - x~| |w| + |x~| |w - w~|.
// Summing n = D + 32 terms in any order, each addition losing 2^-23 of its result (units) or 2^-24 (fp32), costs at
// most n 2^-23 |x~||w~| and n 2^-24 |x||w|; with the few roundings of the bound's own arithmetic that is less than
//   n 2^-22 |x||w| + 2^-20 |b| + n 2^-120,
// where the last term stands for results below 2^-126 that became 0. So |p + b - r| <= e with
//   e = (|x - x~| + n 2^-22 |x|) |w| + |x~| |w - w~| + 2^-20 |b| + n 2^-120,
// norms taken with a margin for their own roundings (kNormMargin, kNormFloor).
//
// The certificate. L = the k-th largest of the lower bounds p + b - e seen so far. At least k candidates have r >= L,
// so a latent with p + b + e < L has r < L and cannot be among the k best, not even by a tie; every other one is kept.
// No guess is involved, and no candidate is dropped otherwise. Where the bound says nothing (numbers that are not
// finite or near overflow, or more candidates than kDenseShare of the latents) a row is encoded by DotScores from the
// start, whose scores have the same bits.

constexpr float kNormMargin = 1 + 0x1p-10f, kNormFloor = 0x1p-53f, kNearOverflow = 0x1p126f;
constexpr float kSumLoss = 0x1p-22f, kBiasLoss = 0x1p-20f, kUnderflow = 0x1p-120f;
constexpr int64_t kDenseShare = 4;
// Longer sums would leave the norms' margin.
constexpr int64_t kScreenDepth = int64_t(1) << 17;
// With fewer rows the product waits for W, and reading it once in fp32 is all there is to do.
constexpr int64_t kScreenRows = 16;

// The least rows of a block of the screen that is there to share the work evenly: they read a tile of W from the cache.
constexpr int64_t kEvenRows = 128;
// Numbers of W that are packed before rows are screened with them: each time the threads wait for each other.
constexpr int64_t kPackedAtOnce = int64_t(1) << 22;

// Of that many rows kDotDepth columns are 1.5 MB, and stay in the second-level cache.
constexpr int64_t kRescoredRows = 512;

// Packs rows [first, first + n) of m; norms and residuals are those of the packed rows, for fp32 alone.
template <class T>
void pack_rows(const Bf16Units& units, Matrix m, int64_t first, int64_t n, bool right, uint16_t* panels, float* norms,
               float* residuals) {
  const int64_t size = panel_size(m.cols), padded = panels_of(n) * kBf16Rows;
  for (int64_t r = 0; r < padded; r += kBf16Rows, panels += size) {
    const int64_t rows = std::clamp<int64_t>(n - r, 0, kBf16Rows);
    const T* const data = static_cast<const T*>(m.data) + (first + r) * m.stride;
    if constexpr (std::is_same_v<T, bf16>)
      units.pack_bf16(reinterpret_cast<const uint16_t*>(data), m.stride, rows, m.cols, right, panels);
    else
      units.pack_f32(data, m.stride, rows, m.cols, right, panels, norms + r, residuals + r);
  }
}

// The same on several threads.
template <class T>
void pack_all(ParallelFor run, const Bf16Units& units, Matrix m, int64_t first, int64_t n, bool right, uint16_t* panels,
              float* norms, float* residuals) {
  parallel(run, panels_of(n) / 2, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = begin * 2 * kBf16Rows, rows = std::min(n, end * 2 * kBf16Rows) - from;
    pack_rows<T>(units, m, first + from, rows, right, panels + from / kBf16Rows * panel_size(m.cols),
                 norms ? norms + from : nullptr, residuals ? residuals + from : nullptr);
  });
}

// Products on bf16 units as a source of scores. Rows of x are packed; latents are for fp32, and are packed tile by tile
// for bf16.
template <class T>
struct Bf16Scores {
  const Bf16Units* units;
  const uint16_t* x_panels;
  Matrix W;
  const uint16_t* W_panels;  // of latents [first_latent, last_latent); null: to be packed
  int64_t first_latent, last_latent;
  const T* bias;  // added to the scores, where there is one
  int64_t block_rows, panel_rows = 2 * kBf16Rows, tile_cols;

  Bf16Scores(const Bf16Units& units, const uint16_t* x_panels, int64_t n_rows, Matrix W, const T* bias, int threads)
      : units(&units), x_panels(x_panels), W(W), W_panels(nullptr), first_latent(0), last_latent(0), bias(bias) {
    // A block of x and a tile of W stay in the second-level cache.
    const int64_t fit = std::clamp<int64_t>((int64_t(1) << 19) / std::max<int64_t>(1, W.cols), 2, 16) * panel_rows;
    const int64_t share = (n_rows + threads - 1) / threads, rounds = std::max<int64_t>(1, (share + fit - 1) / fit);
    block_rows = std::max(panel_rows, round_up((share + rounds - 1) / rounds, panel_rows));
    // Latents that are packed already cost a short block nothing.
    if (std::is_same_v<T, float> && threads > 1)
      block_rows = std::max(std::min(block_rows, kEvenRows), round_up(block_rows / kTasksOfThread, panel_rows));
    tile_cols = W.cols <= 1024 ? 512 : 128;
  }

  struct Scratch {
    const Bf16Units* units;
    Buffer<uint16_t> W_panels;
    Buffer<float> scores;  // [panel][tile]
    const uint16_t *x_block, *W_tile;
    const char* ahead;  // the next tile, as it lies in memory
    int64_t ahead_bytes, rows, first_of_panel, col, cols;

    ~Scratch() { units->end(); }
  };
  Scratch scratch() const {
    units->begin();
    return {units,
            buffer<uint16_t>(W_panels ? 0 : tile_cols * round_up(W.cols, kBf16Cols)),
            buffer<float>(panel_rows * tile_cols),
            nullptr,
            nullptr,
            0,
            0,
            0};
  }
  void open(Scratch& s, int64_t row, int64_t n) const {
    s.x_block = x_panels + row / kBf16Rows * panel_size(W.cols), s.rows = n;
  }
  void start(Scratch& s, int64_t col, int64_t n) const {
    s.col = col, s.cols = n;
    if constexpr (std::is_same_v<T, bf16>) {
      pack_rows<T>(*units, W, col, n, true, s.W_panels.get(), nullptr, nullptr);
      s.W_tile = s.W_panels.get();
      s.ahead = reinterpret_cast<const char*>(static_cast<const T*>(W.data) + (col + n) * W.stride);
      s.ahead_bytes = std::min(tile_cols, W.rows - col - n) * W.stride * sizeof(T);
    } else {
      s.W_tile = W_panels + (col - first_latent) / kBf16Rows * panel_size(W.cols);
      s.ahead = reinterpret_cast<const char*>(s.W_tile + n / kBf16Rows * panel_size(W.cols));
      s.ahead_bytes = std::clamp<int64_t>(last_latent - col - n, 0, tile_cols) * round_up(W.cols, kBf16Cols) * 2;
    }
  }
  void multiply(Scratch& s, int64_t r, int64_t n) const {
    s.first_of_panel = r;
    // A share of the next tile comes meanwhile.
    const int64_t share = s.ahead_bytes / (s.rows / panel_rows + 1) + 1, from = r / panel_rows * share;
    units->multiply(s.x_block + r / kBf16Rows * panel_size(W.cols), s.W_tile, round_up(W.cols, kBf16Cols) / kBf16Cols,
                    panels_of(s.cols), s.scores.get(), tile_cols, s.ahead + from,
                    std::clamp<int64_t>(s.ahead_bytes - from, 0, share));
    if (!bias) return;
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < s.cols; ++j) s.scores[i * tile_cols + j] += widen(bias[s.col + j]);
  }
  const float* row(const Scratch& s, int64_t r) const { return &s.scores[(r - s.first_of_panel) * tile_cols]; }
};

// What the bound needs of every latent: |w|, |w - w~|, and b with its share of the bound added.
struct LatentBounds {
  Buffer<float> norm, residual, bias_up, bias_slack;
};

// The candidates of one row, in index order.
struct RowScreen {
  Buffer<int32_t> storage;  // keys of the lower bounds (0 where they are not positive), indices, bits of the upper ones
  int64_t k = 0, size = 0, capacity = 0, most = 0;
  float floor = 0;                             // upper bounds <= floor cannot win
  float norm_factor = 0, residual_factor = 0;  // e = norm_factor |w| + residual_factor |w - w~| + ...
  bool dense = false;                          // the bound says nothing of this row

  int32_t* keys() const { return storage.get(); }
  int32_t* indices() const { return storage.get() + capacity; }
  float* uppers() const { return reinterpret_cast<float*>(storage.get() + 2 * capacity); }

  void start(int64_t wanted, int64_t n_latents, float threshold) {
    k = wanted;
    floor = threshold;
    most = n_latents / kDenseShare;
    dense = k > most;
    if (!closed()) reserve(std::min(4 * k, n_latents) + 128);
  }
  bool closed() const { return dense || k == 0; }

  void push(const float* scores, int64_t n, int64_t first, const LatentBounds& latents) {
    if (closed()) return;
    const float *const norm = &latents.norm[first], *const residual = &latents.residual[first];
    const float *const bias_up = &latents.bias_up[first], *const slack = &latents.bias_slack[first];
    for (int64_t i = 0; i < n; i += 64) {
      if (size + 64 > capacity) {
        make_room();
        if (dense) return;
      }
      // Upper bounds above the floor, or NaN, are candidates.
      const auto error_at = [&](int64_t j) {
        return splat(norm_factor) * load(norm + j) + splat(residual_factor) * load(residual + j);
      };
      const auto upper_at = [&](int64_t j) { return load(scores + j) + load(bias_up + j) + error_at(j); };
      uint64_t mask = 0;
#pragma GCC unroll 16
      for (int64_t j = i; j < i + 64; j += kLanes<float>) mask |= mask_not_le(upper_at(j), splat(floor)) << (j - i);
      // Past the last column nothing is known to be in the rows, but they are long enough to be read.
      if (i + 64 > n) mask &= (uint64_t(1) << (n - i)) - 1;
      for (int64_t j = i; mask; j += kLanes<float>, mask >>= kLanes<float>) {
        const uint64_t some = mask & ((uint64_t(1) << kLanes<float>)-1);
        if (!some) continue;
        const Vector<float> upper = upper_at(j), lower = upper - splat(kTwice) * (error_at(j) + load(slack + j));
        // Nothing is known of a latent whose bounds are not finite: it stays to the end.
        const Vector<float> infinity = splat(kInfinity);
        const auto known = (upper < infinity) & (upper > -infinity) & (lower < infinity) & (lower > -infinity);
        store_packed(keys() + size, known & (lower > 0) & (VectorOf<float>::bits)lower, some);
        store_packed(indices() + size, iota() + int32_t(first + j), some);
        store_packed(uppers() + size,
                     (known & (VectorOf<float>::bits)upper) | (~known & (VectorOf<float>::bits)infinity), some);
        size += __builtin_popcountll(some);
      }
    }
  }

  // Takes up the candidates of another part of the same row. Parts share every chunk of latents, so their indices
  // interleave.
  void merge(const RowScreen& other) {
    dense |= other.dense;
    if (closed()) return;
    floor = std::max(floor, other.floor);
    RowScreen both;
    both.reserve(size + other.size);
    for (int64_t i = 0, j = 0; i + j < size + other.size;) {
      const bool mine = j == other.size || (i < size && indices()[i] < other.indices()[j]);
      const RowScreen& from = mine ? *this : other;
      const int64_t at = mine ? i++ : j++;
      both.keys()[both.size] = from.keys()[at], both.indices()[both.size] = from.indices()[at];
      both.uppers()[both.size++] = from.uppers()[at];
    }
    storage = std::move(both.storage), size = both.size, capacity = both.capacity;
  }

  // Drops what cannot win any more.
  void compact() {
    const int32_t bound = best_bound(keys(), size, k, to_key(floor));
    // A lower bound of at least k scores: upper bounds equal to it must stay.
    if (bound > 0) floor = std::max(floor, to_score<float>(bound - 1));
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const int32_t key = keys()[i], index = indices()[i];
      const float upper = uppers()[i];
      keys()[kept] = key, indices()[kept] = index, uppers()[kept] = upper;
      kept += !(upper <= floor);
    }
    size = kept;
  }

 private:
  void make_room() {
    compact();
    if (size > most)
      dense = true, size = 0;
    else if (size + 64 > capacity / 2)
      reserve(2 * capacity);
  }
  void reserve(int64_t wanted) {
    auto more = buffer<int32_t>(3 * wanted);
    for (int part = 0; part < 3 && size > 0; ++part)
      std::copy_n(storage.get() + part * capacity, size, more.get() + part * wanted);
    storage = std::move(more), capacity = wanted;
  }
  static constexpr float kInfinity = std::numeric_limits<float>::infinity();
  static constexpr float kTwice = 2 + 0x1p-9f;  // with the roundings of e itself
};

// Scores of all candidates of `n` rows. Each task takes a range of latents, latent by latent, so that a row of W is
// read once for all its candidates, and a few columns of D at a time, so that those of all rows of x stay in cache.
inline void rescore(ParallelFor run, int threads, RowScreen* rows, Matrix x, Matrix W, const float* bias, int64_t first,
                    int64_t n) {
  struct Hit {
    const float* x;
    float* score;
  };
  const int64_t tasks = std::min<int64_t>(W.rows, kTasksOfThread * threads);
  parallel(run, tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t from = W.rows * begin / tasks, to = W.rows * end / tasks;
    // Candidates in the order of the latents: counted two places up, so that filling leaves begin_of[f] where it
    // belongs.
    const auto begin_of = std::make_unique<int64_t[]>(to - from + 2);
    int64_t* const next = begin_of.get() + 1;
    const auto for_each = [&](const auto& body) {
      for (int64_t r = 0; r < n; ++r) {
        if (rows[r].closed()) continue;
        const int32_t *const indices = rows[r].indices(), *const last = indices + rows[r].size;
        for (const int32_t* i = std::lower_bound(indices, last, from); i != last && *i < to; ++i)
          body(r, *i - from, i - indices);
      }
    };
    for_each([&](int64_t, int64_t f, int64_t) { ++next[f + 1]; });
    for (int64_t f = 0; f < to - from; ++f) next[f + 1] += next[f];
    const auto hits = buffer<Hit>(next[to - from]);
    for_each([&](int64_t r, int64_t f, int64_t slot) {
      hits[next[f]++] = {static_cast<const float*>(x.data) + (first + r) * x.stride, rows[r].uppers() + slot};
    });
    for (int64_t d = 0; d < std::max<int64_t>(1, x.cols); d += kDotDepth<float>) {
      const int64_t stop = std::min(x.cols, d + kDotDepth<float>);
      for (int64_t f = from; f < to; ++f) {
        const float* const w = static_cast<const float*>(W.data) + f * W.stride;
        // The next row of W comes while this one is multiplied for the first time.
        const float* ahead = f + 1 < to ? w + W.stride : w;
        const auto multiply = [&]<int Rows>(int64_t h) __attribute__((always_inline)) {
          const float* x_rows[Rows];
          float scores[Rows];
          for (int i = 0; i < Rows; ++i) x_rows[i] = hits[h + i].x, scores[i] = *hits[h + i].score;
          dots<Rows, 1>(x_rows, &w, d, stop, scores, 1, [&](int64_t at) { __builtin_prefetch(ahead + at); });
          for (int i = 0; i < Rows; ++i) *hits[h + i].score = bias && stop == x.cols ? scores[i] + bias[f] : scores[i];
          ahead = w;
        };
        int64_t h = begin_of[f - from];
        const int64_t last = begin_of[f - from + 1];
        for (; h + 4 <= last; h += 4) multiply.template operator()<4>(h);
        if (h + 2 <= last) multiply.template operator()<2>(h), h += 2;
        if (h < last) multiply.template operator()<1>(h);
      }
    }
  });
}

// The best of a row's candidates, whose scores are known.
inline void write_best(RowScreen& row, int64_t b, float threshold, CodesOut out) {
  RowSelector<float> best;
  best.start(row.keys(), row.indices(), row.k, row.size, threshold);
  // In place: the selection never holds more than it has read.
  for (int64_t i = 0; i < row.size && !best.closed(); ++i) best.push_one(row.uppers()[i], row.indices()[i]);
  best.finish(static_cast<float*>(out.values) + b * out.width, out.indices + b * out.width, out.counts + b, out.width);
}

inline void pack_weight(ParallelFor run, const Bf16Units& units, Matrix W, int64_t first, int64_t n,
                        PackedWeight packed) {
  pack_all<float>(run, units, W, first, n, true, packed.panels, packed.norms, packed.residuals);
}

inline void screened_encode(ParallelFor run, int threads, const Bf16Units& units, Matrix x, Matrix W, const float* bias,
                            const PackedWeight* packed, const int32_t* k, float threshold, CodesOut out) {
  const int64_t F = W.rows, n_rows = x.rows;
  const auto x_panels = buffer<uint16_t>(panels_of(n_rows) * panel_size(x.cols));
  const auto x_norms = buffer<float>(panels_of(n_rows) * kBf16Rows),
             x_residuals = buffer<float>(panels_of(n_rows) * kBf16Rows);
  pack_all<float>(run, units, x, 0, n_rows, false, x_panels.get(), x_norms.get(), x_residuals.get());

  Bf16Scores<float> source(units, x_panels.get(), n_rows, W, nullptr, threads);
  const Tiling tiling = tiling_of(source, threads, n_rows, F, false);
  const auto rows = std::make_unique<RowScreen[]>(n_rows * tiling.parts);  // [part][row]
  const float terms = float(x.cols + 32);
  for (int64_t part = 0; part < tiling.parts; ++part)
    for (int64_t r = 0; r < n_rows; ++r) {
      RowScreen& row = rows[part * n_rows + r];
      row.start(std::clamp<int64_t>(k[r], 0, out.width), F, threshold);
      const float norm = x_norms[r] * kNormMargin + kNormFloor;
      row.norm_factor = (x_residuals[r] * kNormMargin + kNormFloor) + terms * kSumLoss * norm;
      row.residual_factor = norm + x_residuals[r] * kNormMargin;  // |x~| <= |x| + |x - x~|
    }

  // Latents in chunks: one is rounded and packed by all threads, then all rows are screened with it.
  const int64_t room = round_up(F, 64);
  LatentBounds latents{buffer<float>(room), buffer<float>(room), buffer<float>(room), buffer<float>(room)};
  const int64_t chunk =
      packed ? F
             : std::min(F, std::max<int64_t>(source.tile_cols,
                                             round_up(kPackedAtOnce / std::max<int64_t>(1, W.cols), source.tile_cols)));
  const auto chunk_panels = buffer<uint16_t>(packed ? 0 : panels_of(chunk) * panel_size(W.cols));
  for (int64_t first = 0; first < F; first += chunk) {
    const int64_t n = std::min(chunk, F - first);
    if (!packed)
      pack_weight(run, units, W, first, n, {chunk_panels.get(), &latents.norm[first], &latents.residual[first]});
    float largest = 0;
    for (int64_t f = first; f < first + n; ++f) {
      if (packed) latents.norm[f] = packed->norms[f], latents.residual[f] = packed->residuals[f];
      latents.norm[f] = latents.norm[f] * kNormMargin + kNormFloor;
      latents.residual[f] = latents.residual[f] * kNormMargin + kNormFloor;
      const float b = bias ? bias[f] : 0;
      latents.bias_slack[f] = std::abs(b) * kBiasLoss + terms * kUnderflow;
      latents.bias_up[f] = b + latents.bias_slack[f];
      // A latent whose product may overflow always stays: whatever the units make of it, infinity is added.
      if (latents.norm[f] < kNearOverflow)
        largest = std::max(largest, latents.norm[f]);
      else
        latents.norm[f] = std::numeric_limits<float>::infinity();
    }
    for (int64_t i = 0; i < n_rows * tiling.parts; ++i)
      if (!(rows[i].residual_factor * largest < kNearOverflow)) rows[i].dense = true;
    source.W_panels = packed ? packed->panels : chunk_panels.get();
    source.first_latent = packed ? 0 : first, source.last_latent = first + n;
    for_each_task(run, source, tiling, n_rows, first, first + n, [&](Task task, const auto& visit) {
      RowScreen* const block = &rows[task.part * n_rows + task.first];
      visit([&](int64_t r, const float* scores, int64_t cols, int64_t col) {
        block[r].push(scores, cols, col, latents);
      });
    });
  }

  // Blocks of rows whose share of x stays in cache; each reads W once.
  for (int64_t first = 0; first < n_rows; first += kRescoredRows) {
    const int64_t n = std::min(kRescoredRows, n_rows - first);
    parallel(run, n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = first + begin; r < first + end; ++r) {
        for (int64_t part = 1; part < tiling.parts; ++part) rows[r].merge(rows[part * n_rows + r]);
        if (!rows[r].closed()) rows[r].compact();
      }
    });
    rescore(run, threads, &rows[first], x, W, bias, first, n);
    parallel(run, n, 16, [&](int64_t begin, int64_t end) {
      for (int64_t r = first + begin; r < first + end; ++r)
        if (!rows[r].dense) write_best(rows[r], r, threshold, out);
    });
  }

  const auto dense = buffer<int64_t>(n_rows);
  int64_t n_dense = 0;
  for (int64_t r = 0; r < n_rows; ++r)
    if (rows[r].dense) dense[n_dense++] = r;
  if (n_dense == 0) return;
  select_rows<float>(run, threads, DotScores<float>{x, W, bias, dense.get()}, n_dense, F, k, threshold, out,
                     dense.get());
}

template <class T>
void topk_encode(ParallelFor run, int threads, const Bf16Units* units, Matrix x, Matrix W, const void* b,
                 const PackedWeight* packed, const int32_t* k, double least, CodesOut out) {
  const T* const bias = static_cast<const T*>(b);
  const Acc<T> threshold = Acc<T>(least);
  if (x.rows < kScreenRows)
    return select_rows<T>(run, threads, DotScores<T>{x, W, bias}, x.rows, W.rows, k, threshold, out);
  if constexpr (std::is_same_v<T, float>) {
    if (units && x.cols > 0 && x.cols <= kScreenDepth)
      return screened_encode(run, threads, *units, x, W, bias, packed, k, threshold, out);
  }
  if constexpr (std::is_same_v<T, bf16>) {
    if (units && x.cols > 0) {
      const auto x_panels = buffer<uint16_t>(panels_of(x.rows) * panel_size(x.cols));
      pack_all<T>(run, *units, x, 0, x.rows, false, x_panels.get(), nullptr, nullptr);
      const Bf16Scores<T> source(*units, x_panels.get(), x.rows, W, bias, threads);
      return select_rows<T>(run, threads, source, x.rows, W.rows, k, threshold, out);
    }
  }
  select_rows<T>(run, threads, GemmScores<T>(x, W, b, threads), x.rows, W.rows, k, threshold, out);
}
