// The selection of one row by one block, and its parts.
//
// Scores become keys: a positive score its bits, which order as the numbers do, NaN the largest, anything else 0. The k
// largest keys are found by bisection on the key (find_cut), which costs the same for any input and reads nothing that
// a fixed buffer could lack. What a cut keeps is written in the order of the indices (keep), so equal keys go to the
// smaller index and results need no sort.
//
// select_row starts from the maxima of groups of adjacent columns. Let t be the k-th largest of them. At least k scores
// are >= t, so t bounds the k-th best from below. Fewer than k groups have a maximum above t; together with the first
// of the groups whose maximum is t, up to k groups in all, they hold all winners: a score t in a later group has k
// better ones before it. So k groups are read, whatever the row holds.
#pragma once

#include "common.cuh"

namespace aksae {

using Key = uint32_t;
constexpr Key kNanKey = 0x7fffffffu;

__device__ __forceinline__ Key key_of(float score) {
  if (score != score) return kNanKey;
  return score > 0 ? __float_as_uint(score) : 0;
}
__device__ __forceinline__ float score_of(Key key) { return __uint_as_float(key); }

// Keeps keys above `key`, and of those equal to it the first `ties`.
struct Cut {
  Key key;
  int64_t ties;
};
constexpr Cut kKeepSelectable = {0, 0};

// The cut that keeps the k > 0 best of a set of keys; count(t) is how many are >= t, the same in all threads.
template <class Count>
__device__ Cut find_cut(int64_t k, Count count) {
  if (count(Key(1)) <= k) return kKeepSelectable;
  // More than k are >= low; fewer than k, namely `above`, are >= high.
  Key low = 1, high = kNanKey + 1;
  int64_t above = 0;
  while (high - low > 1) {
    const Key middle = low + (high - low) / 2;
    const int64_t n = count(middle);
    if (n == k) return {middle - 1, 0};
    if (n > k)
      low = middle;
    else
      high = middle, above = n;
  }
  return {low, k - above};
}

// How many of items [0, n) have at least key t, for find_cut; key(i) may be 0. A count beyond int32 cannot be.
template <class KeyAt>
__device__ __forceinline__ int64_t count_keys(int64_t n, KeyAt key, Key t, BlockSum& sum) {
  int mine = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < n; i += kThreads) mine += key(i) >= t;
  return sum(mine);
}

// Calls sink(position, i, key) for those of items [0, n) that the cut keeps, positions ascending with i; returns how
// many there are. All threads of the block take part.
constexpr int kKeepEach = 4;
struct KeepCounts {
  int above[2][kWarps], equal[2][kWarps];
};
template <class KeyAt, class Sink>
__device__ int64_t keep(int64_t n, Cut cut, KeyAt key, KeepCounts& shared, Sink sink) {
  constexpr int kRound = kThreads * kKeepEach;
  const unsigned lower_lanes = (1u << lane_id()) - 1;
  // Counts of all earlier rounds.
  int64_t above = 0, equal = 0;
  int parity = 0;
  for (int64_t base = 0; base < n; base += kRound, parity ^= 1) {
    const int64_t first = base + warp_id() * (kWarp * kKeepEach) + lane_id();
    Key keys[kKeepEach];
#pragma unroll
    for (int i = 0; i < kKeepEach; ++i) keys[i] = first + i * kWarp < n ? key(first + i * kWarp) : 0;
    int rank_above[kKeepEach], rank_equal[kKeepEach], warp_above = 0, warp_equal = 0;
#pragma unroll
    for (int i = 0; i < kKeepEach; ++i) {
      const unsigned is_above = __ballot_sync(kAllLanes, keys[i] > cut.key);
      const unsigned is_equal = __ballot_sync(kAllLanes, keys[i] == cut.key);
      rank_above[i] = warp_above + __popc(is_above & lower_lanes);
      rank_equal[i] = warp_equal + __popc(is_equal & lower_lanes);
      warp_above += __popc(is_above);
      warp_equal += __popc(is_equal);
    }
    if (lane_id() == 0) shared.above[parity][warp_id()] = warp_above, shared.equal[parity][warp_id()] = warp_equal;
    __syncthreads();
    int64_t above_here = above, equal_here = equal;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const int a = shared.above[parity][w], e = shared.equal[parity][w];
      above += a, equal += e;
      if (w < warp_id()) above_here += a, equal_here += e;
    }
#pragma unroll
    for (int i = 0; i < kKeepEach; ++i) {
      const int64_t a = above_here + rank_above[i], e = equal_here + rank_equal[i];
      if (keys[i] > cut.key || (keys[i] == cut.key && e < cut.ties))
        sink(a + min(e, cut.ties), first + i * kWarp, keys[i]);
    }
  }
  return above + min(equal, cut.ties);
}

// One row of codes, to be written by a block.
template <class Out>
struct CodeRowOut {
  Out* values;
  int32_t *indices, *count;
  int64_t width;

  __device__ CodeRowOut(const CodesOut& out, int64_t row)
      : values(static_cast<Out*>(out.values) + row * out.width),
        indices(out.indices + row * out.width),
        count(out.counts + row),
        width(out.width) {}
  __device__ __forceinline__ void set(int64_t slot, int64_t index, Key key) const {
    if (slot < width) values[slot] = narrow<Out>(score_of(key)), indices[slot] = int32_t(index);
  }
  // The count is not cut where the row is.
  __device__ __forceinline__ void finish(int64_t n) const {
    if (threadIdx.x == 0) *count = int32_t(n);
    for (int64_t slot = n + threadIdx.x; slot < width; slot += kThreads)
      values[slot] = narrow<Out>(0.0f), indices[slot] = -1;
  }
};

