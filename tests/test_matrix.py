"""What holds for every method, on every class of site and family of models.

One row a method in `METHODS`, one column a model of `zoo`; the rows of a new
method are the proof that it keeps the contract.
"""

import keras
import numpy as np
import pytest

import keras_randadapt as kra
from keras_randadapt.sites import lanes
from keras_randadapt.sites import supported
from keras_randadapt.sites.kernel_site import KernelSite
from tests import rotation
from tests import zoo

# What is trained here is trained in front of a random head on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:The head of task:keras_randadapt.AdapterWarning"
)

#: Templates with ranks that fit the smallest kernels of the zoo.
METHODS = {
    "lora": lambda seed=0: kra.LoRA(2, alpha=3, seed=seed),
    "lora_pissa": lambda seed=0: kra.LoRA(2, initialization="pissa", seed=seed),
    "rmlora": lambda seed=0: kra.RMLoRA(2, alpha=3, seed=seed),
    "rlora": lambda seed=0: kra.RLoRA(5, scaling=2.0, seed=seed),
    "rlora_stacked": lambda seed=0: kra.RLoRA(23, seed=seed),
    "randlora": lambda seed=0: kra.RandLoRA(3, seed=seed),
    "randlora_gaussian": lambda seed=0: kra.RandLoRA(
        2, basis="gaussian", compute="factored", seed=seed
    ),
    "randlora_sparse": lambda seed=0: kra.RandLoRA(
        3, basis="sparse", compute="materialized", seed=seed
    ),
    "randlora_very_sparse": lambda seed=0: kra.RandLoRA(
        3, basis="very_sparse", compute="factored", seed=seed
    ),
    "randlora_hadamard": lambda seed=0: kra.RandLoRA(
        3, basis="hadamard", compute="materialized", seed=seed
    ),
    "randlora_averaged": lambda seed=0: kra.RandLoRA(
        3, variant="averaged", rescale="none", seed=seed
    ),
    "randlora_half": lambda seed=0: kra.RandLoRA(2, variant="half", seed=seed),
    "adalora": lambda seed=0: kra.AdaLoRA(2, alpha=3, seed=seed),
    "bitfit": lambda seed=0: kra.BitFit(),
    "bottleneck": lambda seed=0: kra.Bottleneck(3, scaling=2.0, seed=seed),
    "bottleneck_parallel": lambda seed=0: kra.Bottleneck(
        3, placement="parallel", activation="gelu", seed=seed
    ),
    "ia3": lambda seed=0: kra.IA3(),
    "ia3_feedforward": lambda seed=0: kra.IA3(feedforward=["site"]),
    "fourierft": lambda seed=0: kra.FourierFT(5, scaling=20.0, seed=seed),
    "hira": lambda seed=0: kra.HiRA(2, scaling=1.5, seed=seed),
    "hydra": lambda seed=0: kra.Hydra(
        2, sequential_rank=3, scaling=1.5, seed=seed
    ),
    "dora": lambda seed=0: kra.DoRA(kra.LoRA(2, alpha=3, seed=seed)),
    "dora_full_gradient": lambda seed=0: kra.DoRA(
        kra.LoRA(2, seed=seed), detach_norm=False
    ),
    "dvora": lambda seed=0: kra.DoRA(kra.VeRA(7, scaling=5.0, seed=seed)),
    "dora_rlora": lambda seed=0: kra.DoRA(kra.RLoRA(5, scaling=2.0, seed=seed)),
    "dora_randlora": lambda seed=0: kra.DoRA(kra.RandLoRA(3, seed=seed)),
    "dora_fourierft": lambda seed=0: kra.DoRA(
        kra.FourierFT(5, scaling=20.0, seed=seed)
    ),
    "dora_loha": lambda seed=0: kra.DoRA(kra.LoHa(2, seed=seed)),
    "dora_lokr": lambda seed=0: kra.DoRA(kra.LoKr(1, seed=seed)),
    "dora_miss": lambda seed=0: kra.DoRA(kra.MiSS(3, seed=seed)),
    "dora_dylora": lambda seed=0: kra.DoRA(kra.DyLoRA(2, seed=seed)),
    "dylora": lambda seed=0: kra.DyLoRA(2, alpha=3, seed=seed),
    "loha": lambda seed=0: kra.LoHa(2, scaling=2.0, seed=seed),
    "loha_tucker": lambda seed=0: kra.LoHa(2, tucker=True, seed=seed),
    "lokr": lambda seed=0: kra.LoKr(1, scaling=2.0, seed=seed),
    "lokr_full": lambda seed=0: kra.LoKr(9, factor=2, seed=seed),
    "lokr_tucker": lambda seed=0: kra.LoKr(
        1, decompose_both=True, tucker=True, seed=seed
    ),
    "lorafa": lambda seed=0: kra.LoRAFA(2, alpha=3, seed=seed),
    "lorafa_hadamard": lambda seed=0: kra.LoRAFA(
        2, basis="hadamard", seed=seed
    ),
    "miss": lambda seed=0: kra.MiSS(3, scaling=2.0, seed=seed),
    "miss_repeated": lambda seed=0: kra.MiSS(3, output_rank=4, seed=seed),
    "oft": lambda seed=0: kra.OFT(8, seed=seed),
    "oft_shared": lambda seed=0: kra.OFT(8, share_blocks=True, seed=seed),
    "nola": lambda seed=0: kra.NOLA(2, num_bases=5, seed=seed),
    "shira": lambda seed=0: kra.SHiRA(1, scaling=2.0, seed=seed),
    "shira_magnitude": lambda seed=0: kra.SHiRA(1, mask="magnitude", seed=seed),
    "shira_structured": lambda seed=0: kra.SHiRA(
        2, mask="structured", seed=seed
    ),
    "dora_shira": lambda seed=0: kra.DoRA(kra.SHiRA(1, seed=seed)),
    "said": lambda seed=0: kra.SAID(7, seed=seed),
    "sora": lambda seed=0: kra.SoRA(2, alpha=3, seed=seed),
    "vera": lambda seed=0: kra.VeRA(7, scaling=5.0, seed=seed),
    "vera_sparse": lambda seed=0: kra.VeRA(
        20, basis="sparse", scaling=5.0, seed=seed
    ),
    "vera_hadamard": lambda seed=0: kra.VeRA(
        7, basis="hadamard", scaling=5.0, seed=seed
    ),
}
#: The method that meets every model in `make test`. Those of the library's
#: heart meet the models of `_CORE` there, all others those of `_BRIEF`, and
#: all of them the rest in `make test-full`. The heart on `dense` and LoRA on
#: experts and on the families of models run on every backend, any other case on
#: one.
_EVERYWHERE = {"lora"}
_HEART = {"rlora", "randlora", "rmlora"}
_BRIEF = {"dense", "embedding"}
_CORE = _BRIEF | {
    "bert_classifier",
    "dense_int8",
    "conv2d_grouped",
    "einsum_query",
    "einsum_shared",
    "reversible_embedding",
    "functional",
    "experts",
}
#: Other models add nothing: these methods share all but their formula with
#: LoRA, RLoRA and RandLoRA, or are a second configuration of one.
_ONLY = {
    "rlora_stacked": {"dense", "einsum_gemma", "embedding", "bert"},
    "randlora_gaussian": {"dense", "embedding"},
    "randlora_sparse": {"dense_int8", "einsum_gemma", "embedding", "bert"},
    "randlora_very_sparse": {"dense", "einsum_output"},
    "randlora_hadamard": {"dense", "einsum_output", "embedding"},
    "randlora_averaged": {"dense", "einsum_query"},
    "randlora_half": {"dense", "einsum_output"},
    "vera": _CORE,
    "adalora": _CORE,
    "dora": _CORE,
    "dora_full_gradient": {"dense", "einsum_shared"},
    "dvora": {"dense", "einsum_query", "dense_int8", "bert_classifier"},
    "dora_rlora": {"dense", "einsum_query", "conv2d_grouped"},
    "dora_randlora": {"dense", "dense_int8", "bert_classifier"},
    "dora_fourierft": {"einsum_query"},
    "dora_loha": {"dense"},
    "dora_lokr": {"einsum_query"},
    "dora_miss": {"einsum_query"},
    "dora_dylora": {"dense", "conv2d_grouped"},
    "dylora": _CORE,
    "loha": _CORE,
    "loha_tucker": {"dense", "conv1d", "conv2d_grouped"},
    "lokr": _CORE,
    "lokr_full": {"dense", "embedding", "conv2d_grouped"},
    "lokr_tucker": {"dense", "conv1d", "conv2d_grouped"},
    "lorafa": _CORE,
    "lorafa_hadamard": {"dense", "embedding"},
    "lora_pissa": {"dense", "dense_int8", "einsum_query", "embedding"},
    "bitfit": _CORE | {"gpt2", "sequential"},
    "bottleneck": _CORE | {"einsum_output", "gpt2", "sequential"},
    "bottleneck_parallel": {"dense", "einsum_query", "gpt2", "dense_int8"},
    "fourierft": _CORE,
    "hira": _CORE | {"einsum_output"},
    "hydra": _CORE | {"einsum_output"},
    "ia3": _CORE | {"einsum_output", "gpt2", "sequential"},
    "ia3_feedforward": {
        "dense",
        "dense_int8",
        "conv2d_grouped",
        "einsum_query",
    },
    "miss": _CORE,
    "miss_repeated": {"dense"},
    "nola": _CORE,
    "oft": _CORE | {"einsum_output"},
    "oft_shared": {"dense", "einsum_output"},
    "shira": _CORE,
    "shira_magnitude": {"dense", "dense_int8", "conv2d_grouped"},
    "shira_structured": {"dense"},
    "dora_shira": {"einsum_query"},
    "said": _CORE,
    "sora": _CORE,
    "vera_sparse": {"dense", "embedding"},
    "vera_hadamard": {"einsum_gemma", "embedding"},
}

