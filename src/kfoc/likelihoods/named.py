"""Likelihoods and Fisher types by their names, and by what others call them."""

from __future__ import annotations

from torch import Tensor

from kfoc.likelihoods.base import FISHER_TYPES, Likelihood
from kfoc.likelihoods.bernoulli import Bernoulli
from kfoc.likelihoods.categorical import Categorical
from kfoc.likelihoods.gaussian import Gaussian

LIKELIHOODS: dict[str, Likelihood] = {
    "categorical": Categorical(),
    "gaussian": Gaussian(),
    "bernoulli": Bernoulli(),
}


# What others call them, in small letters alone; of losses the class names too.
_OTHER_NAMES = {
    "categorical": "ce crossentropy crossentropyloss nll nllloss softmax multinomial categorical "
    "classification",
    "gaussian": "mse mseloss l2 squarederror regression normal gaussian",
    "bernoulli": "bce bcewithlogits bcewithlogitsloss binarycrossentropy bernoulli binary sigmoid "
    "binarycrossentropywithlogits logistic",
}
# What of a loss the likelihood has under the same name, and must not be lost with it.
_OPTIONS = {"categorical": ("weight", "label_smoothing"), "bernoulli": ("pos_weight",)}
_OTHER_FISHERS = {
    "mc": "mc montecarlo sampled weighted mcweighted",
    "mc-plain": "mcplain plain plainmc",
    "exact": "typei typeii type true expected ggn exact",
    "empirical": "ef emp observed empirical",
}


def _known_as(value: object, names: dict[str, str]) -> str | None:
    """The name here of what goes by other names: a string, a loss or its class or function."""
    text = value if isinstance(value, str) else getattr(value, "__name__", type(value).__name__)
    small = "".join(letter for letter in text.lower() if letter.isalpha())
    return next((name for name, others in names.items() if small in others.split()), None)


def check_fisher(fisher: object) -> None:
    """Raises ValueError for what is no Fisher type, with the one that was meant if it is known."""
    if isinstance(fisher, str) and fisher in FISHER_TYPES:
        return
    meant = _known_as(fisher, _OTHER_FISHERS)
    hint = f': for {fisher!r}, fisher="{meant}"' if meant else ""
    if isinstance(fisher, str) and fisher.lower().startswith("forward"):
        hint = ": K-FAC without a backward pass has no equivalent here"
    raise ValueError(f"fisher must be one of {', '.join(FISHER_TYPES)}, found {fisher!r}{hint}")


def resolved(likelihood: str | Likelihood) -> Likelihood:
    """The likelihood of a name, or the one given.

    Raises:
        ValueError: a name that is not known, or a loss; with the likelihood that was meant if that
            is known.
    """
    if isinstance(likelihood, Likelihood):
        return likelihood
    if isinstance(likelihood, str) and likelihood in LIKELIHOODS:
        return LIKELIHOODS[likelihood]
    meant, fisher = _known_as(likelihood, _OTHER_NAMES), _known_as(likelihood, _OTHER_FISHERS)
    hint = f": for it, likelihood={_written(meant, likelihood)}" if meant else ""
    if _known_as(likelihood, {"": "gaussiannll gaussiannllloss heteroscedastic"}) is not None:
        hint = ": for it, kfoc.Gaussian(var=...) or kfoc.HeteroscedasticGaussian()"
    if fisher and not meant:
        hint = f': that is a kind of Fisher, fisher="{fisher}"'
    raise ValueError(
        f"likelihood must be one of {', '.join(LIKELIHOODS)} or a kfoc.Likelihood, found "
        f"{likelihood!r}{hint}"
    )


def _written(name: str, loss: object) -> str:
    """The likelihood to write for a loss, with those of its options that are set."""
    kind = type(LIKELIHOODS[name]).__name__
    found = {option: getattr(loss, option, None) for option in _OPTIONS.get(name, ())}
    given = [k for k, value in found.items() if isinstance(value, Tensor) or value]
    if not given:
        return f'"{name}" (its outputs are logits or means)'
    return f"kfoc.{kind}({', '.join(f'{option}=...' for option in given)})"
