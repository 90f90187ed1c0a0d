// Exact selection. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// Scores that can be selected are positive or NaN. Their bit patterns, NaN canonicalised to the largest, order like the
// contract's total order does: a key is such a pattern. Rows are visited with ascending index, so a later score must be
// strictly greater to displace an earlier one, and ties go to the smaller index for free.

template <class A>
struct KeyOf;
template <>
struct KeyOf<float> {
  using type = int32_t;
};
template <>
struct KeyOf<double> {
  using type = int64_t;
};
template <class A>
using Key = typename KeyOf<A>::type;

template <class A>
constexpr Key<A> kNanKey = std::numeric_limits<Key<A>>::max();

template <class A>
AKSAE_INLINE Key<A> to_key(A score) {
  return score != score ? kNanKey<A> : std::bit_cast<Key<A>>(score);
}
template <class A>
AKSAE_INLINE A to_score(Key<A> key) {
  return std::bit_cast<A>(key);
}

// Calls hit(i) for every score of [0, n) that is not <= limit(i), in order. Two loads of limit: a scalar or a row.
template <class A>
struct ScalarLimit {
  A value;
  AKSAE_INLINE Vector<A> at(int64_t) const { return splat(value); }
  AKSAE_INLINE A one(int64_t) const { return value; }
};
template <class A>
struct RowLimit {
  const A* values;
  AKSAE_INLINE Vector<A> at(int64_t i) const { return load(values + i); }
  AKSAE_INLINE A one(int64_t i) const { return values[i]; }
};

template <class T, class Limit>
AKSAE_INLINE uint64_t mask_block(const T* scores, const Limit& limit, int64_t first) {
  using A = Acc<T>;
  uint64_t mask = 0;
#pragma GCC unroll 16
  for (int j = 0; j < 64; j += kLanes<A>) mask |= mask_not_le(load(scores + first + j), limit.at(first + j)) << j;
  return mask;
}

template <class T, class Limit, class Hit>
AKSAE_INLINE void for_each_hit(const T* scores, int64_t n, const Limit& limit, const Hit& hit) {
  int64_t i = 0;
  for (; i + 64 <= n; i += 64)
    for (uint64_t mask = mask_block(scores, limit, i); mask; mask &= mask - 1) hit(i + __builtin_ctzll(mask));
  for (; i < n; ++i)
    if (!(widen(scores[i]) <= limit.one(i))) hit(i);
}

// The k best scores of a row seen so far, in index order, in a buffer of room(k, F) entries that is compacted when it
// fills up. It cannot overflow and drops nothing that could still win.
template <class A>
struct RowSelector {
  Key<A>* keys;
  int32_t* indices;
  int64_t k, capacity, size;
  A floor;  // scores <= floor cannot be selected any more

  static int64_t room(int64_t k, int64_t n_latents) { return std::min(2 * k + 128, n_latents + 64); }

  void start(Key<A>* key_buffer, int32_t* index_buffer, int64_t wanted, int64_t room) {
    keys = key_buffer, indices = index_buffer, k = wanted, capacity = room, size = 0;
    floor = k > 0 ? A(0) : std::numeric_limits<A>::quiet_NaN();
  }

  // Nothing beats k NaNs, nor gets into a row of none.
  bool closed() const { return floor != floor; }

