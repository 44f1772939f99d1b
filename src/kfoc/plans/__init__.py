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

from kfoc.plans.coefficients import CHUNK as CHUNK
from kfoc.plans.explicit import Dense as Dense
from kfoc.plans.explicit import Gradients as Gradients
from kfoc.plans.explicit import add_fisher as add_fisher
from kfoc.plans.positions import PositionGram as PositionGram
from kfoc.plans.positions import Positions as Positions
from kfoc.plans.positions import by_factor as by_factor
from kfoc.plans.positions import by_products as by_products
from kfoc.plans.positions import of_pairs as of_pairs
from kfoc.plans.positions import through_products as through_products
from kfoc.plans.single import Gram as Gram
from kfoc.plans.single import Primal as Primal
from kfoc.plans.single import single_rows as single_rows