struct SelectShared {
  BlockSums sums;
  KeepCounts counts;
};

// Dynamic shared memory of a selection: the maxima, the groups that are read, the candidates.
constexpr int kGroupShift = 5, kMostGroups = 4096, kCandidates = 2048;
constexpr int64_t select_bytes(int64_t n_groups) { return n_groups * 8 + kCandidates * 8; }
static_assert(select_bytes(kMostGroups) <= kVaryingShared);

// The k best of a row of `cols` scores; groups have 2^shift columns. key(i) reads a score.
template <class KeyAt, class Out>
__device__ void select_row(int64_t cols, int shift, int n_groups, int64_t k, KeyAt key, unsigned char* dynamic,
                           SelectShared& shared, const CodeRowOut<Out>& out) {
  Key* const maxima = reinterpret_cast<Key*>(dynamic);
  int32_t* const groups = reinterpret_cast<int32_t*>(maxima + n_groups);
  Key* const candidates = reinterpret_cast<Key*>(groups + n_groups);
  int32_t* const columns = reinterpret_cast<int32_t*>(candidates + kCandidates);
  BlockSum sum{shared.sums};

  const auto maximum = [&](int64_t i) { return maxima[i]; };
  const Cut bound = find_cut(k, [&](Key t) { return count_keys(n_groups, maximum, t, sum); });
  const int64_t n_read = keep(n_groups, bound, maximum, shared.counts,
                              [&](int64_t at, int64_t group, Key) { groups[at] = int32_t(group); });
  __syncthreads();

  // Items are the columns of those groups, in order.
  const int64_t n_items = n_read << shift;
  const auto column = [&](int64_t i) { return (int64_t(groups[i >> shift]) << shift) + (i & ((1 << shift) - 1)); };
  const auto item = [&](int64_t i) {
    const int64_t c = column(i);
    return c < cols ? key(c) : 0;
  };
  // Those that reach the bound; the others cannot win.
  const Cut reach = {bound.ties ? bound.key - 1 : bound.key, 0};
  const int64_t n_candidates = keep(n_items, reach, item, shared.counts, [&](int64_t at, int64_t i, Key x) {
    if (at < kCandidates) candidates[at] = x, columns[at] = int32_t(column(i));
  });
  __syncthreads();
  int64_t n;
  if (n_candidates <= kCandidates) {
    const auto candidate = [&](int64_t i) { return candidates[i]; };
    const Cut cut = find_cut(k, [&](Key t) { return count_keys(n_candidates, candidate, t, sum); });
    n = keep(n_candidates, cut, candidate, shared.counts,
             [&](int64_t at, int64_t i, Key x) { out.set(at, columns[i], x); });
  } else {
    // More than are kept at hand: every count reads the groups again.
    const Cut cut = find_cut(k, [&](Key t) { return count_keys(n_items, item, t, sum); });
    n = keep(n_items, cut, item, shared.counts, [&](int64_t at, int64_t i, Key x) { out.set(at, column(i), x); });
  }
  out.finish(n);
}

// Maxima of the groups of a row, in one pass over it.
template <class T, bool Aligned>
__device__ void group_maxima(const T* row, int64_t cols, int shift, int n_groups, Key* maxima) {
  for (int g = threadIdx.x; g < n_groups; g += kThreads) maxima[g] = 0;
  __syncthreads();
  if constexpr (Aligned) {
    constexpr int kEach = 4, kSpan = kVector<T>, kGroupLanes = (1 << kGroupShift) / kSpan;
    for (int64_t base = 0; base < cols; base += kThreads * kSpan * kEach) {
      const int64_t first = base + warp_id() * (kWarp * kSpan * kEach) + lane_id() * kSpan;
      Vector<T> loaded[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int64_t c = first + i * kWarp * kSpan;
        loaded[i] = Vector<T>{};
        if (c < cols) loaded[i] = *reinterpret_cast<const Vector<T>*>(row + c);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        Key best = 0;
#pragma unroll
        for (int j = 0; j < kSpan; ++j) best = max(best, key_of(widen(loaded[i].at[j])));
#pragma unroll
        for (int bits = 1; bits < kGroupLanes; bits *= 2) best = max(best, __shfl_xor_sync(kAllLanes, best, bits));
        const int64_t c = first + i * kWarp * kSpan;
        if (lane_id() % kGroupLanes == 0 && c < cols && best) atomicMax(&maxima[c >> shift], best);
      }
    }
  } else {
    for (int64_t base = warp_id() * kWarp; base < cols; base += kThreads) {
      const int64_t c = base + lane_id();
      const Key best = __reduce_max_sync(kAllLanes, c < cols ? key_of(widen(row[c])) : 0u);
      if (lane_id() == 0 && best) atomicMax(&maxima[base >> shift], best);
    }
  }
  __syncthreads();
}

// Groups for rows of `cols` columns: at least 2^kGroupShift columns each, and at most kMostGroups.
struct Grouping {
  int shift, n;
};
inline Grouping grouping(int64_t cols) {
  int shift = kGroupShift;
  while (ceil_div(cols, int64_t(1) << shift) > kMostGroups) ++shift;
  return {shift, int(ceil_div(cols, int64_t(1) << shift))};
}

extern __shared__ __align__(1024) unsigned char shared_memory[];

}  // namespace aksae
