"""The measurements of `benchmarks.gpu_suite` and `benchmarks.gpu_check`.

`plan` lists the parts in the order of their value; `ceilings` (its kernel is in `gather`), `correctness`, `sanitizer`,
`ratios` and `training` hold what they do. All of them are given a `bench`; results are checked by `oracles`, and times
held against the floors of `traffic`. `ledger` keeps what was found; `targets` and `table` say what is to be reached,
and what was. `calls` are what `gpu_check` has `sanitizer` watch.
"""
