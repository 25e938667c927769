"""`dropfx.statistics` against enumeration and sampling, the law of every family, and `dropfx patterns`."""

import itertools
import json
import math
import sys

import pytest
import torch
from torch import Tensor

import dropfx
from dropfx.cli import main
from dropfx.draws.draw_plan import DrawPlan
from dropfx.errors import DropfxError, InvalidOption
from dropfx.pattern_statistics.exact import Bernoulli, exact, grid, place_weights
from dropfx.pattern_statistics.sampled import masks, sample
from dropfx.patterns import Block, Draw, Fit, Pattern, Row, Slice, Tile, TileDraw
from tests.draws.statistics_of_draws import assert_binomial, smallest_bias

FAMILIES: list[tuple[Pattern, int, float]] = [
    (Bernoulli(), 8, 0.3),
    (Block(1), 8, 0.4),
    (Block(4), 24, 0.5),
    (Block(5), 23, 0.6),
    (Slice(), 16, 0.5),
    (Slice(), 17, 0.3),
    (Row(), 30, 0.5),
    (Row(8), 13, 0.7),
    (Row(6, scale="period"), 25, 0.6),
    (Row(6), 6, 0.8),
    (Tile((1, 1)), 6, 0.5),
    (Tile((2, 3), max_period=5), 12, 0.7),
    (Tile((12, 2)), 12, 0.5),
]
ALARM = 1e-6


def fitted(pattern: Pattern, units: int, rate: float, groups: int = 1) -> Fit:
    length = pattern.tiles(units, units) if isinstance(pattern, Tile) else units
    return pattern.fit(length, rate, groups)


