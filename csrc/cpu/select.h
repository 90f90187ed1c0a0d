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

template <class K>
AKSAE_INLINE int64_t count_above(const K* keys, int64_t n, K bound) {
  K above = 0;
  for (int64_t i = 0; i < n; ++i) above += keys[i] > bound;
  return above;
}

// A bound on the k-th largest of n keys, found by bisection from low up: at most k keys are above it, and at least k at
// or above it (unless fewer than k are above low: then it is low).
template <class K>
K best_bound(const K* keys, int64_t n, int64_t k, K low) {
  K high = low;
  for (int64_t i = 0; i < n; ++i) high = std::max(high, keys[i]);
  while (low < high) {
    const K middle = low + (high - low) / 2;
    const int64_t above = count_above(keys, n, middle);
    if (above == k) return middle;
    if (above < k)
      high = middle;
    else
      low = middle + 1;
  }
  return low;
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

// Scores that come from memory are fetched that far ahead of their use.
constexpr int64_t kScoresAhead = 1024;

// The k best scores of a row seen so far, in index order, in a buffer of room(k, F) entries that is compacted when it
// fills up. It cannot overflow and drops nothing that could still win.
template <class A>
struct RowSelector {
  Key<A>* keys;
  int32_t* indices;
  int64_t k, capacity, size;
  A floor;          // scores <= floor cannot be selected any more
  int64_t crowded;  // how often the buffer was full in a piece of the row

  static int64_t room(int64_t k, int64_t n_latents) { return std::min(2 * k + 128, n_latents + 64); }

  void start(Key<A>* key_buffer, int32_t* index_buffer, int64_t wanted, int64_t room, A threshold) {
    keys = key_buffer, indices = index_buffer, k = wanted, capacity = room, size = 0, crowded = 0;
    floor = k > 0 ? threshold : std::numeric_limits<A>::quiet_NaN();
  }

  // Takes up the floor of an earlier part of the same row.
  void raise(A more) {
    if (!closed() && !(more <= floor)) floor = more;
  }

  // Nothing beats k NaNs, nor gets into a row of none.
  bool closed() const { return floor != floor; }

  template <class T>
  void push(const T* scores, int64_t n, int64_t first_index) {
    if (closed()) return;
    // At the start of a row; and, once scores have been seen to rise, at every piece of it.
    const bool rising = crowded > kCrowded;
    if ((size == 0 && floor == 0) || rising) seed(scores, n);
    if (!rising) crowded = 0;
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) {
      prefetch(scores + i + kScoresAhead, 64);
      uint64_t mask = mask_block(scores, ScalarLimit<A>{floor}, i);
      if (!mask) continue;
      if (size + 64 > capacity) {
        compact();
        ++crowded;
        if (closed()) return;
        mask = mask_block(scores, ScalarLimit<A>{floor}, i);
      }
      if constexpr (std::is_same_v<A, float>) {
        for (int j = 0; mask; j += kLanes<A>, mask >>= kLanes<A>) {
          const uint64_t some = mask & ((uint64_t(1) << kLanes<A>)-1);
          if (!some) continue;
          const Vector<A> score = load(scores + i + j);
          const auto nan = score != score;
          store_packed(keys + size, (nan & kNanKey<A>) | (~nan & (typename VectorOf<A>::bits)score), some);
          store_packed(indices + size, iota() + int32_t(first_index + i + j), some);
          size += __builtin_popcountll(some);
        }
      } else {
        for (; mask; mask &= mask - 1) {
          const int j = __builtin_ctzll(mask);
          append(to_key(widen(scores[i + j])), int32_t(first_index + i + j));
        }
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

  // A score that needs no room beyond capacity.
  AKSAE_INLINE void push_one(A score, int32_t index) {
    if (!(score <= floor)) append(to_key(score), index);
  }

  // Keeps the k best, still in index order: the keys above a bound, and as many of those equal to it as are missing,
  // smallest index first.
  void compact() {
    if (size <= k) return;
    const Key<A> low = best_bound(keys, size, k, to_key(floor));
    int64_t from_ties = k - count_above(keys, size, low);
    int64_t kept = 0, i = 0;
    if constexpr (std::is_same_v<A, float>) {
      // Whole vectors, until one of them holds more ties than are missing.
      for (; i + kLanes<A> <= size; i += kLanes<A>) {
        typename VectorOf<A>::bits key, index;
        __builtin_memcpy(&key, keys + i, sizeof key);
        __builtin_memcpy(&index, indices + i, sizeof index);
        const uint64_t above = mask_of(key > low), ties = mask_of(key == low);
        if (__builtin_popcountll(ties) > from_ties) break;
        store_packed(keys + kept, key, above | ties);
        store_packed(indices + kept, index, above | ties);
        from_ties -= __builtin_popcountll(ties);
        kept += __builtin_popcountll(above | ties);
      }
    }
    for (; i < size; ++i) {
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
  static constexpr int64_t kCrowded = 1;

  // A higher floor: at least k scores are at or above the k-th largest of the maxima of disjoint groups. Group g holds
  // every `groups`-th score from g on.
  template <class T>
  void seed(const T* scores, int64_t n) {
    constexpr int64_t kSeen = 8192;  // what is read twice stays in cache
    const int64_t groups = 2 * k / kLanes<A> * kLanes<A>, size_of_group = groups > k ? std::min(n, kSeen) / groups : 0;
    if (size_of_group < 2) return;
    // Scores above 0 order like their bits; NaN counts as nothing.
    alignas(64) Key<A> keys_of_maxima[kSeen / 2];
    std::fill_n(keys_of_maxima, groups, Key<A>(0));
    A* const maxima = reinterpret_cast<A*>(keys_of_maxima);
    for (int64_t first = 0; first < size_of_group * groups; first += groups)
      for (int64_t g = 0; g < groups; g += kLanes<A>) {
        __builtin_prefetch(scores + first + g + kScoresAhead);
        const Vector<A> score = load(scores + first + g), largest = load(maxima + g);
        store(maxima + g, score > largest ? score : largest);
      }
    const Key<A> bound = best_bound(keys_of_maxima, groups, k, Key<A>(0));
    if (bound > 0) floor = std::max(floor, to_score<A>(bound - 1));
  }
  AKSAE_INLINE void append(Key<A> key, int32_t index) {
    keys[size] = key;
    indices[size] = index;
    ++size;
  }
};

// Rows of one block are visited together, tile of columns by tile of columns. A source gives
//   block_rows, panel_rows, tile_cols   its tiling
//   Scratch, scratch()                  what a thread needs
//   open(scratch, row, n)               start a block of rows
//   load(scratch, col, n)               start the columns [col, col + n) of it
//   multiply(scratch, r, n)             make their scores in rows [r, r + n) of the block, at most panel_rows, ready
//   row(scratch, r)                     pointer to those of row r
// The columns are split as well, in parts, where blocks are so few that a thread which the machine holds up would leave
// the others without work.
struct Task {
  int64_t first, n, part;  // rows [first, first + n)
};
struct Tiling {
  int64_t blocks, parts;
};

// Tasks that a thread should find, and the least columns of one that is there to share the work evenly.
constexpr int64_t kTasksOfThread = 4, kEvenCols = 2048;

template <class Source>
Tiling tiling_of(const Source& source, int threads, int64_t n_rows, int64_t n_latents, bool even) {
  const int64_t blocks = (n_rows + source.block_rows - 1) / source.block_rows;
  const int64_t tiles = (n_latents + source.tile_cols - 1) / source.tile_cols;
  if (blocks == 0 || threads == 1) return {blocks, 1};
  const int64_t busy = std::min<int64_t>(tiles, threads / blocks);
  const int64_t evenly = std::min<int64_t>(n_latents / kEvenCols, kTasksOfThread * threads / blocks);
  return {blocks, std::max<int64_t>({1, busy, even ? evenly : 1})};
}

// Calls body(task, visit) for every task over latents [first_latent, last_latent), on several threads; visit(push)
// calls push(r, scores, n, col) for every piece of every row of the task, columns ascending within a row. Of a block
// the parts are taken in order.
template <class Source, class Body>
void for_each_task(ParallelFor run, const Source& source, Tiling tiling, int64_t n_rows, int64_t first_latent,
                   int64_t last_latent, const Body& body) {
  const int64_t tile = source.tile_cols, tiles = (last_latent - first_latent + tile - 1) / tile;
  parallel(run, tiling.blocks * tiling.parts, 1, [&](int64_t begin, int64_t end) {
    auto scratch = source.scratch();
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / tiling.parts * source.block_rows, part = t % tiling.parts;
      const Task task{first, std::min<int64_t>(source.block_rows, n_rows - first), part};
      body(task, [&](const auto& push) {
        const int64_t from = first_latent + tiles * part / tiling.parts * tile;
        const int64_t to = std::min(last_latent, first_latent + tiles * (part + 1) / tiling.parts * tile);
        source.open(scratch, task.first, task.n);
        for (int64_t col = from; col < to; col += tile) {
          const int64_t cols = std::min<int64_t>(tile, to - col);
          source.start(scratch, col, cols);
          for (int64_t r = 0; r < task.n;) {
            const int64_t stop = std::min<int64_t>(task.n, r + source.panel_rows);
            source.multiply(scratch, r, stop - r);
            for (; r < stop; ++r) push(r, source.row(scratch, r), cols, col);
          }
        }
      });
    }
  });
}

// The k[b] best scores of each row that are above the threshold. The parts of a row are merged in order; the total
// order makes the result independent of the split. `rows` (may be null) names the rows of k and out that the source's
// rows stand for.
template <class T, class Source>
void select_rows(ParallelFor run, int threads, const Source& source, int64_t n_rows, int64_t n_latents,
                 const int32_t* k, Acc<T> threshold, CodesOut out, const int64_t* rows = nullptr) {
  using A = Acc<T>;
  const Tiling tiling = tiling_of(source, threads, n_rows, n_latents, true);
  const int64_t parts = tiling.parts;
  const auto wanted = [&](int64_t r) { return std::clamp<int64_t>(k[rows ? rows[r] : r], 0, out.width); };
  const auto write = [&](RowSelector<A>& row, int64_t r) {
    const int64_t b = rows ? rows[r] : r;
    const auto finish = [&](auto* values) {
      row.finish(values + b * out.width, out.indices + b * out.width, out.counts + b, out.width);
    };
    out.unrounded ? finish(static_cast<A*>(out.values)) : finish(static_cast<T*>(out.values));
  };

  // With several parts each leaves its candidates here, and the floor of its rows: what is not above the floor of a
  // part before it cannot win, not even by a tie.
  struct Part {
    std::unique_ptr<Key<A>[]> keys;
    std::unique_ptr<int32_t[]> indices;
    std::unique_ptr<int64_t[]> first;  // candidates of row r: [first[r], first[r + 1])
    std::unique_ptr<A[]> floors;
    std::atomic<bool> done = false;
  };
  const auto left = std::make_unique<Part[]>(parts > 1 ? tiling.blocks * parts : 0);
  const auto part_of = [&](int64_t r, int64_t p) -> Part& { return left[r / source.block_rows * parts + p]; };

  for_each_task(run, source, tiling, n_rows, 0, n_latents, [&](Task task, const auto& visit) {
    const auto room = [&](int64_t r) { return RowSelector<A>::room(wanted(task.first + r), n_latents); };
    int64_t total = 0;
    for (int64_t r = 0; r < task.n; ++r) total += room(r);
    const auto keys = std::make_unique_for_overwrite<Key<A>[]>(total);
    const auto indices = std::make_unique_for_overwrite<int32_t[]>(total);
    const auto selectors = std::make_unique<RowSelector<A>[]>(task.n);
    int64_t offset = 0;
    for (int64_t r = 0; r < task.n; offset += room(r), ++r)
      selectors[r].start(&keys[offset], &indices[offset], wanted(task.first + r), room(r), threshold);
    for (int64_t p = task.part; p-- > 0;) {
      const Part& before = part_of(task.first, p);
      if (!before.done.load(std::memory_order_acquire)) continue;
      for (int64_t r = 0; r < task.n; ++r) selectors[r].raise(before.floors[r]);
      break;
    }
    visit([&](int64_t r, const auto* scores, int64_t n, int64_t col) { selectors[r].push(scores, n, col); });
    if (parts == 1) {
      for (int64_t r = 0; r < task.n; ++r) write(selectors[r], task.first + r);
      return;
    }
    Part& part = part_of(task.first, task.part);
    part.first = std::make_unique<int64_t[]>(task.n + 1);
    part.floors = std::make_unique_for_overwrite<A[]>(task.n);
    for (int64_t r = 0; r < task.n; ++r) {
      selectors[r].compact();
      part.first[r + 1] = part.first[r] + selectors[r].size;
      part.floors[r] = selectors[r].floor;
    }
    part.keys = std::make_unique_for_overwrite<Key<A>[]>(part.first[task.n]);
    part.indices = std::make_unique_for_overwrite<int32_t[]>(part.first[task.n]);
    for (int64_t r = 0; r < task.n; ++r) {
      std::copy_n(selectors[r].keys, selectors[r].size, &part.keys[part.first[r]]);
      std::copy_n(selectors[r].indices, selectors[r].size, &part.indices[part.first[r]]);
    }
    part.done.store(true, std::memory_order_release);
  });
  if (parts == 1) return;
  parallel(run, n_rows, 16, [&](int64_t begin, int64_t end) {
    const int64_t most = RowSelector<A>::room(out.width, n_latents);
    const auto keys = std::make_unique_for_overwrite<Key<A>[]>(most);
    const auto indices = std::make_unique_for_overwrite<int32_t[]>(most);
    for (int64_t r = begin; r < end; ++r) {
      RowSelector<A> merged;
      merged.start(keys.get(), indices.get(), wanted(r), most, threshold);
      for (int64_t p = 0; p < parts; ++p) {
        const Part& part = part_of(r, p);
        const int64_t first = part.first[r % source.block_rows], last = part.first[r % source.block_rows + 1];
        merged.push_candidates(&part.keys[first], &part.indices[first], last - first);
      }
      write(merged, r);
    }
  });
}

// Scores that are already in memory.
template <class T>
struct StoredScores {
  Matrix scores;
  int64_t block_rows = 1, panel_rows = 1, tile_cols = 8192;

  struct Scratch {
    const T* tile;
    int64_t first_row;
  };
  Scratch scratch() const { return {}; }
  void open(Scratch& s, int64_t row, int64_t) const { s.first_row = row; }
  void start(Scratch& s, int64_t col, int64_t) const {
    s.tile = static_cast<const T*>(scores.data) + s.first_row * scores.stride + col;
  }
  void multiply(Scratch&, int64_t, int64_t) const {}
  const T* row(const Scratch& s, int64_t r) const { return s.tile + r * scores.stride; }
};

template <class T>
void topk_select(ParallelFor run, int threads, Matrix pre_acts, const int32_t* k, CodesOut out) {
  select_rows<T>(run, threads, StoredScores<T>{pre_acts}, pre_acts.rows, pre_acts.cols, k, Acc<T>(0), out);
}

// Writes the hits of one row, given as for_each_hit takes them; keep(i) has the last word. All are counted, those that
// fit are written.
template <class T, class Limit, class Keep>
void write_hits(const T* scores, int64_t n, const Limit& limit, const Keep& keep, CodesOut out, int64_t b) {
  T* const values = static_cast<T*>(out.values) + b * out.width;
  int32_t* const indices = out.indices + b * out.width;
  int64_t count = 0;
  for_each_hit(scores, n, limit, [&](int64_t i) {
    if (!keep(i)) return;
    if (count < out.width) values[count] = scores[i], indices[count] = int32_t(i);
    ++count;
  });
  out.counts[b] = int32_t(count);
  RowSelector<Acc<T>>::pad(values, indices, std::min(count, out.width), out.width);
}

template <class T>
void threshold_select(ParallelFor run, Matrix pre_acts, const void* limit, CodesOut out) {
  parallel(run, pre_acts.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* scores = static_cast<const T*>(pre_acts.data) + b * pre_acts.stride;
      const RowLimit<Acc<T>> row_limit{static_cast<const Acc<T>*>(limit)};
      write_hits(scores, pre_acts.cols, row_limit, [](int64_t) { return true; }, out, b);
    }
  });
}

// Radix select over all positive keys, eleven bits a pass from the top: the budget-th largest key, and how many keys
// equal to it are still wanted. Integer counts: the result does not depend on how the rows are shared out.
template <class T>
void batch_topk_select(ParallelFor run, Matrix pre_acts, int64_t budget, CodesOut out) {
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
  parallel(run, pre_acts.rows, 4, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const T* scores = row(b);
      int64_t from_ties = ties[b];
      const auto keep = [&](int64_t i) {
        const Key<A> key = to_key(widen(scores[i]));
        return budget > 0 && (key > bound || (key == bound && from_ties-- > 0));
      };
      write_hits(scores, n, ScalarLimit<A>{0}, keep, out, b);
    }
  });
}
