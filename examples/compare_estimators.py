"""Which estimator comes closest to the exact Fisher, layer by layer.

Fits every estimator to the same classifier, with probes that certify each block in passing.
"""

import torch
from torch import nn

import kfoc

ESTIMATORS = {
    "diagonal": kfoc.Diagonal(),
    "K-FAC": kfoc.KFAC(),
    "K-FOC": kfoc.KFOC(),
    "EKFAC": kfoc.EigenCorrected(kfoc.KFAC()),
    "EK-FOC": kfoc.EigenCorrected(kfoc.KFOC()),
    "K-FOC, rank 3": kfoc.KFOC(rank=3),
}


def main() -> None:
    torch.manual_seed(0)
    labels = torch.randint(4, (1000,))
    inputs = torch.randn(4, 12)[labels] + torch.randn(1000, 12)
    model = nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU())
    model.append(nn.Linear(16, 4))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    data = list(zip(inputs.split(100), labels.split(100), strict=True))
    print(f"{'relative error of layer':24}" + "".join(f"{name:>16}" for name in ("0", "2", "4")))
    for name, estimator in ESTIMATORS.items():
        curvature = kfoc.fit(model, data, estimator=estimator, probes=32)
        errors = [
            f"{block.relative_error:.3f} +- {block.relative_error_standard_error:.3f}"
            for block in curvature.values()
        ]
        print(f"{name:24}" + "".join(f"{error:>16}" for error in errors))


if __name__ == "__main__":
    main()