def law(pattern: Pattern, units: int, rate: float) -> tuple[Tensor, Tensor]:
    """Every outcome: multipliers float64 [outcomes, places], all tiles of a weight, and their probabilities."""
    fit = fitted(pattern, units, rate)
    if isinstance(pattern, Bernoulli):
        kept = torch.tensor(list(itertools.product([0.0, 1.0], repeat=units)), dtype=torch.float64)
        return kept * fit.scale, (1 - rate) ** kept.sum(1) * rate ** (units - kept.sum(1))
    if isinstance(pattern, Block):
        blocks = list(itertools.combinations(range(-(-units // fit.run)), fit.count))
        kept = torch.stack([torch.isin(torch.arange(units) // fit.run, torch.tensor(some)) for some in blocks])
        return kept.to(torch.float64) * fit.scale, torch.full((len(blocks),), 1 / len(blocks), dtype=torch.float64)
    if isinstance(pattern, Slice):
        kept = torch.stack([(torch.arange(units) - start) % units < fit.run for start in range(units)])
        return kept.to(torch.float64) * fit.scale, torch.full((units,), 1 / units, dtype=torch.float64)
    place = torch.arange(units)
    if isinstance(pattern, Tile):
        rows, columns = -(-units // pattern.shape[0]), -(-units // pattern.shape[1])
        place = (torch.arange(rows)[:, None] + torch.arange(columns)).flatten()
    multipliers, chances = [], []
    for period, chance in enumerate(fit.periods, 1):
        scale = period if isinstance(pattern, Row) and pattern.scale == "period" else fit.scale
        for bias in range(period):
            multipliers.append(((place - bias) % period == 0).to(torch.float64) * scale)
            chances.append(chance / period)
    return torch.stack(multipliers), torch.tensor(chances, dtype=torch.float64)


def correlations(multipliers: Tensor, chances: Tensor) -> Tensor:
    """[places, places] of the keep indicators."""
    kept = (multipliers > 0).to(torch.float64)
    mean = chances @ kept
    covariance = kept.T @ (chances[:, None] * kept) - mean[:, None] * mean
    spread = covariance.diagonal().sqrt()
    return covariance / (spread[:, None] * spread)


# -- closed forms against every outcome -----------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "units", "rate"), FAMILIES)
def test_closed_forms_agree_with_enumeration(pattern: Pattern, units: int, rate: float) -> None:
    found = dropfx.statistics(pattern, rate, units, samples=0)
    multipliers, chances = law(pattern, units, rate)
    kept = (multipliers > 0).to(torch.float64)
    places = kept.size(1)
    close = {"abs": 1e-9}
    assert found.places == places
    assert torch.allclose(1 - chances @ kept, torch.full((places,), found.drawn_rate, dtype=torch.float64))
    assert torch.allclose(chances @ multipliers, torch.ones(places, dtype=torch.float64))
    assert torch.allclose(
        chances @ multipliers**2, torch.full((places,), found.second_moment, dtype=torch.float64), atol=1e-9
    )
    pairs = correlations(multipliers, chances)
    above = pairs[torch.triu(torch.ones(places, places), 1) > 0]
    assert found.pair_mean == pytest.approx(float(above.mean()), **close)
    assert abs(found.pair_worst) == pytest.approx(float(above.abs().max()), **close)
    assert float((above - found.pair_worst).abs().min()) < 1e-9
    share = kept.mean(1)
    assert found.kept_share_sd == pytest.approx(math.sqrt(chances @ (share - chances @ share) ** 2), **close)
    gain = multipliers.mean(1)
    assert found.gain_sd == pytest.approx(math.sqrt(chances @ (gain - chances @ gain) ** 2), **close)


@pytest.mark.parametrize(("pattern", "units", "rate"), FAMILIES)
def test_pair_correlations_by_distance_agree_with_enumeration(pattern: Pattern, units: int, rate: float) -> None:
    found = dropfx.statistics(pattern, rate, units, samples=0)
    pairs = correlations(*law(pattern, units, rate))
    if not isinstance(pattern, Tile):
        expected = [float(pairs.diagonal(apart).mean()) for apart in range(1, units)]
    else:  # along the first row of tiles, or the first column where that is longer
        rows, columns = grid(pattern, units)
        expected = (pairs[0, 1:columns] if columns >= rows else pairs[0, columns::columns]).tolist()
    assert list(found.pair_correlations) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("pattern", "units", "rate"), FAMILIES)
def test_kept_sets_agree_with_enumeration(pattern: Pattern, units: int, rate: float) -> None:
    """Lattices that keep one unit alone coincide and count once."""
    found = dropfx.statistics(pattern, rate, units, samples=0)
    multipliers, chances = law(pattern, units, rate)
    sets: dict[tuple[bool, ...], float] = {}
    shares: dict[float, float] = {}
    for row, chance in zip(multipliers > 0, chances.tolist(), strict=True):
        key = tuple(row.tolist())
        sets[key] = sets.get(key, 0.0) + chance
        share = round(sum(key) / len(key), 9)
        shares[share] = shares.get(share, 0.0) + chance
    assert found.entropy == pytest.approx(-sum(p * math.log2(p) for p in sets.values()), abs=1e-9)
    assert found.log2_models == pytest.approx(math.log2(len(sets)), abs=1e-9)
    drawn: dict[float, float] = {}
    for share, chance in zip(found.shares, found.share_probabilities, strict=True):
        drawn[round(share, 9)] = drawn.get(round(share, 9), 0.0) + chance
    assert drawn == pytest.approx(shares, abs=1e-9)


@pytest.mark.parametrize(("pattern", "units", "rate"), FAMILIES[-3:])
def test_columns_dropped_whole_agree_with_enumeration(pattern: Tile, units: int, rate: float) -> None:
    found = dropfx.statistics(pattern, rate, units, samples=0)
    multipliers, chances = law(pattern, units, rate)
    gone = (multipliers.view(-1, *grid(pattern, units)) == 0).all(1).to(torch.float64).mean(1)
    assert found.dropped_columns == pytest.approx(float(chances @ gone), abs=1e-12)


def test_no_column_of_tiles_is_dropped_whole_where_the_periods_divide_the_columns() -> None:
    """64 columns; numbered row by row, period 2 and 4 would drop the same columns in every row."""
    for rate in (0.3, 0.5, 0.7):
        assert dropfx.statistics("tile", rate, 2048, samples=0).dropped_columns == 0.0


def test_known_figures() -> None:
    """Derived by hand: adjacent units are both kept only by period 1; k-of-n pairs; E[period] of N = 16."""
    both = [
        s.drawn_rate * (1 - s.drawn_rate) * s.pair_correlations[0] + (1 - s.drawn_rate) ** 2
        for s in (dropfx.statistics(Row(4), rate, 2048, samples=0) for rate in (0.3, 0.5, 0.7))
    ]
    assert both == pytest.approx([0.515, 0.221, 0.002], abs=5e-4)
    moments = [dropfx.statistics(Row(16, "period"), p, 2048, samples=0).second_moment for p in (0.3, 0.5, 0.7)]
    assert moments == pytest.approx([3.32, 5.19, 7.34], abs=5e-3)
    assert dropfx.statistics(Row(16), 0.3, 2048, samples=0).second_moment == pytest.approx(1 / 0.7)
    assert dropfx.statistics(Row(4), 0.5, 240, samples=0).pair_correlations[11] == pytest.approx(1.0)
    block = dropfx.statistics(Block(64), 0.5, 2048, samples=0)
    assert block.log2_models == pytest.approx(math.log2(math.comb(32, 16)))
    assert block.kept_share_sd == 0.0


# -- closed forms against draws -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pattern", "units", "rate"), FAMILIES)
def test_closed_forms_agree_with_draws(pattern: Pattern, units: int, rate: float) -> None:
    """Means of 2,000 draws lie within 5.5 of their standard errors, which bound a correlation's by 1 / sqrt(times)."""
    times = 2000
    fit = fitted(pattern, units, rate)
    expected = exact(pattern, fit, units)
    drawn = sample(pattern, fit, units, times).figures
    assert expected is not None
    error = 5.5 / math.sqrt(times)
    spread = max(1.0, 1 / (fit.keep * fit.drawn_rate) - 3) ** 0.5  # of a product of two indicators, standardised
    assert len(drawn.pair_correlations) == len(expected.pair_correlations)
    for one, other in zip(drawn.pair_correlations, expected.pair_correlations, strict=True):
        assert one == pytest.approx(other, abs=error * spread)
    assert drawn.pair_mean == pytest.approx(expected.pair_mean, abs=error * spread)
    assert drawn.second_moment == pytest.approx(expected.second_moment, abs=error * expected.second_moment * 3)
    assert drawn.kept_share_sd == pytest.approx(expected.kept_share_sd, abs=error)
    assert drawn.gain_sd == pytest.approx(expected.gain_sd, abs=error * 3 * expected.gain_sd + 1e-12)
    assert set(torch.tensor(drawn.shares).round(decimals=9).tolist()) <= set(
        torch.tensor(expected.shares).round(decimals=9).tolist()
    )


@pytest.mark.parametrize(
    ("pattern", "groups"), [("block", 4), ("block", 7), ("slice", 3), ("row", 5), ("bernoulli", 6)]
)
def test_groups(pattern: str, groups: int) -> None:
    """The stratified count of groups that keep a unit, f = frac(keep * groups), has variance f (1 - f)."""
    found = dropfx.statistics(pattern, 0.5, 64, groups=groups, samples=1500)
    one = dropfx.statistics(pattern, 0.5, 64, samples=0)
    assert found.groups == groups
    assert found.pair_correlations == one.pair_correlations
    assert found.groups_keeping is not None
    assert found.group_correlation is not None
    assert not found.exact & {"groups_keeping", "group_correlation", "marginals"}
    if pattern in ("block", "slice"):
        mean = groups * (1 - found.drawn_rate)
        assert found.groups_keeping == (math.floor(mean), math.ceil(mean))
        part = mean % 1
        variance = groups * 0.25
        expected = (part * (1 - part) - variance) / ((groups - 1) * variance)
        assert found.group_correlation == pytest.approx(expected, abs=1e-6)
    elif pattern == "row":
        assert found.groups_keeping == (1, 5)  # period 3 keeps a unit in one or two of 5 groups, period 1 in all
    else:
        assert found.group_correlation == pytest.approx(0.0, abs=0.02)


class Pairs(Pattern):
    """A user's own pattern: unit i is kept exactly where its neighbour i ^ 1 is dropped."""

    name = "pairs"

    def fit(self, units: int, rate: float, groups: int = 1) -> Fit:
        return Fit(units, run=1, count=units // 2, numbers=units // 2, drawn_rate=0.5, groups=groups)

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        return [Draw(row, 1, fit.scale, fit) for row in torch.arange(0, fit.units, 2) + (hashes >> 40) % 2]


def test_pattern_without_closed_forms_is_sampled() -> None:
    found = dropfx.statistics(Pairs(), 0.5, 64, samples=1000)
    assert found.exact == {"drawn_rate"}
    assert found.entropy is None
    assert found.second_moment == pytest.approx(2.0)
    assert found.kept_share_sd == 0.0
    assert found.pair_mean == pytest.approx(-1 / 63)
    assert found.pair_correlations[0] == pytest.approx(-32 / 63, abs=0.02)  # every second neighbour is a partner
    assert found.pair_correlations[1] == pytest.approx(0.0, abs=0.03)
    assert "~" in str(found)
    with pytest.raises(InvalidOption, match=r"samples: got 0, but .* has no closed forms"):
        dropfx.statistics(Pairs(), 0.5, 64, samples=0)


# -- the law of every family: exact tests ---------------------------------------------------------------------------

TRIALS = 8_000
LAWS = [
    (Bernoulli(), 64, 0.5),
    (Block(), 64, 0.5),
    (Block(16), 100, 0.3),
    (Slice(), 64, 0.7),
    (Row(), 64, 0.5),
    (Row(8), 64, 0.7),
    (Tile((8, 8)), 64, 0.5),
]


def dropped_counts(pattern: Pattern, units: int, rate: float, trials: int = TRIALS) -> list[int]:
    """How often each unit (each diagonal of tiles) was dropped in `trials` steps."""
    fit, places = fitted(pattern, units, rate), len(place_weights(pattern, units))
    counts = torch.zeros(places, dtype=torch.int64)
    for mask in masks(pattern, fit, places, trials):
        counts += mask[0] == 0
    return counts.tolist()


@pytest.mark.parametrize(("pattern", "units", "rate"), LAWS)
def test_every_unit_is_dropped_at_the_drawn_rate(pattern: Pattern, units: int, rate: float) -> None:
    """First moment only. Steps are the replicates; chance fails this in less than 1e-6 of all sets of numbers.

    A bias of 0.047 in a single unit is caught with probability .99, at least.
    """
    drawn = fitted(pattern, units, rate).drawn_rate
    assert_binomial(dropped_counts(pattern, units, rate), TRIALS, drawn, significance=ALARM)
    places = len(place_weights(pattern, units))
    assert smallest_bias(TRIALS, drawn, places, significance=ALARM) < 0.047


@pytest.mark.parametrize(("pattern", "units", "rate"), LAWS)
def test_neighbours_are_dropped_together_as_the_closed_form_says(pattern: Pattern, units: int, rate: float) -> None:
    """Second moment: units 0 and t for several t, exact binomial with the same false-alarm bound."""
    trials = 2000
    fit, places = fitted(pattern, units, rate), len(place_weights(pattern, units))
    found = dropfx.statistics(pattern, rate, units, samples=0)
    kept = torch.cat(list(masks(pattern, fit, places, trials))) > 0
    for apart in (1, 2, 3, 6):
        both = fit.keep**2 + fit.keep * fit.drawn_rate * found.pair_correlations[apart - 1]
        if isinstance(pattern, Block):  # its figures are means over pairs within a block and across two
            other = fit.keep * (fit.count - 1) / (-(-units // fit.run) - 1)
            both = fit.keep if fit.run > apart else other
        together = int((kept[:, 0] & kept[:, apart]).sum())
        assert_binomial([together], trials, both, significance=ALARM / 4)


def test_draws_of_tiles_agree_with_their_diagonals() -> None:
    """What the statistics read, the diagonals, is what the weight's mask shows."""
    pattern = Tile((8, 8))
    plan = DrawPlan(["site"], [pattern.fit(8, 0.5)], pattern, torch.device("cpu"))
    for number in range(20):
        (draw,) = plan.draw(torch.tensor(number))
        assert isinstance(draw, TileDraw)
        diagonals = draw.mask(1, 15, (1, 1), torch.float64)[0]
        whole = draw.mask(64, 64, (8, 8), torch.float64)[::8, ::8]
        assert torch.equal(whole, diagonals[torch.arange(8)[:, None] + torch.arange(8)])


# -- the tests catch what is wrong ----------------------------------------------------------------------------------


class LateSlice(Slice):
    """Never begins at the last units."""

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        return super().choose(hashes % (fit.units * 15 // 16), fit)


class LazyRow(Row):
    """Uses the upper half of its numbers' range only: no period is 1."""

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        return super().choose((hashes >> 1) + 2**62, fit)


class StickyBlock(Block):
    """Keeps block 0 a little more often than the others."""

    def choose(self, hashes: Tensor, fit: Fit) -> list[Draw]:
        hashes = hashes.clone()
        hashes[:, 0] += (2**63 - 1 - hashes[:, 0]) // 8
        return super().choose(hashes, fit)


class EarlyTile(Tile):
    """Takes the first of its biases too often."""

    def choose(self, hashes: Tensor, fit: Fit) -> list:
        hashes = hashes.clone()
        hashes[:, 1] *= hashes[:, 1] % 8 > 0
        return super().choose(hashes, fit)


@pytest.mark.parametrize(
    ("pattern", "rate"), [(LateSlice(), 0.5), (LazyRow(), 0.5), (StickyBlock(), 0.5), (EarlyTile((8, 8)), 0.5)]
)
def test_biased_samplers_are_caught(pattern: Pattern, rate: float) -> None:
    counts = dropped_counts(pattern, 64, rate)
    with pytest.raises(AssertionError, match="p = "):
        assert_binomial(counts, TRIALS, fitted(pattern, 64, rate).drawn_rate, significance=ALARM)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("rate", [0.3, 0.5, 0.7])
def test_the_smallest_bias_is_caught_with_the_stated_power(rate: float, sign: int) -> None:
    """One unit of 64 at the bias, 500 runs: the misses are no more than a power of .99 explains."""
    trials, runs = 2000, 500
    bias = sign * smallest_bias(trials, rate, 64, significance=ALARM)
    generator = torch.Generator().manual_seed(int(rate * 10) + sign)
    counts = torch.binomial(torch.full((runs,), float(trials)), torch.full((runs,), rate + bias), generator=generator)
    caught = 0
    for count in counts.long().tolist():
        try:
            assert_binomial([count] + [round(trials * rate)] * 63, trials, rate, significance=ALARM)
        except AssertionError:
            caught += 1
    assert caught >= 0.97 * runs
    weaker = abs(bias) / 3
    assert smallest_bias(9 * trials, rate, 64, significance=ALARM) == pytest.approx(weaker, rel=0.1)


def test_false_alarms_are_bounded() -> None:
    """The chance that one honest unit is flagged, summed over its counts, is within its share of the bound."""
    from tests.draws.statistics_of_draws import cumulative, p_value

    trials, tests = 500, 64
    below = cumulative(trials, 0.3)
    chances = torch.diff(below, prepend=torch.zeros(1, dtype=torch.float64))
    flagged = sum(float(chances[c]) for c in range(trials + 1) if p_value(c, trials, 0.3) * tests <= ALARM)
    assert 0 < flagged <= ALARM / tests


# -- the interface --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pattern", ["block", "slice", "row", "tile", "bernoulli"])
def test_result(pattern: str) -> None:
    found = dropfx.statistics(pattern, 0.5, 256, samples=64)
    assert isinstance(found, dropfx.Statistics)
    assert found.pattern == pattern
    assert len(found.marginals) == len(place_weights(found.source, 256))
    plain = json.loads(json.dumps(found.to_dict()))
    assert plain["pattern"] == pattern
    assert "pair_mean" in plain["exact"]
    assert "marginals" not in plain["exact"]
    printed = str(found)
    for word in (
        pattern,
        "bernoulli",
        "P(dropped)",
        "pair correlation, worst",
        "entropy",
        "sub-models",
        "second moment",
    ):
        assert word in printed
    with pytest.raises(AttributeError):
        found.rate = 0.1  # type: ignore[misc]


def test_same_figures_every_time_and_no_generator_moved() -> None:
    before = torch.get_rng_state()
    one, again = (dropfx.statistics("row", 0.5, 64, samples=50) for _ in range(2))
    assert one == again
    assert torch.equal(torch.get_rng_state(), before)


def test_pattern_objects_are_named_by_their_repr() -> None:
    assert dropfx.statistics(Row(16), 0.5, 64, samples=0).pattern == "Row(max_period=16, scale='global')"


def test_wide_axes_need_no_matrix_of_pairs() -> None:
    """It would take 34 GB."""
    for pattern in ("block", "slice", "row", "tile", Tile((1, 1))):
        found = dropfx.statistics(pattern, 0.5, 2**16, samples=0)
        assert len(found.pair_correlations) == (2**16 // 32 if pattern == "tile" else 2**16) - 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("rows", 0.5, 64), "pattern: got 'rows', accepted are 'block', 'slice', 'row', 'tile', 'bernoulli' and"),
        ((Block, 0.5, 64), "pattern: got <class"),
        ((None, 0.5, 64), "pattern: got None"),
        (("row", 0.0, 64), "rate: got 0.0, accepted are numbers above 0 and below 1"),
        (("row", 1, 64), "rate: got 1"),
        (("row", math.nan, 64), "rate: got nan"),
        (("row", True, 64), "rate: got True"),
        (("row", "0.5", 64), "rate: got '0.5'"),
        (("row", 0.5, 1), "units: got 1, accepted are integers >= 2"),
        (("row", 0.5, 64.0), "units: got 64.0"),
        (("row", 0.5, 64, 0), "groups: got 0, accepted are integers >= 1"),
        (("row", 0.5, 64, "time"), "groups: got 'time'"),
        (("row", 0.5, 64, 1, -1), "samples: got -1, accepted are integers >= 0"),
        (("tile", 0.5, 64, 2), "pattern: got 'tile', which refuses rate=0.5, units=64, groups=2: .* groups must be 1"),
        (("tile", 0.5, 32), "which refuses .*: a weight of a single 32x32 tile"),
        (("slice", 0.5, 3), "which refuses .*: no window over 3 units"),
        ((Row(2), 0.9, 64), "which refuses .*: periods up to 2 drop at most 0.5"),
    ],
)
def test_bad_input(arguments: tuple, words: str) -> None:
    with pytest.raises(InvalidOption, match=words):
        dropfx.statistics(*arguments)


def test_plot(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    for pattern in (Row(scale="period"), Tile((8, 8))):
        path = tmp_path / "new" / f"{pattern.name}.png"
        dropfx.statistics(pattern, 0.5, 64, samples=0).plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")


def without_matplotlib(monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)


def test_plot_without_matplotlib(tmp_path, monkeypatch) -> None:
    without_matplotlib(monkeypatch)
    with pytest.raises(DropfxError, match=r"matplotlib is missing, install dropfx\[plot\]"):
        dropfx.statistics("row", 0.5, 64, samples=0).plot(tmp_path / "row.png")


SMALL = ["patterns", "--rate", ".5", "--units", "64", "--samples", "32"]


def test_command_prints_all_families_and_writes_a_picture(tmp_path, capsys) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "patterns.png"
    assert main([*SMALL, "--out", str(path)]) == 0
    printed = capsys.readouterr().out
    for word in ("bernoulli", "block", "slice", "row", "tile", "entropy", "columns of tiles dropped whole", str(path)):
        assert word in printed.replace("\n", "")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command_with_some_patterns_and_groups(capsys) -> None:
    assert main([*SMALL, "--pattern", "row", "tile", "--groups", "4"]) == 0
    printed = capsys.readouterr().out
    assert "slice" not in printed
    assert "groups of 4 that keep a unit" in printed
    assert "groups must be 1" in printed  # why there is no column of tiles


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rate", "1.5"], "rate: got 1.5"),
        (["--units", "1"], "units: got 1"),
        (["--units", "32", "--pattern", "tile"], "a weight of a single 32x32 tile"),
        (["--groups", "0"], "groups: got 0"),
    ],
)
def test_command_with_bad_input(options: list[str], words: str, capsys) -> None:
    assert main(["patterns", *options]) == 2
    assert words in capsys.readouterr().err


def test_command_without_matplotlib(tmp_path, monkeypatch, capsys) -> None:
    without_matplotlib(monkeypatch)
    assert main([*SMALL, "--out", str(tmp_path / "p.png")]) == 2
    assert "install dropfx[plot]" in capsys.readouterr().err