#: The models that meet every method all the same: their sites came later, and
#: not all of what they share with others is shared code.
_WITH_ALL = {
    "conv_depthwise_1d",
    "conv_depthwise_2d",
    "conv_transpose_1d",
    "conv_transpose_2d",
    "conv_transpose_3d",
    "conv_separable",
    "lstm",
    "gru",
    "position_embedding",
    "experts",
}


#: Models whose site has no bias.
_WITHOUT_BIAS = {
    "dense_no_bias",
    "einsum_gemma",
    "einsum_xlnet",
    "conv2d_dilated",
    "conv_transpose_2d",
    "gru",
    "llama",
}

#: Models whose site has a bias of fewer numbers than columns.
_SHORT_BIAS = {"conv_transpose_1d", "conv_transpose_3d"}


#: Models whose site is no matrix product of its inputs.
_NO_MATRIX_PRODUCT = {"einsum_shared", "einsum_summed", "lstm", "gru"}


def _is_refused(method, model):
    """Whether a method declares that it does not take this model's sites."""
    template = METHODS[method]()
    if template.adapts_output and model in _NO_MATRIX_PRODUCT:
        return True
    if template.adapts_bias and not template.adapts_kernel:
        if model in _WITHOUT_BIAS:
            return True
    if isinstance(template, kra.Hydra) and model in _SHORT_BIAS:
        return True
    if model == "experts" and not template.adapts_kernel:
        return True
    kind = "product"
    if "embedding" in model:
        kind = "lookup"
    elif model.startswith("conv"):
        kind = "convolution"
    return kind not in template.site_kinds


