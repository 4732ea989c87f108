"""The training recipe of the papers."""

import keras
import numpy as np
import pytest
import recipe
from keras import ops

pytestmark = pytest.mark.one_backend


class TestRecipe:
    @pytest.mark.every_backend
    @pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
    def test_label_smoothing(self, smoothing):
        generator = np.random.default_rng(0)
        logits = generator.normal(size=(3, 4, 5))
        labels = generator.integers(0, 5, (3, 4))
        logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        targets = (1 - smoothing) * np.eye(5)[labels] + smoothing / 5
        loss = recipe.SmoothedCrossentropy(smoothing)
        np.testing.assert_allclose(
            float(loss(labels, logits.astype("float32"))),
            -np.mean(np.sum(targets * logs, axis=-1)),
            rtol=1e-5,
        )

    @pytest.mark.every_backend
    def test_warm_up(self):
        schedule = recipe.LinearWarmup(0.4, 4, 10)
        found = [float(ops.convert_to_numpy(schedule(t))) for t in range(12)]
        rise = [0.1, 0.2, 0.3, 0.4]
        fall = [0.4 * left / 6 for left in (6, 5, 4, 3, 2, 1, 0, 0)]
        np.testing.assert_allclose(found, rise + fall, atol=1e-6)
        alone = recipe.LinearWarmup(1.0, 0, 4)
        found = [float(ops.convert_to_numpy(alone(t))) for t in range(5)]
        np.testing.assert_allclose(found, [1, 0.75, 0.5, 0.25, 0])

    def test_it_trains_and_is_serialized(self):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(4)])
        optimizer = keras.optimizers.AdamW(recipe.LinearWarmup(0.1, 2, 6))
        model.compile(optimizer, recipe.SmoothedCrossentropy(0.2))
        x = np.ones((4, 3), "float32")
        model.fit(x, np.array([0, 1, 2, 3]), epochs=2, verbose=0)
        loss = recipe.SmoothedCrossentropy(0.2)
        assert type(loss).from_config(loss.get_config()).smoothing == 0.2
        schedule = recipe.LinearWarmup(0.1, 2, 6)
        clone = recipe.LinearWarmup.from_config(schedule.get_config())
        assert (clone.rate, clone.warmup, clone.steps) == (0.1, 2, 6)

    def test_errors(self):
        with pytest.raises(ValueError, match="`warmup` must be"):
            recipe.LinearWarmup(0.1, 5, 5)
        with pytest.raises(ValueError, match="`smoothing` must be"):
            recipe.SmoothedCrossentropy(1.0)
