"""Algorithm 2 of the paper: ways to contract a layer's samples without forming their products.

With `A` the rearrangement of `sum_{s,n} vec(X) vec(X)^T`, a half step is
`left = sum X right X^T` or `right = sum X^T left X`. Every plan computes the same numbers; they
differ in multiply-adds and memory, by factors of a hundred.

| plan | iterates on | a half step goes |
|---|---|---|
| gram (T = 1) | a weight per sample | through squared inner products between samples |
| primal (T = 1) | a weight per sample | through the factors |
| position_gram | a (T, T) matrix per sample | through inner products between positions |
| positions | a (T, T) matrix per sample | through the factors |
| gradients | the factors | through the per-sample gradients X |
| dense | the factors | through F itself |
"""
