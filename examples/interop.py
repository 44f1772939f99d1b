"""A curvature in the hands of other libraries: SciPy, linear_operator and laplace-torch.

Each part runs where its library is installed, and says how to install it where it is not.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kfoc


def problem() -> tuple[nn.Sequential, DataLoader]:
    """A classifier fitted to three blobs, and its data."""
    torch.manual_seed(0)
    labels = torch.randint(3, (600,))
    inputs = 1.5 * torch.randn(3, 8)[labels] + torch.randn(600, 8)
    model = nn.Sequential(nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    return model, DataLoader(TensorDataset(inputs, labels), batch_size=100)


def scipy(model: nn.Sequential, data: DataLoader) -> None:
    """The sharpest directions, and a solve with the exact blocks that K-FOC makes fast."""
    from scipy.sparse import linalg

    curvature = kfoc.fit(model, data, fisher="exact")
    exact = kfoc.fit(model, data, fisher="exact", estimator=kfoc.BlockDiagonal())
    values, vectors = linalg.eigsh(curvature.to_linear_operator(), k=3)
    sharpest = curvature.unflatten(torch.from_numpy(vectors[:, -1].copy()))
    share = sharpest["0.weight"].square().sum() + sharpest["0.bias"].square().sum()
    print(f"eigenvalues {values.round(3)}; the sharpest direction is {share:.0%} in layer 0")

    system = exact.damped(1e-2).to_linear_operator(1)
    right = curvature.flatten({n: torch.ones_like(p) for n, p in model.named_parameters()})
    for name, inverse in (("no", None), ("K-FOC's", curvature.damped(1e-2).to_linear_operator())):
        iterates: list[object] = []
        linalg.cg(system, right.numpy(), rtol=1e-4, M=inverse, callback=iterates.append)
        print(f"{len(iterates)} steps of conjugate gradients with {name} preconditioner")


def linear_operator(model: nn.Sequential, data: DataLoader) -> None:
    """A layer's block, damped and solved with by GPyTorch's operators."""
    from kfoc.interop.linear_operator import to_linear_operators

    operators = to_linear_operators(kfoc.fit(model, data))
    damped = operators["2"].add_diagonal(torch.tensor(1e-3))
    print(f"{type(operators['2']).__name__}: log-determinant {damped.logdet():.2f} once damped")


def laplace_torch(model: nn.Sequential, data: DataLoader) -> None:
    """A Laplace approximation with K-FOC's factors in place of K-FAC's."""
    from kfoc.interop.laplace_torch import KFOCBackend  # noqa: I001  (its error says what to do)
    from laplace import Laplace

    for name, options in (("K-FAC", {"estimator": kfoc.KFAC()}), ("K-FOC", {})):
        posterior = Laplace(
            model,
            "classification",
            subset_of_weights="all",
            hessian_structure="kron",
            backend=KFOCBackend,
            backend_kwargs=options,
        )
        posterior.fit(data)
        print(f"{name}: log marginal likelihood {posterior.log_marginal_likelihood():.1f}")


def main() -> None:
    model, data = problem()
    parts: tuple[Callable[[nn.Sequential, DataLoader], None], ...]
    parts = (scipy, linear_operator, laplace_torch)
    for part in parts:
        try:
            part(model, data)
        except ImportError as error:
            print(f"left out: {error}")


if __name__ == "__main__":
    main()
