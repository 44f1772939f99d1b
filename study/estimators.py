"""The curvatures that the study compares, as `kfoc.fit` takes them."""

from __future__ import annotations

import kfoc

ESTIMATORS: dict[str, kfoc.Estimator] = {
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "K-FOC": kfoc.KFOC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    "K-FOC, rank 2": kfoc.KFOC(rank=2),
}
