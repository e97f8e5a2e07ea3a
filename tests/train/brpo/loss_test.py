"""The objective on cases worked out by hand, and beside its formula written a second time in numpy's float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.train.brpo.loss import advantages, brpo_loss, denominator, kl_estimate

SETTINGS = {"beta": 0.1, "clip_low": 0.2, "clip_high": 0.3}


def loss_of(logp, old, ref, adv, mask, **changes):
    arrays = [np.asarray(x, np.float32) for x in (logp, old, ref, adv, mask)]
    return brpo_loss(*arrays, **(SETTINGS | changes))


@pytest.mark.parametrize(
    "ratio, advantage, want",
    [
        (1.5, 2.0, 1.3 * 2),  # above the clip, good: clipped
        (0.5, 2.0, 0.5 * 2),  # below the clip, good: not clipped
        (1.5, -2.0, 1.5 * -2),  # above, bad: not clipped
        (0.5, -2.0, 0.8 * -2),  # below, bad: clipped
        (1.0, 3.0, 3.0),
        (1.25, 2.0, 1.25 * 2),  # within, though not by the lower width
    ],
)
def test_clipping(ratio, advantage, want):
    logp = [[np.log(ratio)]]
    loss, sums = loss_of(logp, [[0.0]], logp, [advantage], [[1.0]])
    np.testing.assert_allclose(loss, -want, rtol=1e-6)
    assert float(sums["clip_high"]) == (ratio > 1.3 and advantage > 0)
    assert float(sums["clip_low"]) == (ratio < 0.8 and advantage < 0)
    grad = jax.grad(lambda x: loss_of_array(x, advantage))(jnp.asarray(np.log(ratio), jnp.float32))
    clipped = (ratio > 1.3 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    np.testing.assert_allclose(grad, 0.0 if clipped else -ratio * advantage, rtol=1e-6)


def loss_of_array(x, advantage):
    one = jnp.ones((1, 1))
    return brpo_loss(x * one, 0 * one, 0 * one, advantage * one[0], one, **(SETTINGS | {"beta": 0.0}))[0]


@pytest.mark.parametrize(
    "advantage, low, high, want",
    [
        (1.0, 0.0, 0.3, -1.0),  # the lower bound is the ratio itself, and does not matter here
        (-1.0, 0.2, 0.0, 1.0),  # nor the upper one here
        (1.0, 0.0, 0.0, -1.0),  # a kink: the side that is not clipped, as in TRL
        (-1.0, 0.0, 0.0, 1.0),
    ],
)
def test_a_ratio_on_the_bound_has_its_whole_gradient(advantage, low, high, want):
    one = jnp.ones((1, 1))
    value = lambda x: brpo_loss(x, 0 * one, 0 * one, advantage * one[0], one, beta=0.0, clip_low=low, clip_high=high)[0]  # noqa: E731
    np.testing.assert_allclose(jax.grad(value)(0 * one), [[want]])


def test_kl_is_k3():
    logp, ref = -1.25, -1.0
    want = np.exp(ref - logp) - (ref - logp) - 1
    np.testing.assert_allclose(kl_estimate(jnp.float32(logp), jnp.float32(ref)), want, rtol=1e-6)
    loss, sums = loss_of([[logp]], [[logp]], [[ref]], [0.0], [[1.0]])
    np.testing.assert_allclose(loss, 0.1 * want, rtol=1e-6)
    np.testing.assert_allclose(sums["kl"], want, rtol=1e-6)


def test_k3_keeps_its_digits_near_zero():
    """d^2 / 2 to leading order; exp(d) - d - 1 in float32 would give 0 or noise."""
    d = np.float32(2.0**-14)
    np.testing.assert_allclose(kl_estimate(jnp.float32(0), jnp.float32(d)), d**2 / 2 + d**3 / 6, rtol=1e-4)


def test_responses_count_equally_and_padding_not_at_all():
    """Row 0: two tokens of 1 and 3; row 1: one token of 5, junk behind it; row 2: nothing."""
    logp = np.log([[1.0, 1.1], [1.05, 1e6], [7.0, 7.0]])
    mask = [[1, 1], [1, 0], [0, 0]]
    loss, _ = loss_of(logp, np.zeros((3, 2)), logp, [2.0, -1.0, 9.0], mask)
    np.testing.assert_allclose(loss, -((1.0 * 2 + 1.1 * 2) / 2 + 1.05 * -1), rtol=1e-6)


def test_junk_behind_the_end_gives_no_nan():
    junk = np.array([[-0.5, np.float32(-1e30)]], np.float32)
    mask = np.array([[1.0, 0.0]], np.float32)
    value = lambda x: brpo_loss(x, jnp.zeros((1, 2)), -x, jnp.ones(1), mask, **SETTINGS)[0]  # noqa: E731
    assert np.isfinite(value(junk)) and np.isfinite(jax.grad(value)(junk)).all()


@pytest.mark.parametrize("norm", ["sequence", "token", "constant"])
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("kl", ["k1", "k2", "k3"])
def test_finite_differences(norm, ratio, kl):
    """Value and gradient beside central differences of the formula, row by row in numpy's float64."""
    rng = np.random.default_rng(4)
    old, ref, noise = -1 + 0.3 * rng.normal(size=(3, 4, 5))
    logp = old + noise + 1 + np.array([[0.5], [-0.5], [0.1], [0.0]])
    adv, length = np.array([1.3, -0.7, 0.9, -1.1]), [5, 3, 1, 0]
    mask = (np.arange(5) < np.array(length)[:, None]).astype(np.float64)

    def ratios(x, b):
        n = length[b]
        log_ratio = x[b, :n] - old[b, :n]
        return np.exp(log_ratio if ratio == "token" else np.full(n, log_ratio.mean()))

    def formula(x):
        total = 0.0
        for b, n in enumerate(length[:3]):
            r, d = ratios(x, b), ref[b, :n] - x[b, :n]
            selected = np.minimum(r, 1.3) if adv[b] > 0 else np.maximum(r, 0.8)
            divergence = {"k1": -d, "k2": d**2 / 2, "k3": np.exp(d) - d - 1}[kl]
            terms = selected * adv[b] - 0.1 * divergence
            total -= terms.mean() if norm == "sequence" else terms.sum()
        return total

    every = np.concatenate([ratios(logp, b) for b in range(3)])
    assert np.abs(every[:, None] - [0.8, 1.3]).min() > 1e-3, "a point at a kink"
    assert (every > 1.3).any() and (every < 0.8).any()
    with jax.enable_x64(True):
        args = [jnp.asarray(x, jnp.float64) for x in (old, ref, adv, mask)]
        value = lambda x: brpo_loss(x, *args, **SETTINGS, norm=norm, ratio=ratio, kl=kl)[0]  # noqa: E731
        result, grad = jax.value_and_grad(value)(jnp.asarray(logp, jnp.float64))
    np.testing.assert_allclose(result, formula(logp), rtol=1e-6)
    want = np.zeros((4, 5))
    for index in np.ndindex(4, 5):
        step = np.zeros((4, 5))
        step[index] = 1e-5
        want[index] = (formula(logp + step) - formula(logp - step)) / 2e-5
    # The KL is in float32 whatever its arguments are.
    np.testing.assert_allclose(grad, want, atol=1e-7)
    assert np.abs(want).max() > 0.1 and not grad[3].any()