  template <class T>
  void push(const T* scores, int64_t n, int64_t first_index) {
    if (closed()) return;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      uint64_t mask = mask_block(scores, ScalarLimit<A>{floor}, i);
      if (!mask) continue;
      if (size + 64 > capacity) {
        compact();
        if (closed()) return;
        mask = mask_block(scores, ScalarLimit<A>{floor}, i);
      }
      for (; mask; mask &= mask - 1) {
        const int j = __builtin_ctzll(mask);
        append(to_key(widen(scores[i + j])), int32_t(first_index + i + j));
      }
    }
    if (i < n && size + 64 > capacity) compact();
    for (; i < n && !closed(); ++i)
      if (!(widen(scores[i]) <= floor)) append(to_key(widen(scores[i])), int32_t(first_index + i));
  }

  // Candidates of a later part of the same row.
  void push_candidates(const Key<A>* more_keys, const int32_t* more_indices, int64_t n) {
    for (int64_t i = 0; i < n && !closed(); ++i) {
      if (size == capacity) compact();
      if (!(to_score<A>(more_keys[i]) <= floor)) append(more_keys[i], more_indices[i]);
    }
  }

  // Keeps the k best, still in index order. Bisection on the key finds a bound with fewer than k keys above it; what
  // is missing comes from the keys equal to it, smallest index first.
  void compact() {
    if (size <= k) return;
    Key<A> low = to_key(floor), high = kNanKey<A>;
    int64_t from_ties = -1;
    while (low < high) {
      const Key<A> middle = low + (high - low) / 2;
      const int64_t above = count_above(middle);
      if (above == k) {
        low = middle, from_ties = 0;
        break;
      }
      if (above < k)
        high = middle;
      else
        low = middle + 1;
    }
    if (from_ties < 0) from_ties = k - count_above(low);
    int64_t kept = 0;
    for (int64_t i = 0; i < size; ++i) {
      const Key<A> key = keys[i];
      const int32_t index = indices[i];
      const bool tie = key == low && from_ties > 0;
      from_ties -= tie;
      keys[kept] = key, indices[kept] = index;
      kept += key > low || tie;
    }
    size = kept;
    floor = to_score<A>(low);
  }

  template <class T>
  void finish(T* values_out, int32_t* indices_out, int32_t* count_out, int64_t width) {
    compact();
    for (int64_t i = 0; i < size; ++i) {
      narrow(to_score<A>(keys[i]), values_out[i]);
      indices_out[i] = indices[i];
    }
    *count_out = int32_t(size);
    pad(values_out, indices_out, size, width);
  }

  template <class T>
  static void pad(T* values_out, int32_t* indices_out, int64_t from, int64_t width) {
    for (int64_t i = from; i < width; ++i) values_out[i] = T{}, indices_out[i] = -1;
  }

 private:
  AKSAE_INLINE void append(Key<A> key, int32_t index) {
    keys[size] = key;
    indices[size] = index;
    ++size;
  }
  int64_t count_above(Key<A> bound) const {
    Key<A> above = 0;
    for (int64_t i = 0; i < size; ++i) above += keys[i] > bound;
    return above;
  }
};

AKSAE_INLINE void raise_to(std::atomic<int64_t>& largest, int64_t value) {
  int64_t seen = largest;
  while (seen < value && !largest.compare_exchange_weak(seen, value)) {
  }
}

