// One optimizer step. Included by cpu/isa.h inside namespace aksae::AKSAE_ISA.
//
// A row of the weight, its gradient and its moments are read once from memory and written once: projection, moments,
// update and renormalisation go over the row while it is in cache.

template <class T>
void adam_step(ParallelFor run, int64_t rows, int64_t cols, void* param, const void* grad, void* exp_avg,
               void* exp_avg_sq, AdamStep step) {
  using A = Acc<T>;
  const A beta1 = A(step.beta1), beta2 = A(step.beta2), keep1 = A(1 - step.beta1), keep2 = A(1 - step.beta2);
  const A rate = A(step.lr / (1 - std::pow(step.beta1, double(step.step))));
  const A unbias = A(1 / (1 - std::pow(step.beta2, double(step.step))));
  const A eps = A(step.eps), scale = A(step.grad_scale);
  const bool unit = step.unit_norm_rows;
  // A factor that is not finite must reach the weights: no row may sit that out.
  const bool lazy = step.lazy && std::isfinite(step.grad_scale);
  if (step.step == 1) {
    prefer_large_pages(exp_avg, rows * cols * int64_t(sizeof(A)));
    prefer_large_pages(exp_avg_sq, rows * cols * int64_t(sizeof(A)));
  }
  parallel(run, rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
    const auto weight = buffer<A>(cols), direction = buffer<A>(cols);
    for (int64_t row = begin; row < end; ++row) {
      T* const p = static_cast<T*>(param) + row * cols;
      const T* const g = static_cast<const T*>(grad) + row * cols;
      A* const m = static_cast<A*>(exp_avg) + row * cols;
      A* const v = static_cast<A*>(exp_avg_sq) + row * cols;
      // Not zero, or NaN.
      if (lazy && std::none_of(g, g + cols, [](T x) { return !(widen(x) == 0); })) continue;
      for (int64_t i = 0; i < cols; ++i) weight[i] = widen(p[i]), direction[i] = widen(g[i]);
      const A along = unit ? dot(weight.get(), direction.get(), cols) : A(0);
      // For vectors, and for the last columns one by one.
      const auto update = [&](auto w, auto slope, auto* m, auto* v) __attribute__((always_inline)) {
        slope = scale * (slope - along * w);
        *m = beta1 * *m + keep1 * slope;
        *v = beta2 * *v + keep2 * slope * slope;
        return w - rate * *m / (square_root(*v * unbias) + eps);
      };
      int64_t i = 0;
      for (; i + kLanes<A> <= cols; i += kLanes<A>) {
        Vector<A> first = load(m + i), second = load(v + i);
        store(&weight[i], update(load(&weight[i]), load(&direction[i]), &first, &second));
        store(m + i, first);
        store(v + i, second);
      }
      for (; i < cols; ++i) weight[i] = update(weight[i], direction[i], m + i, v + i);
      const A norm = unit ? std::sqrt(dot(weight.get(), weight.get(), cols)) : A(1);
      const A shrink = norm > 0 ? 1 / norm : A(1);
      for (i = 0; i < cols; ++i) narrow(unit ? weight[i] * shrink : weight[i], p[i]);
    }
  });
}