def _cells():
    """Every case, `(method, model)`, and whether `make test` runs it."""
    for method in METHODS:
        for model in zoo.ALL:
            if _is_refused(method, model):
                continue
            if model not in {*_ONLY.get(method, zoo.ALL), *_WITH_ALL}:
                continue
            quick = model in (_CORE if method in _HEART else _BRIEF)
            yield (method, model), quick or method in _EVERYWHERE


def _on_every_backend(method, model):
    if model == "dense":
        return method in _HEART | _EVERYWHERE
    return method in _EVERYWHERE and model in {*zoo.MODELS, "experts"}


def _cases():
    cells = dict(_cells())
    alone = [cell for cell in cells if not _on_every_backend(*cell)]
    # Quick cases first, so that they are spread evenly by themselves.
    numbers = rotation.spread(sorted(alone, key=lambda cell: not cells[cell]))
    for cell, quick in cells.items():
        marks = [] if quick else [pytest.mark.slow]
        if cell[1] == "dense" and cell not in numbers:
            # As users run the library's heart.
            marks.append(pytest.mark.needs_optimizer)
        if cell in numbers:
            marks.append(pytest.mark.one_backend(numbers[cell]))
        yield pytest.param(cell, id="-".join(cell), marks=marks)


class Case:
    """A model adapted and trained once; tests put back what they change."""

    def __init__(self, method, model_name, folder):
        self.method = method
        self.builder = zoo.ALL[model_name]
        self.quantized = model_name in zoo.QUANTIZED
        self.kept = ["logits"] if model_name == "bert_classifier" else None
        self.model, self.x, self.targets = self.builder()
        self.base = zoo.outputs(self.model, self.x)
        self.variables = list(self.model.variables)
        self.before = zoo.snapshot(self.model)
        self.classes = self._classes()
        self.flags = [v.trainable for v in self.variables]
        self.report = self.inject()
        self.at_init = zoo.outputs(self.model, self.x)
        self.adapter_at_init = self._trained_values()
        zoo.fit(self.model, self.x)
        self.after_fit = zoo.snapshot(self.model)
        self.trained_values = self._trained_values()
        # Three small steps barely move an int4 model: make sure that there
        # is something to save, merge and switch.
        zoo.randomize(self.model)
        self.out = zoo.outputs(self.model, self.x)
        self.file = folder / "adapter.safetensors"
        kra.save_adapter(self.model, self.file)

    def inject(self, seed=0, **kwargs):
        return kra.inject(
            self.model,
            METHODS[self.method](seed),
            self.targets,
            keep_trainable=self.kept,
            **kwargs,
        )

    @property
    def mergeable(self):
        return METHODS[self.method]().mergeable

    def check_merged(self, merged):
        if self.quantized:
            # Quantized anew: nearer to the adapted model than to the base.
            error = np.abs(merged - self.out).mean()
            assert error < 0.7 * np.abs(self.base - self.out).mean()
        else:
            close(merged, self.out, 1e-5)

    def restore(self):
        if kra.sites(self.model):
            kra.eject(self.model)
        for variable, (_, value) in zip(self.variables, self.before.values()):
            variable.assign(value)
        kra.load_adapter(self.model, self.file)

    def _classes(self):
        return [type(x) for x in self.model._flatten_layers()]

    def _trained_values(self):
        return {
            v.path: np.array(keras.ops.convert_to_numpy(v))
            for v in self.model.trainable_variables
        }