def test_divisors_of_ragged_responses():
    """Two responses of 3 and 1 tokens, all worth 1 at ratio 1, and a third that only fills the batch."""
    mask = np.array([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]], np.float32)
    logp, adv = np.full((3, 4), -1.0), [1.0, 3.0, 99.0]
    tokens, responses = jnp.float32(4), jnp.float32(2)
    for norm, total, divisor in (("sequence", 1 + 3, 2), ("token", 3 * 1 + 1 * 3, 4), ("constant", 6, 2 * 5)):
        loss, _ = loss_of(logp, logp, logp, adv, mask, norm=norm)
        np.testing.assert_allclose(loss, -total, rtol=1e-6)
        assert float(denominator(norm, responses, tokens, 5)) == divisor
        assert float(denominator(norm, jnp.float32(0), jnp.float32(0), 5)) == 1


def test_the_ratio_of_a_sequence():
    """Ratios 2 and 1/2, and junk behind the end: their geometric mean is 1. Twice 1.5: 1.5, clipped for both tokens."""
    logp, mask = np.log([[2.0, 0.5, 9.0], [1.5, 1.5, 9.0]]), [[1, 1, 0], [1, 1, 0]]
    loss, sums = loss_of(logp, np.zeros((2, 3)), logp, [5.0, 2.0], mask, ratio="sequence")
    np.testing.assert_allclose(loss, -(5.0 * 1.0 + 2.0 * 1.3), rtol=1e-6)
    np.testing.assert_allclose(sums["ratio"], 2 * 1.0 + 2 * 1.5, rtol=1e-6)
    assert float(sums["clip_high"]) == 2


