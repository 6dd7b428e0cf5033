"""Golden trajectories: a refactor must reproduce them, a change of numbers must rewrite them."""

from __future__ import annotations

import pytest
from planted_optimum import packed, run_to_end, small_optimizer

from fppmo_ray.distribution import RULES

# Masks of 24 filters, five generations of six (the last of four) proposals.
GOLDEN = {
    "elite": (
        "dq9l Vkb+ Smft UX+t L09t +2uN "
        "X2zL f89J /W6j akz3 f8vh ilt9 "
        "c15t ek91 e/tJ cy/N eW6t Y07P "
        "f2uN V2fl +4/D +8+D e2nl f2st "
        "yevV Y+tt tw9n b3+J"
    ),
    "layer_es": (
        "/0np v21N T1+q e39M Pk/0 dytu "
        "c2/J f2ul uk/p M059 f84t R3Ht "
        "P0rt Wujt d2Ht W8vp X2rN /w7p "
        "+09N W8vp f09p e0vp +09p euvo "
        "ek/p ek/p /w7p +25p"
    ),
    "local_es": (
        "e0tt W2tt W2tt Wm9t W2tt e0tt "
        "W29p W2tt W29p W2tt W09t W2tt "
        "Wm9t Wm9t Wm9t Wm9t Wm9t Wm9t "
        "Wm9t Wm9t Wm9t Wm9t Wm9t Wm9t "
        "Wm9t Wm9t W29p Wm9t"
    ),
    "widths": (
        "/0pt W2tt Wm9t Uu9t W2tt e0tt "
        "f2tp W2tt W29p W2tt W2tt e0tt "
        "e0tt e0tt W2tt W2tt e0tt e0tt "
        "W29p W2tt W29p e0tt f2tp e0tt "
        "W29p W29p f29J W29p"
    ),
    "random": (
        "dq9l Vkb+ Smft UX+t L09t +2uN "
        "X2zL f89J /W6j akz3 f8vh ilt9 "
        "c15t ek91 e/tJ cy9t WG7t Q0/P "
        "amnd V+fk /o9N f8+i e2lt f208 "
        "Tevc A+t9 tw92 726p"
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_the_trajectory_is_the_recorded_one(rule):
    optimizer = small_optimizer(rule)
    masks = " ".join(packed(proposal.keep) for proposal in run_to_end(optimizer))
    assert masks == GOLDEN[rule]