@pytest.fixture(scope="module", params=_cases())
def case(request, tmp_path_factory):
    # Of module scope, so that pytest runs all tests of a case in a row.
    keras.utils.set_random_seed(0)
    folder = tmp_path_factory.mktemp("-".join(request.param))
    return Case(*request.param, folder)


def close(a, b, tolerance=1e-5):
    np.testing.assert_allclose(
        a, b, rtol=tolerance, atol=tolerance * max(1.0, np.abs(b).max())
    )


class TestMatrix:
    def test_no_op_at_init(self, case):
        close(case.at_init, case.base, 1e-6)

    def test_fit_trains_adapters_and_nothing_else(self, case):
        trained = set(case.trained_values)
        assert trained
        for path, value in case.trained_values.items():
            assert np.any(value != case.adapter_at_init[path]), path
        adapters = [p for p in trained if "/adapter/default/" in p]
        assert len(trained) == len(adapters) + (2 if case.kept else 0)
        kept = {"logits/kernel", "logits/bias"} if case.kept else set()
        for key, (path, value) in case.before.items():
            # State of dropout and of methods that draw anew in every step.
            if path in kept or "seed_generator" in path:
                continue
            np.testing.assert_array_equal(
                case.after_fit[key][1], value, err_msg=path
            )

    def test_adapter_changes_outputs(self, case):
        assert np.abs(case.out - case.base).max() > 1e-3

    def test_disabled_is_base(self, case):
        with kra.disabled(case.model):
            close(zoo.outputs(case.model, case.x), case.base, 1e-6)
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)

    def test_predict_is_call(self, case):
        y = keras.tree.flatten(case.model.predict(case.x, verbose=0))
        flat = np.concatenate([np.ravel(part) for part in y])
        close(flat, case.out, 1e-4)

    def test_merged_block(self, case):
        before = zoo.snapshot(case.model)
        if not case.mergeable:
            with pytest.raises(ValueError, match="can't be merged"):
                with kra.merged(case.model):
                    pytest.fail("merged what can't be")
            np.testing.assert_array_equal(
                zoo.outputs(case.model, case.x), case.out
            )
            return
        with kra.merged(case.model):
            merged = zoo.outputs(case.model, case.x)
        case.check_merged(merged)
        after = zoo.snapshot(case.model)
        for key, (path, value) in before.items():
            np.testing.assert_array_equal(after[key][1], value, err_msg=path)
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)

    def test_merge(self, case):
        if not case.mergeable:
            with pytest.raises(ValueError, match="can't be merged"):
                kra.merge(case.model)
            np.testing.assert_array_equal(
                zoo.outputs(case.model, case.x), case.out
            )
            return
        assert kra.merge(case.model) is case.model
        merged = zoo.outputs(case.model, case.x)
        assert kra.sites(case.model) == {}
        assert case._classes() == case.classes
        case.restore()
        case.check_merged(merged)

    def test_eject_restores_bit_for_bit(self, case):
        kra.eject(case.model)
        assert case._classes() == case.classes
        assert [id(v) for v in case.model.variables] == [
            id(v) for v in case.variables
        ]
        assert [v.trainable for v in case.variables] == case.flags
        after = zoo.snapshot(case.model)
        for key, (path, value) in case.before.items():
            if "seed_generator" in path:
                continue
            np.testing.assert_array_equal(after[key][1], value, err_msg=path)
        np.testing.assert_array_equal(
            zoo.outputs(case.model, case.x), case.base
        )
        case.restore()

    def test_save_and_load_under_another_global_seed(self, case):
        kra.eject(case.model)
        keras.utils.set_random_seed(99)
        np.random.seed(99)
        kra.load_adapter(case.model, case.file)
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)

    def test_file_is_small_and_of_the_reported_size(self, case):
        trained = case.report.adapter_parameters + case.report.head_parameters
        size = case.file.stat().st_size
        assert size == case.report.file_bytes
        assert size <= 4 * trained + 200 * len(case.report.sites) + 4096

    def test_second_adapter_leaves_the_first_alone(self, case, tmp_path):
        case.inject(seed=7, name="b")
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)
        zoo.randomize(case.model, "b", seed=5)
        kra.save_adapter(case.model, tmp_path / "b", name="b")
        kra.set_active(case.model, "b")
        of_b = zoo.outputs(case.model, case.x)
        assert np.abs(of_b - case.out).max() > 1e-3
        kra.eject(case.model, "b")
        kra.set_active(case.model, "default")
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)
        kra.load_adapter(case.model, tmp_path / "b")
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)
        kra.set_active(case.model, "b")
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), of_b)
        kra.eject(case.model, "b")
        kra.set_active(case.model, "default")

    # A case's adapters have been attached anew since `fit`, and its optimizer
    # has not been used since then.
    @pytest.mark.filterwarnings(
        "ignore:Skipping variable loading for optimizer:UserWarning",
        "ignore:.* starts afresh:keras_randadapt.AdapterWarning",
    )
    def test_whole_model_file(self, case, tmp_path):
        case.model.save(tmp_path / "model.keras")
        loaded = keras.models.load_model(tmp_path / "model.keras")
        assert list(kra.sites(loaded)) == list(kra.sites(case.model))
        np.testing.assert_allclose(
            zoo.outputs(loaded, case.x), case.out, rtol=1e-6, atol=1e-6
        )
        with kra.disabled(loaded):
            close(zoo.outputs(loaded, case.x), case.base, 1e-6)

    def test_weights_file_loads_with_and_without_adapters(self, case, tmp_path):
        path = tmp_path / "adapted.weights.h5"
        case.model.save_weights(path)
        fresh, _, _ = case.builder()
        fresh.load_weights(path)
        if not case.kept:
            close(zoo.outputs(fresh, case.x), case.base, 1e-6)
        zoo.randomize(case.model, seed=3)
        case.model.load_weights(path)
        np.testing.assert_array_equal(zoo.outputs(case.model, case.x), case.out)

    def test_failed_inject_leaves_no_trace(self, case):
        kra.eject(case.model)
        for arguments in (
            {"targets": ["no_such_layer"]},
            {"targets": case.targets, "name": "no/name"},
            {"targets": case.targets, "keep_trainable": "no_such_layer"},
        ):
            with pytest.raises(ValueError):
                kra.inject(case.model, METHODS[case.method](), **arguments)
        with pytest.raises(ValueError, match="`rank` must be at most"):
            kra.inject(case.model, kra.LoRA(10_000), case.targets)
        assert case._classes() == case.classes
        assert "_randadapt" not in vars(case.model)
        assert [id(v) for v in case.model.variables] == [
            id(v) for v in case.variables
        ]
        assert [v.trainable for v in case.variables] == case.flags
        case.restore()

    def test_kernel_shows_base_plus_delta(self, case):
        # The view of the delta is what `merge` and exporters rely on.
        adapters = case.model._randadapt.adapters("default")
        if case.builder is zoo.experts:
            self._check_experts(case, adapters)
            return
        for address in kra.sites(case.model):
            # A layer with several kernels has a site for each.
            layer = case.model._randadapt.layers[address]
            adapter = adapters[address]
            if adapter.adapts_bias:
                self._check_bias(layer, adapter)
            if layer.kind == "norm":
                continue
            if not case.mergeable:
                with pytest.raises(ValueError, match="would miss it"):
                    adapter.merged(layer._kernel, layer._kernel)
                continue
            if not adapter.additive:
                if not case.quantized:
                    kernel = supported.kernel_variable(layer)
                    kernel = layer.to_view(kernel)
                    self._check(layer, adapter.merged(kernel, kernel))
                continue
            delta = adapter.delta_kernel()
            assert tuple(delta.shape) == tuple(layer.kernel_view)
            assert keras.backend.standardize_dtype(delta.dtype) == "float32"
            if case.quantized or "embedding" in case.builder.__name__:
                continue
            kernel = layer.to_view(supported.kernel_variable(layer))
            self._check(layer, kernel + delta)

    def _check_experts(self, case, adapters):
        """Each expert has an update of its own, and NumPy agrees with it."""
        kernels = []
        for address, adapter in adapters.items():
            site = case.model._randadapt.layers[address]
            found = []
            base = zoo.numpy(site._kernel)
            for kernel, lane in zip(base, lanes.each(adapter), strict=True):
                if adapter.additive:
                    delta = lane.delta_kernel()
                    assert tuple(delta.shape) == tuple(site.kernel_view)
                    found.append(kernel + zoo.numpy(delta))
                else:
                    kernel = keras.ops.convert_to_tensor(kernel)
                    found.append(zoo.numpy(lane.merged(kernel, kernel)))
            kernels.append(np.stack(found))
            close(zoo.numpy(site.merged_kernel()), kernels[-1], 1e-6)
            deltas = kernels[-1] - base
            assert np.abs(deltas[0] - deltas[1]).max() > 1e-5
        expected = zoo.experts_outputs(case.model, case.x, *kernels)
        close(case.out, np.ravel(expected), 1e-5)

    def _check_bias(self, layer, adapter):
        bias = supported.bias_variable(layer)
        if bias is None:
            return
        base = layer.bias_to_view(bias)
        merged = layer.bias_from_view(adapter.merged_bias(base, base))
        assert np.abs(keras.ops.convert_to_numpy(merged - bias)).max() > 1e-4
        close(
            keras.ops.convert_to_numpy(layer.merged_bias()),
            keras.ops.convert_to_numpy(merged),
            1e-6,
        )

    def _check(self, layer, view):
        several = isinstance(layer, KernelSite)
        shown = layer.merged_kernel() if several else layer.kernel
        close(
            keras.ops.convert_to_numpy(shown),
            keras.ops.convert_to_numpy(layer.from_view(view)),
            1e-6,
        )