@pytest.mark.parametrize("form, want", [("k1", -0.25), ("k2", 0.03125), ("k3", np.exp(0.25) - 0.25 - 1)])
def test_estimates_of_the_divergence(form, want):
    np.testing.assert_allclose(kl_estimate(jnp.float32(-1.25), jnp.float32(-1.0), form), want, rtol=1e-6)


def test_k1_in_the_loss_has_no_gradient_in_expectation_and_k2_that_of_the_divergence():
    """The exact expectation over a categorical policy, on policy: no sampling."""
    logits = jnp.array([0.3, -1.0, 0.8, 0.1])
    ref = jax.nn.log_softmax(jnp.array([1.0, 0.2, -0.5, 0.0]))
    policy = jax.nn.softmax(logits)  # the sampler's: held still

    def expected(form):
        return jax.grad(lambda x: jnp.sum(policy * kl_estimate(jax.nn.log_softmax(x), ref, form)))(logits)

    divergence = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - ref)))(logits)
    np.testing.assert_allclose(expected("k1"), 0, atol=1e-6)
    np.testing.assert_allclose(expected("k2"), divergence, atol=1e-6)
    # That of k3 is the gradient of the other divergence, KL(ref || pi): policy - reference.
    np.testing.assert_allclose(expected("k3"), policy - jnp.exp(ref), atol=1e-6)
    assert np.abs(divergence).max() > 0.05


def advantages_of(rewards_QxG, valid=None, **settings):
    rewards = np.asarray(rewards_QxG, np.float64)
    flat = rewards.reshape(-1, 1)
    valid_B = np.ones(len(flat), bool) if valid is None else np.asarray(valid).reshape(-1)
    result, equal = advantages(flat, np.ones(1), valid_B, rewards.shape[1], **({"std_eps": 1e-4} | settings))
    return result.reshape(rewards.shape), equal


