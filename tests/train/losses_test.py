"""The objective on cases worked out by hand, and by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwenla_jax.train.losses import brpo_loss, group_advantages, k3

SETTINGS = {"beta": 0.1, "clip_low": 0.2, "clip_high": 0.2}


def loss_of(logp, old, ref, adv, mask, **changes):
    arrays = [np.asarray(x, np.float32) for x in (logp, old, ref, adv, mask)]
    return brpo_loss(*arrays, **(SETTINGS | changes))


@pytest.mark.parametrize(
    "ratio, advantage, want",
    [
        (1.5, 2.0, 1.2 * 2),  # above the clip, good: clipped
        (0.5, 2.0, 0.5 * 2),  # below the clip, good: not clipped
        (1.5, -2.0, 1.5 * -2),  # above, bad: not clipped
        (0.5, -2.0, 0.8 * -2),  # below, bad: clipped
        (1.0, 3.0, 3.0),
    ],
)
def test_clipping(ratio, advantage, want):
    logp = [[np.log(ratio)]]
    loss, sums = loss_of(logp, [[0.0]], logp, [advantage], [[1.0]])
    np.testing.assert_allclose(loss, -want, rtol=1e-6)
    assert float(sums["clip_high"]) == (ratio > 1.2 and advantage > 0)
    assert float(sums["clip_low"]) == (ratio < 0.8 and advantage < 0)
    grad = jax.grad(lambda x: loss_of_array(x, advantage))(jnp.asarray(np.log(ratio), jnp.float32))
    clipped = (ratio > 1.2 and advantage > 0) or (ratio < 0.8 and advantage < 0)
    np.testing.assert_allclose(grad, 0.0 if clipped else -ratio * advantage, rtol=1e-6)


def loss_of_array(x, advantage):
    one = jnp.ones((1, 1))
    return brpo_loss(x * one, 0 * one, 0 * one, advantage * one[0], one, **(SETTINGS | {"beta": 0.0}))[0]


def test_kl_is_k3():
    logp, ref = -1.25, -1.0
    want = np.exp(ref - logp) - (ref - logp) - 1
    np.testing.assert_allclose(k3(jnp.float32(logp), jnp.float32(ref)), want, rtol=1e-6)
    loss, sums = loss_of([[logp]], [[logp]], [[ref]], [0.0], [[1.0]])
    np.testing.assert_allclose(loss, 0.1 * want, rtol=1e-6)
    np.testing.assert_allclose(sums["kl"], want, rtol=1e-6)


def test_k3_keeps_its_digits_near_zero():
    """d^2 / 2 to leading order; exp(d) - d - 1 in float32 would give 0 or noise."""
    d = np.float32(2.0**-14)
    np.testing.assert_allclose(k3(jnp.float32(0), jnp.float32(d)), d**2 / 2 + d**3 / 6, rtol=1e-4)


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


def test_finite_differences():
    rng = np.random.default_rng(0)
    logp, old, ref = (rng.normal(size=(3, 4)) * 0.1 - 1 for _ in range(3))
    adv, mask = rng.normal(size=3), (np.arange(4) < np.array([[4], [2], [1]])).astype(np.float64)
    with jax.enable_x64(True):
        args = [jnp.asarray(x, jnp.float64) for x in (old, ref, adv, mask)]
        value = lambda x: brpo_loss(x, *args, **SETTINGS)[0]  # noqa: E731
        grad = jax.grad(value)(jnp.asarray(logp, jnp.float64))
        for index in np.ndindex(3, 4):
            step = np.zeros((3, 4))
            step[index] = 1e-3
            want = (value(jnp.asarray(logp + step)) - value(jnp.asarray(logp - step))) / 2e-3
            np.testing.assert_allclose(grad[index], want, atol=3e-4)


def test_advantages():
    rewards = np.array([[1.0, 2.0, 3.0, 2.0], [0.5, 0.5, 0.5, 0.5]])
    got = group_advantages(rewards, 1e-4)
    std = np.sqrt((1 + 0 + 1 + 0) / 3)
    np.testing.assert_allclose(got[0], np.array([-1, 0, 1, 0]) / (std + 1e-4), rtol=1e-6)
    assert not got[1].any()