@pytest.mark.parametrize(
    "method, model",
    [
        pytest.param(
            m,
            z,
            marks=[]
            if z in ("embedding", "dense_no_bias")
            else pytest.mark.slow,
        )
        for m in METHODS
        for z in zoo.ALL
        if _is_refused(m, z)
    ],
)
def test_what_a_method_does_not_take(method, model):
    """Declared in its class, refused by `inject`, and no trace is left."""
    model, x, targets = zoo.ALL[model]()
    before = zoo.outputs(model, x)
    with pytest.raises(
        ValueError,
        match="does not adapt a|has a bias to|of matrix products|by default"
        "|has a bias of",
    ):
        kra.inject(model, METHODS[method](), targets)
    assert kra.sites(model) == {}
    np.testing.assert_array_equal(zoo.outputs(model, x), before)


@pytest.mark.one_backend
@pytest.mark.parametrize(
    "method",
    [m for m in METHODS if not _is_refused(m, "conv2d_grouped")],
)
def test_convolution_of_16_bits(method):
    """Where base and delta are computed apart; the merged kernel agrees."""
    x = zoo.normal(2, 5, 5, 4)
    inputs = keras.Input(x.shape[1:])
    layer = keras.layers.Conv2D(
        6, 3, groups=2, dtype="mixed_bfloat16", name="site"
    )
    model = zoo.set_weights(keras.Model(inputs, layer(inputs)))
    base = zoo.outputs(model, x)
    kra.inject(model, METHODS[method](), "site")
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    assert np.abs(out - base).max() > 1e-2
    kra.merge(model)
    close(zoo.outputs(model, x), out, 3e-2)


@pytest.mark.skipif(
    keras.config.backend() == "torch",
    reason="Keras exports no SavedModel from the torch backend",
)
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(m, marks=[] if m in _HEART else pytest.mark.slow)
        for m in METHODS
    ],
)
def test_saved_model(method, tmp_path):
    """What is exported needs neither Keras nor this library."""
    import tensorflow as tf

    model, x, targets = zoo.dense()
    kra.inject(model, METHODS[method](), targets)
    zoo.randomize(model)
    out = zoo.outputs(model, x)
    model.export(tmp_path / "saved", verbose=False)
    # Kept: its variables live as long as it does.
    loaded = tf.saved_model.load(tmp_path / "saved")
    close(np.ravel(loaded.serve(x).numpy()), out, 1e-5)
