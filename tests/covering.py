"""Pairwise covering designs: every pair of values of two factors meets in some case, in ~1/1000 of the product."""

import itertools
import random


def covering(factors, accept=lambda case: True, candidates=40, seed=0):
    """A list of dicts over `factors` ({name: values}) that holds every pair for which some case passes `accept`."""
    rng = random.Random(seed)
    names = list(factors)
    pairs = [
        ((a, x), (b, y)) for a, b in itertools.combinations(names, 2) for x in factors[a] for y in factors[b]
    ]  # fmt: skip
    rng.shuffle(pairs)
    uncovered, cases = dict.fromkeys(pairs), []
    for pair in pairs:
        if pair not in uncovered:
            continue
        drawn = ({n: rng.choice(factors[n]) for n in names} | dict(pair) for _ in range(50 * candidates))
        accepted = itertools.islice(filter(accept, drawn), candidates)
        best = max(accepted, key=lambda case: sum(p in uncovered for p in _pairs_of(case)), default=None)
        assert best is not None, f"no acceptable case holds {pair}"
        for p in _pairs_of(best):
            uncovered.pop(p, None)
        cases.append(best)
    return cases


def _pairs_of(case):
    return itertools.combinations(case.items(), 2)