// Rows of one block are selected together, tile of columns by tile of columns. A source gives
//   block_rows, tile_cols     its tiling
//   Scratch, scratch()        what a task needs
//   open(scratch, row, n)     start a block of rows
//   tile(scratch, col, n)     make the scores of columns [col, col + n) of the open block ready
//   row(scratch, r)           pointer to row r of that tile
// Where there are fewer blocks than threads, the columns are split as well and the parts merged in order; the total
// order makes the result independent of the split.
template <class T, class Source>
void select_rows(ParallelFor run, int threads, const Source& source, int64_t n_rows, int64_t n_latents,
                 const int32_t* k, CodesOut out) {
  using A = Acc<T>;
  const int64_t block = source.block_rows, tile = source.tile_cols;
  const int64_t blocks = (n_rows + block - 1) / block, tiles = (n_latents + tile - 1) / tile;
  const int64_t parts = std::max<int64_t>(1, std::min<int64_t>(tiles, blocks ? threads / blocks : 1));
  const auto wanted = [&](int64_t b) { return std::clamp<int64_t>(k[b], 0, out.width); };
  const auto write = [&](RowSelector<A>& row, int64_t b) {
    row.finish(static_cast<T*>(out.values) + b * out.width, out.indices + b * out.width, out.counts + b, out.width);
  };

  // With several parts each leaves its candidates here.
  struct Part {
    std::unique_ptr<Key<A>[]> keys;
    std::unique_ptr<int32_t[]> indices;
    std::unique_ptr<RowSelector<A>[]> rows;
  };
  const auto unfinished = std::make_unique<Part[]>(parts > 1 ? blocks * parts : 0);

  parallel(run, blocks * parts, 1, [&](int64_t begin, int64_t end) {
    auto scratch = source.scratch();
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task / parts * block, n = std::min(block, n_rows - first);
      const int64_t from = tiles * (task % parts) / parts * tile;
      const int64_t to = std::min(n_latents, tiles * (task % parts + 1) / parts * tile);
      int64_t room = 0;
      for (int64_t r = 0; r < n; ++r) room += RowSelector<A>::room(wanted(first + r), n_latents);
      Part part{std::make_unique_for_overwrite<Key<A>[]>(room), std::make_unique_for_overwrite<int32_t[]>(room),
                std::make_unique<RowSelector<A>[]>(n)};
      int64_t offset = 0;
      for (int64_t r = 0; r < n; ++r) {
        const int64_t row_room = RowSelector<A>::room(wanted(first + r), n_latents);
        part.rows[r].start(&part.keys[offset], &part.indices[offset], wanted(first + r), row_room);
        offset += row_room;
      }
      source.open(scratch, first, n);
      for (int64_t col = from; col < to; col += tile) {
        const int64_t cols = std::min(tile, to - col);
        source.tile(scratch, col, cols);
        for (int64_t r = 0; r < n; ++r) part.rows[r].push(source.row(scratch, r), cols, col);
      }
      if (parts == 1) {
        for (int64_t r = 0; r < n; ++r) write(part.rows[r], first + r);
      } else {
        for (int64_t r = 0; r < n; ++r) part.rows[r].compact();
        unfinished[task] = std::move(part);
      }
    }
  });
  if (parts == 1) return;
  parallel(run, n_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      Part* const row_parts = &unfinished[b / block * parts];
      RowSelector<A>& merged = row_parts[0].rows[b % block];
      for (int64_t p = 1; p < parts; ++p) {
        const RowSelector<A>& more = row_parts[p].rows[b % block];
        merged.push_candidates(more.keys, more.indices, more.size);
      }
      write(merged, b);
    }
  });
}

// Scores that are already in memory.
template <class T>
struct StoredScores {
  Matrix scores;
  int64_t block_rows = 8, tile_cols = 8192;

  struct Scratch {
    const T* tile;
    int64_t first_row;
  };
  Scratch scratch() const { return {}; }
  void open(Scratch& s, int64_t row, int64_t) const { s.first_row = row; }
  void tile(Scratch& s, int64_t col, int64_t) const {
    s.tile = static_cast<const T*>(scores.data) + s.first_row * scores.stride + col;
  }
  const T* row(const Scratch& s, int64_t r) const { return s.tile + r * scores.stride; }
};

template <class T>
void topk_select(ParallelFor run, int threads, Matrix pre_acts, const int32_t* k, CodesOut out) {
  select_rows<T>(run, threads, StoredScores<T>{pre_acts}, pre_acts.rows, pre_acts.cols, k, out);
}

// Writes the hits of one row, given as for_each_hit takes them; keep(i) has the last word. Returns how many there were.
template <class T, class Limit, class Keep>
int64_t write_hits(const T* scores, int64_t n, const Limit& limit, const Keep& keep, CodesOut out, int64_t b) {
  T* const values = static_cast<T*>(out.values) + b * out.width;
  int32_t* const indices = out.indices + b * out.width;
  int64_t count = 0;
  for_each_hit(scores, n, limit, [&](int64_t i) {
    if (!keep(i)) return;
    if (count < out.width) values[count] = scores[i], indices[count] = int32_t(i);
    ++count;
  });
  const int64_t written = std::min(count, out.width);
  out.counts[b] = int32_t(written);
  RowSelector<Acc<T>>::pad(values, indices, written, out.width);
  return count;
}

