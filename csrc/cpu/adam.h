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
  parallel(run, rows, std::max<int64_t>(1, 4096 / std::max<int64_t>(1, cols)), [&](int64_t begin, int64_t end) {
    const auto weight = std::make_unique_for_overwrite<A[]>(cols);
    const auto direction = std::make_unique_for_overwrite<A[]>(cols);
    for (int64_t row = begin; row < end; ++row) {
      T* const p = static_cast<T*>(param) + row * cols;
      const T* const g = static_cast<const T*>(grad) + row * cols;
      A* const m = static_cast<A*>(exp_avg) + row * cols;
      A* const v = static_cast<A*>(exp_avg_sq) + row * cols;
      for (int64_t i = 0; i < cols; ++i) weight[i] = widen(p[i]), direction[i] = widen(g[i]);
      const A parallel_part = unit ? dot<A>(weight.get(), direction.get(), cols) : A(0);
      for (int64_t i = 0; i < cols; ++i) {
        const A slope = scale * (direction[i] - parallel_part * weight[i]);
        m[i] = beta1 * m[i] + keep1 * slope;
        v[i] = beta2 * v[i] + keep2 * slope * slope;
        weight[i] -= rate * m[i] / (std::sqrt(v[i] * unbias) + eps);
      }
      const A norm = unit ? std::sqrt(dot<A>(weight.get(), weight.get(), cols)) : A(1);
      const A shrink = norm > 0 ? 1 / norm : A(1);
      for (int64_t i = 0; i < cols; ++i) narrow(unit ? weight[i] * shrink : weight[i], p[i]);
    }
  });
}
