"""scripts/text_variance.py: the chains' bound is their log-likelihood, the estimator unbiased for it, Lemma 5's variances, the
theorem's order."""

import sys

import pytest
import torch

from diffalign.likelihood import MaskedELBO
from diffalign.process import Masking

from ..e2e.conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts"))
from text_variance import Case, _against_exact, _by_lemma, chain, chain_answer, chain_pairs  # noqa: E402


def test_a_chains_bound_is_its_log_likelihood():
    draw = torch.Generator().manual_seed(0)
    start, step = (torch.randn(*shape, generator=draw, dtype=torch.float64) for shape in ((3,), (3, 3)))
    joint = chain(3, 4, start, 2 * step)
    assert joint.exp().sum() == pytest.approx(1.0)
    for answer in (torch.tensor([0, 2, 1, 1]), torch.tensor([2, 2, 0, 1])):
        bound = chain_answer(answer, {"current": joint}).bound("current")
        assert bound == pytest.approx(float(joint[tuple(answer)]), abs=1e-10)


@pytest.fixture(scope="module")
def known():
    return chain_pairs(1, seed=3, words=3, length=4)


def measured(known, repeats=1500, **options):
    redrawn = options.pop("redrawn", False)
    case = Case(name="", estimator=MaskedELBO(**options), redrawn=redrawn)
    return _against_exact(case, known, Masking(mask_id=0), repeats, 1.0, 0)


@pytest.mark.parametrize("options", [
    {"draws": 1}, {"draws": 4}, {"draws": 4, "masks_per_time": 4}, {"draws": 4, "redrawn": True}], ids=str)
def test_unbiased_and_of_lemma_5s_variance(known, options):
    found = measured(known, **options)
    assert found["largest_z"] < 4
    assert found["variance"] == pytest.approx(found["lemma"], rel=0.15)
    assert -3 * found["bias_error"] < found["bias"] < found["bound"]


def test_other_choices_are_unbiased_too(known):
    for options in ({"draws": 2, "share_times": True}, {"draws": 2, "form": "time", "t_min": 1e-6}):
        assert measured(known, **options)["largest_z"] < 4


def test_the_theorems_order(known):
    """Exact variances: more draws, then more times at equal draws, are better; an unshared reference is far worse."""
    answers = known[0][1]

    def lemma(redrawn=False, **options):
        return _by_lemma(Case(name="", estimator=MaskedELBO(**options), redrawn=redrawn), answers, 1.0)

    by_times = [lemma(draws=8, masks_per_time=m) for m in (1, 2, 4, 8)]
    assert by_times == sorted(by_times) and by_times[0] < by_times[-1]
    by_draws = [lemma(draws=n) for n in (1, 2, 4, 8)]
    assert by_draws == pytest.approx([by_draws[0] / n for n in (1, 2, 4, 8)])
    assert lemma(draws=8, redrawn=True) > 3 * lemma(draws=8)