template <class T>
int64_t threshold_select(ParallelFor run, Matrix pre_acts, const void* limit, CodesOut out) {
  std::atomic<int64_t> widest{0};
  parallel(run, pre_acts.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* scores = static_cast<const T*>(pre_acts.data) + b * pre_acts.stride;
      const RowLimit<Acc<T>> row_limit{static_cast<const Acc<T>*>(limit)};
      raise_to(widest, write_hits(scores, pre_acts.cols, row_limit, [](int64_t) { return true; }, out, b));
    }
  });
  return widest;
}

// Radix select over all positive keys, eleven bits a pass from the top: the budget-th largest key, and how many keys
// equal to it are still wanted. Integer counts: the result does not depend on how the rows are shared out.
template <class T>
int64_t batch_topk_select(ParallelFor run, Matrix pre_acts, int64_t budget, CodesOut out) {
  using A = Acc<T>;
  constexpr int kDigit = 11, kBits = 8 * sizeof(A) - 1;
  const int64_t n = pre_acts.cols, tasks = std::min<int64_t>(pre_acts.rows, 64);
  const auto row = [&](int64_t b) { return static_cast<const T*>(pre_acts.data) + b * pre_acts.stride; };
  const auto first_row = [&](int64_t task) { return pre_acts.rows * task / tasks; };
  const auto histograms = std::make_unique_for_overwrite<int64_t[]>(tasks << kDigit);

  Key<A> bound = 0;  // the bits of the budget-th largest key found so far
  int64_t wanted = budget;
  for (int shift = kBits; shift > 0 && wanted > 0;) {
    const int digit = std::min(kDigit, shift);
    const int above = shift;  // bits from here up are fixed in bound
    shift -= digit;
    parallel(run, tasks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        int64_t* const histogram = &histograms[task << kDigit];
        std::fill_n(histogram, int64_t(1) << kDigit, 0);
        for (int64_t b = first_row(task); b < first_row(task + 1); ++b) {
          const T* scores = row(b);
          for_each_hit(scores, n, ScalarLimit<A>{0}, [&](int64_t i) {
            const Key<A> key = to_key(widen(scores[i]));
            if (key >> above == bound >> above) ++histogram[(key >> shift) & ((Key<A>(1) << digit) - 1)];
          });
        }
      }
    });
    Key<A> value = (Key<A>(1) << digit) - 1;
    for (;; --value) {
      int64_t total = 0;
      for (int64_t task = 0; task < tasks; ++task) total += histograms[(task << kDigit) + value];
      if (total >= wanted || value == 0) break;
      wanted -= total;
    }
    bound |= value << shift;
  }
  // With fewer positives than the budget the search ends at bound 0, which no selectable key has: all are above it.
  const auto ties = std::make_unique_for_overwrite<int64_t[]>(pre_acts.rows);
  parallel(run, pre_acts.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* scores = row(b);
      ties[b] = 0;
      if (budget > 0)
        for_each_hit(scores, n, ScalarLimit<A>{0}, [&](int64_t i) { ties[b] += to_key(widen(scores[i])) == bound; });
    }
  });
  for (int64_t b = 0; b < pre_acts.rows; ++b) {
    ties[b] = std::min(ties[b], wanted);
    wanted -= ties[b];
  }
  std::atomic<int64_t> widest{0};
  parallel(run, pre_acts.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* scores = row(b);
      int64_t from_ties = ties[b];
      const auto keep = [&](int64_t i) {
        const Key<A> key = to_key(widen(scores[i]));
        return budget > 0 && (key > bound || (key == bound && from_ties-- > 0));
      };
      raise_to(widest, write_hits(scores, n, ScalarLimit<A>{0}, keep, out, b));
    }
  });
  return widest;
}