def test_advantages():
    got, equal = advantages_of([[1.0, 2.0, 3.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    # Mean 2, deviation sqrt(2 / 3) = 0.8164966, and 1e-4 to it.
    np.testing.assert_allclose(got[0], [-1.2245949, 0, 1.2245949, 0], rtol=1e-6)
    assert not got[1].any() and equal.tolist() == [False, True]


def test_a_response_without_rewards_counts_in_no_mean_and_no_deviation():
    got, equal = advantages_of(
        [[1.0, 99.0, 3.0, 2.0], [7.0, 7.0, 1.0, 7.0], [5.0, 1.0, 2.0, 3.0]],
        [[1, 0, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0]],
    )
    np.testing.assert_allclose(got[0], np.array([-1, 0, 1, 0]) / (1 + 1e-4), rtol=1e-6)
    assert not got[1:].any() and equal.tolist() == [False, True, True]


def test_the_floor_of_the_deviation():
    small = [[1.0, 1.01, 0.99, 1.0], [1.0, 2.0, 3.0, 2.0]]
    plain, _ = advantages_of(small)
    got, _ = advantages_of(small, std_floor=0.5)
    np.testing.assert_allclose(got[0], np.array([0, 0.01, -0.01, 0]) / (0.5 + 1e-4), atol=1e-6)
    np.testing.assert_allclose(got[1], plain[1])
    assert np.abs(plain[0]).max() > 1


def test_scales():
    rewards = np.array([[1.0, 3.0], [10.0, 30.0]])
    np.testing.assert_allclose(advantages_of(rewards, scale="none")[0], [[-1, 1], [-10, 10]])
    std = np.sqrt(((rewards - 11) ** 2).sum() / 3)
    np.testing.assert_allclose(
        advantages_of(rewards, scale="batch")[0], np.array([[-1, 1], [-10, 10]]) / (std + 1e-4), rtol=1e-6
    )


def test_rewards_that_are_normalised_before_they_are_summed():
    """Two groups of two: each reward becomes -1/sqrt 2 and 1/sqrt 2 in its group, whatever its spread."""
    rewards = np.array([[0.0, 100.0], [1.0, 0.0], [5.0, 1.0], [3.0, 1.0]])
    got, equal = advantages(
        rewards, np.array([1.0, 0.5]), np.ones(4, bool), 2, std_eps=1e-9, scale="group", total="normalised"
    )
    # Totals -+0.3535534 and +-0.7071068: mean 0, deviation sqrt(1.25 / 3) = 0.6454972.
    np.testing.assert_allclose(got, [-0.5477226, 0.5477226, 1.0954451, -1.0954451], rtol=1e-6)
    assert not equal.any()


def test_the_floor_of_a_normalised_total():
    """Deviations 1/sqrt 2 of both rewards and of the totals; each is floored at 1, so all stays as it is, centred."""
    rewards = np.array([[0.0, 1.0], [1.0, 1.0]])
    got, _ = advantages(rewards, np.ones(2), np.ones(2, bool), 2, std_eps=1e-9, std_floor=1.0, total="normalised")
    np.testing.assert_allclose(got, [-0.5, 0.5], rtol=1e-6)


def test_equal_means_equal_in_the_total_that_is_used():
    """Three rewards that sum to 2 in all rows of a group, with different spreads: normalised, they do not cancel."""
    rewards = np.array(
        [[2.0, 0, 0], [0, 1, 1], [1, 0, 1], [1, 1, 2], [0, 0, 0], [1, 1, 1], [3, 3, 3], [3, 3, 3], [3, 3, 3]]
    )
    settings = {"std_eps": 1e-9, "scale": "group"}
    got, equal = advantages(rewards, np.ones(3), np.ones(9, bool), 3, **settings, total="normalised")
    # 1 - 1/sqrt 3 - 2/sqrt 3 = -0.7320508 and its opposite, over the deviation of all nine totals.
    assert got[0] < -0.1 and np.isclose(got[0], -got[1]) and equal.tolist() == [False, False, True]
    got, equal = advantages(rewards, np.ones(3), np.ones(9, bool), 3, **settings, total="raw")
    assert not got[:3].any() and equal.tolist() == [True, False, True]


@pytest.mark.parametrize("scale, total", [("group", "raw"), ("batch", "raw"), ("none", "raw"), ("group", "normalised")])
def test_a_group_without_rewards_leaves_the_others_as_they_are(scale, total):
    rewards = np.array([[1.0], [3.0], [99.0], [77.0]])
    settings = {"std_eps": 1e-4, "scale": scale, "total": total}
    alone, _ = advantages(rewards[:2], np.ones(1), np.ones(2, bool), 2, **settings)
    got, equal = advantages(rewards, np.ones(1), np.array([1, 1, 0, 0], bool), 2, **settings)
    np.testing.assert_allclose(got, [*alone, 0, 0], rtol=1e-6)
    assert equal.tolist() == [False, True] and alone[0] < -0.5


def test_rewards_too_large_for_a_number_are_not_hidden():
    with np.errstate(over="ignore", invalid="ignore"):
        got, _ = advantages(np.array([[1e308], [0.0]]), np.array([10.0]), np.ones(2, bool), 2, std_eps=1e-4)
    assert np.isnan(got).any()
