from resformer.train.flags import spiked


def test_a_spike_is_far_above_the_steps_before_it_and_not_at_the_start():
    calm = [1.0 + 0.5 * (i % 3) for i in range(120)]
    assert not spiked(calm)
    assert not spiked([30.0, *calm[1:]]), "gradients at the start are often large"
    assert spiked([*calm[:100], 16.0, *calm[101:]])
    assert not spiked([*calm[:100], 14.0, *calm[101:]]), "less than ten times the median of 1.5"
    assert not spiked([*calm[:100], float("inf"), *calm[101:]]), "that is a divergence"
    assert spiked([1.3**i for i in range(60)]), "a gradient that grows fast"
    assert not spiked([1.1**i for i in range(60)])
