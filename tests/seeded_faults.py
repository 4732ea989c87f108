"""Shows how many faults a suite of tests finds: it seeds one at a time.

    python tests/seeded_faults.py [--suite DIR] [--package DIR] [--results FILE]
        [--only NAME ...] [--check] [--baseline]

Each fault of `FAULTS` changes one place in one function of the package, as a
slip of the pen would. The tests that reach it run on the changed package, most
specific first, until one of them fails: the fault is found. What no test
notices is missed. A suite that is cut finds as many as before, or the cut was
too deep: run both suites on one package and compare.

The package and the tests are copied to a temporary folder, where only the file
with the fault changes. Results are written after each fault, and a run that was
broken off goes on where it was. Tests that fail without a fault would find them
all: `--baseline` looks for such. Slow tests are left out.

Not a test: pytest does not collect it. It took 45 minutes on two busy cores.
"""

import argparse
import ast
import hashlib
import json
import os
import pathlib
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = "keras_randadapt"
#: Seconds that one selection may take.
LIMIT = 1200


class Fault(typing.NamedTuple):
    """One place where the package is made wrong.

    Attributes:
        name: What the fault is called.
        kind: What sort of slip it is.
        path: The file in the package.
        function: The function or class in it, such as `"RLoRA.delta"`.
        old: What is replaced: it occurs once in that function.
        new: What replaces it.
        reach: Selections of tests that reach it, most specific first: files in
            `tests/`, with options of pytest.
        backend: The backend to run them on.
    """

    name: str
    kind: str
    path: str
    function: str
    old: str
    new: str
    reach: tuple[str, ...]
    backend: str = "torch"


FAULTS = [
    # Sites and kernel views.
    Fault(
        "view_by_position",
        "wrong axis",
        "sites/kernel_view.py",
        "EinsumPlan.__init__",
        "[kernel.index(a) for a in rows + columns]",
        "sorted(kernel.index(a) for a in rows + columns)",
        (
            "test_matrix.py -k 'lora and einsum_gemma'",
            "test_matrix.py -k 'lora and einsum'",
            "test_injection.py",
        ),
    ),
    Fault(
        "bias_axes_not_inverted",
        "transposition",
        "sites/kernel_view.py",
        "EinsumPlan.unflatten_bias",
        "_transpose(y, self._unflatten_y)",
        "_transpose(y, self._flatten_y)",
        ("test_hydra.py", "test_bitfit.py"),
    ),
    Fault(
        "convolution_bias_axis",
        "wrong axis",
        "sites/convolution.py",
        "activated",
        '-1 if layer.data_format == "channels_last" else 1',
        "-1",
        ("test_injection.py",),
    ),
    Fault(
        "convolution_dilation_lost",
        "dropped argument",
        "sites/convolution.py",
        "AdaptedConv._float_product",
        "dilation_rate=self.dilation_rate",
        "dilation_rate=1",
        ("test_matrix.py -k 'lora and conv'", "test_injection.py"),
    ),
    Fault(
        "transposed_view_by_position",
        "wrong axis",
        "sites/convolution.py",
        "AdaptedConvTranspose.to_view",
        "(last, *range(last))",
        "(*range(last), last)",
        ("sites/test_convolutions.py",),
    ),
    Fault(
        "table_not_shown",
        "dropped term",
        "sites/layer.py",
        "shown_kernel",
        "self._merged_or_base(vars(self)[name])",
        "vars(self)[name]",
        ("sites/test_tables.py",),
    ),
    Fault(
        "recurrent_bias_lost",
        "dropped term",
        "sites/recurrent.py",
        "AdaptedRecurrent.call",
        "if bias is not site.bias:",
        "if False:",
        ("sites/test_several_kernels.py -k bias",),
    ),
    Fault(
        "cells_train_too",
        "dropped term",
        "sites/recurrent.py",
        "AdaptedRecurrent.base_variables",
        " + _compat.owned_variables(self.cell)",
        "",
        ("sites/test_several_kernels.py -k training",),
    ),
    Fault(
        "quantized_activation_twice",
        "dropped condition",
        "sites/quantized_product.py",
        "_call",
        '"bias": None, "activation": None}',
        '"bias": None}',
        ("test_matrix.py -k 'lora and int8'", "test_injection.py"),
    ),
    Fault(
        "convolution_dropout_merged",
        "dropped condition",
        "sites/layer.py",
        "kernel_space_product",
        ' in ("float32", "float64") and not apart',
        ' in ("float32", "float64")',
        ("test_lora.py", "test_dylora.py"),
    ),
    Fault(
        "kernel_in_float32",
        "missing cast",
        "sites/layer.py",
        "AdaptedLayer._merged_or_base",
        "ops.cast(merged, self.compute_dtype)",
        "merged",
        ("test_injection.py",),
    ),
    Fault(
        "bias_that_is_read",
        "wrong variable",
        "sites/layer.py",
        "shown_bias",
        "bias = self.merged_bias()",
        "bias = own_bias(self)",
        ("test_bitfit.py",),
    ),
    Fault(
        "norm_in_sixteen_bits",
        "wrong dtype",
        "sites/normalization.py",
        "AdaptedNorm._dtype_of_shown_bias",
        "return own_bias(self).dtype",
        "return self.compute_dtype",
        ("test_bitfit.py",),
    ),
    Fault(
        "untied_head_adapted",
        "dropped condition",
        "sites/embedding.py",
        "AdaptedReversibleEmbedding._adapted_logits",
        "if self.tie_weights:",
        "if True:",
        ("test_matrix.py -k 'lora and reversible'", "test_injection.py"),
    ),
    Fault(
        "fold_passes_the_view_twice",
        "swapped argument",
        "sites/product.py",
        "fold",
        "adapter.merged(view, base, training)",
        "adapter.merged(view, view, training)",
        ("test_dora.py", "test_hydra.py", "test_injection.py"),
    ),
    Fault(
        "relayed_input_kept",
        "stale value",
        "sites/stack.py",
        "AdapterStack.forget",
        "relay.take()",
        "pass",
        ("test_bottleneck.py",),
    ),
    # Formulas of adapters.
    Fault(
        "rlora_input_gradient",
        "wrong gradient",
        "adapters/rlora.py",
        "RLoRA._expand_gradient",
        "pulled * alpha,",
        "pulled,",
        ("test_rlora.py",),
    ),
    Fault(
        "rlora_merge_without_scaling",
        "wrong scale",
        "adapters/rlora.py",
        "RLoRA.delta_kernel",
        'self._scaled_beta("float32")',
        "self._float(self.beta)",
        ("test_rlora.py", "test_matrix.py -k 'rlora and dense'"),
    ),
    Fault(
        "rlora_sites_share_bases",
        "dropped seed",
        "adapters/rlora.py",
        "RLoRA._basis",
        'f"RLoRA/{self.site.role}/{side}"',
        'f"RLoRA/{side}"',
        ("test_rlora.py",),
    ),
    Fault(
        "randlora_lambda_gradient",
        "wrong gradient",
        "adapters/mixing.py",
        "Mixing.gradients",
        "of_lambdas = ops.sum(",
        "of_lambdas = ops.mean(",
        ("test_randlora.py",),
    ),
    Fault(
        "randlora_dropout_merged",
        "dropped condition",
        "adapters/randlora.py",
        "RandLoRA.adapt",
        "kernel_to_change(linear, x, dropped)",
        "kernel_to_change(linear, x, False)",
        ("test_randlora.py",),
    ),
    Fault(
        "randlora_float16_underflow",
        "missing cast",
        "adapters/randlora.py",
        "RandLoRA._product",
        'standardize_dtype(x.dtype) == "float16"',
        'standardize_dtype(x.dtype) == "bfloat16"',
        ("test_randlora.py",),
    ),
    Fault(
        "rmlora_first_factor",
        "wrong scale",
        "adapters/rmlora.py",
        "RMLoRA._initializer_of_a",
        "math.sqrt(self.input_dim)",
        "math.sqrt(self.rank)",
        ("test_rmlora.py",),
    ),
    Fault(
        "rmlora_masks_of_one_seed",
        "dropped seed",
        "adapters/rmlora.py",
        "RMLoRA.wrap_optimizer",
        r"masks\n{self.seed}\n",
        r"masks\n",
        ("test_rmlora.py",),
    ),
    Fault(
        "rslora_divides_by_the_rank",
        "wrong scale",
        "arguments.py",
        "check_alpha",
        "math.sqrt(rank) if rslora else rank",
        "rank",
        ("test_lora.py",),
    ),
    Fault(
        "pissa_without_the_root",
        "wrong scale",
        "adapters/lora.py",
        "LoRA.start_from",
        "u[:, :rank] * root",
        "u[:, :rank] * s[:rank]",
        ("test_lora.py",),
    ),
    Fault(
        "pissa_factors_sign",
        "sign",
        "adapters/lora.py",
        "LoRA.factors",
        'self.lora_b, "float32") - self.start_b',
        'self.lora_b, "float32") + self.start_b',
        (
            "test_lora.py",
            "analysis/test_rank.py",
            "test_matrix.py -k lora_pissa",
        ),
    ),
    Fault(
        "site_rank_ignored",
        "stale value",
        "adapters/lora.py",
        "LoRA.for_site",
        "self.site_ranks.get(site.address, self.rank)",
        "self.rank",
        ("test_compaction.py",),
    ),
    Fault(
        "vera_scale_of_a",
        "wrong scale",
        "adapters/vera.py",
        "VeRA._scale_d",
        "self._dims[0]",
        "self._dims[1]",
        ("test_vera.py",),
    ),
    Fault(
        "dora_norm_without_cross_term",
        "wrong scale",
        "adapters/dora.py",
        "DoRA._square",
        "crossed = 2.0 * ops.sum(",
        "crossed = ops.sum(",
        ("test_dora.py",),
    ),
    Fault(
        "dora_direction_of_others",
        "swapped argument",
        "adapters/dora.py",
        "DoRA.adapt",
        "self.inner.adapt(x, linear.base, training)",
        "self.inner.adapt(x, linear, training)",
        ("test_dora.py",),
    ),
    Fault(
        "dylora_largest_rank_never_drawn",
        "off by one",
        "adapters/dylora.py",
        "DyLoRA.drawn_rank",
        "self.rank - self.min_rank + 1",
        "self.rank - self.min_rank",
        ("test_dylora.py",),
    ),
    Fault(
        "dylora_frozen_trains_all",
        "frozen flag",
        "adapters/dylora.py",
        "DyLoRA._scaled",
        "ops.equal(places, drawn - 1)",
        "ops.less(places, drawn)",
        ("test_dylora.py",),
    ),
    Fault(
        "adalora_penalty_lost",
        "missed regularizer",
        "adapters/adalora.py",
        "AdaLoRA.__init__",
        "regularizer=penalty if penalty.strength else None",
        "regularizer=None",
        ("test_adalora.py",),
    ),
    Fault(
        "nola_scaling_lost",
        "wrong scale",
        "adapters/nola.py",
        "NOLA._factors",
        "(scale * self.scaling)",
        "scale",
        ("test_nola.py",),
    ),
    Fault(
        "said_scale",
        "wrong scale",
        "adapters/said.py",
        "SAID.build",
        "self._order / self._size / square",
        "self._order / self.dim / square",
        ("test_said.py",),
    ),
    Fault(
        "negative_gates_left_out",
        "sign",
        "adapters/gated.py",
        "GatedLoRA.compacted",
        "np.flatnonzero(gate)",
        "np.flatnonzero(gate > 0)",
        ("test_compaction.py", "test_sora.py", "test_adalora.py"),
    ),
    Fault(
        "bitfit_without_norms",
        "dropped condition",
        "adapters/bitfit.py",
        "_with_bias",
        'or getattr(layer, "beta", None) is not None',
        "or False",
        ("test_bitfit.py",),
    ),
    Fault(
        "hydra_behind_other_adapters",
        "swapped argument",
        "adapters/hydra.py",
        "Hydra.adapt",
        "y if linear.base is linear else linear.base(x)",
        "y",
        ("test_hydra.py",),
    ),
    Fault(
        "hydra_bias_of_other_adapters",
        "swapped argument",
        "adapters/hydra.py",
        "Hydra.merged_bias",
        "ops.expand_dims(base, 0)",
        "ops.expand_dims(bias, 0)",
        ("test_hydra.py", "test_bitfit.py"),
    ),
    Fault(
        "lorafa_preconditioner",
        "wrong scale",
        "adapters/lorafa.py",
        "LoRAFA._inverse_gram",
        "self.scaling**2",
        "self.scaling",
        ("test_lorafa.py",),
    ),
    # What all adapters have in common.
    Fault(
        "first_values_of_one_site",
        "dropped seed",
        "adapters/variables.py",
        "AdapterVariables.add_trainable",
        'f"{self.site.address}/{name}"',
        "name",
        ("test_lora.py", "test_rmlora.py", "saving/test_whole_model.py"),
    ),
    Fault(
        "bases_not_shared",
        "stale value",
        "adapters/variables.py",
        "AdapterVariables.add_frozen",
        "shared[basis.key] = variable",
        "shared[name] = variable",
        ("test_vera.py", "test_randlora.py"),
    ),
    Fault(
        "step_count_in_files",
        "skipped check",
        "adapters/variables.py",
        "AdapterVariables.stored_weights",
        "left_out.add(id(layer.step_counter))",
        "pass",
        ("test_dylora.py",),
    ),
    Fault(
        "dropout_of_all_sites_is_one",
        "dropped seed",
        "adapters/variables.py",
        "AdapterVariables._prepare_dropout",
        "dropout/{self.seed}/{self.site.address}",
        "dropout/{self.seed}",
        ("test_lora.py",),
    ),
    Fault(
        "dropout_not_in_configs",
        "lost setting",
        "adapters/base.py",
        "Adapter.get_config",
        '{"seed": self.seed, "dropout": self.dropout}',
        '{"seed": self.seed}',
        ("test_rlora.py", "test_lora.py"),
    ),
    # Bases and frozen randomness.
    Fault(
        "first_rows_are_drawn",
        "off by one",
        "bases/randomized_hadamard.py",
        "_plans",
        "np.sort(chosen[:size])",
        "np.sort(chosen)[:size]",
        ("test_rlora.py",),
    ),
    Fault(
        "regenerated_chunks_overlap",
        "wrong index",
        "bases/regenerated.py",
        "RegeneratedUniform._correlate",
        "self._rows(i * n, n)",
        "self._rows(i, n)",
        ("bases/test_regenerated.py", "test_nola.py"),
    ),
    Fault(
        "sparse_rows_overloaded",
        "dropped condition",
        "bases/random_matrix.py",
        "SparseTernary._fill",
        "row is None or load[row] == capacity",
        "row is None",
        ("bases/test_random_matrix.py", "test_randlora.py"),
    ),
    Fault(
        "gradient_stops_at_the_head",
        "dropped call",
        "model/attach.py",
        "attach",
        "    carry_gradients(change)\n",
        "",
        ("sites/test_straight_through.py",),
    ),
    Fault(
        "filled_without_a_pivot",
        "dropped condition",
        "bases/regular_blocks.py",
        "_make_all_regular",
        "free & ((bits[:, :, word] & mask) != 0)",
        "(bits[:, :, word] & mask) != 0",
        ("bases/test_random_matrix.py", "test_randlora.py"),
    ),
    Fault(
        "filled_without_scaling",
        "wrong scale",
        "bases/random_matrix.py",
        "SparseTernary.scale",
        'if self.fill != "full_rank":',
        "if self.fill is not None:",
        ("bases/test_random_matrix.py", "test_randlora.py"),
    ),
    Fault(
        "hartley_sign",
        "sign",
        "hadamard.py",
        "_hartley",
        "np.cos(angle) + np.sin(angle)",
        "np.cos(angle) - np.sin(angle)",
        ("test_hadamard.py",),
    ),
    # Operations.
    Fault(
        "norm_in_the_last_stage",
        "wrong scale",
        "ops/program.py",
        "_normalized",
        "exponent = round(wanted - given)",
        "exponent = 0",
        ("ops/test_transforms.py",),
    ),
    Fault(
        "symbolic_adjoint_lost",
        "dropped argument",
        "ops/transforms.py",
        "RandomizedTransformOperation.call",
        "(x, self.plan, self.adjoint)",
        "(x, self.plan)",
        ("ops/test_transforms.py",),
    ),
    Fault(
        "torch_tangent_without_scale",
        "wrong gradient",
        "ops/torch.py",
        "_Scaled.jvp",
        "apply(scaled, ctx.program, after=after)",
        "apply(scaled, ctx.program)",
        ("ops/test_transforms.py", "ops/test_native.py"),
    ),
    Fault(
        "native_scale_lost",
        "wrong scale",
        "ops/native.py",
        "_Translation._scaled",
        "self._numbers(self.vector * scale)",
        "self._numbers(self.vector)",
        ("ops/test_native.py",),
    ),
    Fault(
        "high_half_of_the_seed_lost",
        "dropped seed",
        "ops/counter.py",
        "random_words",
        "(seed & _MASK, seed >> 32)",
        "(seed & _MASK, 0)",
        ("ops/test_counter.py",),
    ),
    Fault(
        "jax_gradient_not_transposed",
        "wrong gradient",
        "ops/jax.py",
        "_transpose",
        "apply(cotangent, program.transpose)",
        "apply(cotangent, program)",
        ("ops/test_transforms.py", "test_rlora.py"),
        "jax",
    ),
    Fault(
        "jax_batch_axis",
        "wrong axis",
        "ops/jax.py",
        "_batch",
        "jnp.moveaxis(x, axis, 0), program), 0",
        "jnp.moveaxis(x, axis, 0), program), axis",
        ("ops/test_transforms.py",),
        "jax",
    ),
    Fault(
        "jax_fence_passes_values_on",
        "wrong gradient",
        "ops/jax.py",
        "fence",
        "> jnp.inf",
        "* 0",
        ("ops/test_gradients.py",),
        "jax",
    ),
    Fault(
        "tensorflow_gradient_not_transposed",
        "wrong gradient",
        "ops/tensorflow.py",
        "apply",
        "apply(upstream, program.transpose)",
        "apply(upstream, program)",
        ("ops/test_transforms.py", "test_rlora.py"),
        "tensorflow",
    ),
    # Injection.
    Fault(
        "flags_not_restored",
        "forgotten restore",
        "model/transaction.py",
        "restore_flags",
        "set_layer_trainable_flag(layer, flag)",
        "set_layer_trainable_flag(layer, True)",
        ("test_injection.py",),
    ),
    Fault(
        "head_not_brought_back",
        "lost head",
        "model/attach.py",
        "activate",
        "_assign(change, layer, values)",
        "pass",
        ("test_injection.py", "saving/test_whole_model.py"),
    ),
    Fault(
        "base_head_of_long_ago",
        "stale value",
        "model/attach.py",
        "activate",
        "base_values[address] = state_lib.kept_layer_values(layer)",
        "pass",
        (
            "test_injection.py",
            "saving/test_whole_model.py",
            "saving/test_adapter_file.py",
        ),
    ),
    Fault(
        "step_functions_not_restored",
        "forgotten restore",
        "model/switch.py",
        "_leave",
        "attach.restore_functions(functions)",
        "pass",
        ("test_injection.py", "test_compiled.py"),
    ),
    Fault(
        "two_owners_of_a_head",
        "skipped check",
        "model/switch.py",
        "_check_together",
        "if address in owner:",
        "if owner.get(address) == name:",
        ("test_injection.py",),
    ),
    Fault(
        "site_left_after_an_error",
        "forgotten restore",
        "model/transaction.py",
        "Change.take_back",
        "undo()",
        "pass",
        ("test_injection.py", "test_matrix.py -k 'lora and dense'"),
    ),
    Fault(
        "statistics_move",
        "frozen flag",
        "model/training.py",
        "apply_trainable",
        "layer.trainable = False",
        "for v in _compat.owned_variables(layer):\n                "
        "v.trainable = False",
        ("test_injection.py", "test_matrix.py -k 'lora and sequential'"),
    ),
    Fault(
        "inference_counts_steps",
        "dropped condition",
        "model/adapted_model.py",
        "_counting_call",
        "if training:",
        "if True:",
        ("test_dylora.py",),
    ),
    Fault(
        "old_functions_after_compile",
        "stale value",
        "model/adapted_model.py",
        "AdaptedModel.compile",
        "self._randadapt.functions.clear()",
        "pass",
        ("test_compiled.py",),
        "jax",
    ),
    Fault(
        "part_of_two_models_released",
        "dropped condition",
        "model/parts.py",
        "release",
        "if attributes[_CLAIM].owners:",
        "if False:",
        ("test_injection.py",),
    ),
    # Merging.
    Fault(
        "merge_loses_the_head",
        "lost head",
        "model/merge.py",
        "merge",
        "for address in state.records[name].kept",
        "for address in ()",
        ("test_matrix.py -k bert_classifier", "test_rmlora.py"),
    ),
    Fault(
        "merge_leaves_the_bias",
        "dropped condition",
        "model/merge.py",
        "_write_merged",
        "    if bias is not None:",
        "    elif bias is not None:",
        ("test_hydra.py", "test_matrix.py -k 'hydra and dense'"),
    ),
    Fault(
        "overflow_in_a_merge",
        "missing cast",
        "model/merge.py",
        "_merged_values",
        "keras.ops.cast(kernel, dtype)",
        "kernel",
        ("test_injection.py",),
    ),
    # Adapter files.
    Fault(
        "file_with_the_head_of_another",
        "lost head",
        "model/file_format.py",
        "kept_tensors",
        "if record.kept_values is None:",
        "if True:",
        ("saving/test_adapter_file.py",),
    ),
    Fault(
        "reported_size",
        "off by one",
        "model/file_format.py",
        "size",
        "8 + (length + 7) // 8 * 8 + offset",
        "8 + (length // 8 + 1) * 8 + offset",
        ("saving/test_adapter_file.py", "test_matrix.py -k 'vera and dense'"),
    ),
    Fault(
        "sites_in_the_order_of_the_file",
        "wrong order",
        "model/load.py",
        "checked",
        "[address for address in layers if address in by_address]",
        "list(by_address)",
        ("test_said.py", "saving/test_adapter_file.py"),
    ),
    Fault(
        "bases_of_either_side_alone",
        "skipped check",
        "model/file_checks.py",
        "check_bases",
        "set(ours) | set(theirs)",
        "set(ours) & set(theirs)",
        ("saving/test_adapter_file.py",),
    ),
    Fault(
        "layers_of_the_whole_model",
        "dropped argument",
        "model/file_checks.py",
        "check_layers",
        "(model, addresses, kept, added)",
        "(model, addresses, kept)",
        ("saving/test_adapter_file.py", "test_rmlora.py"),
    ),
    Fault(
        "other_heads_of_an_adapter",
        "skipped check",
        "model/file_checks.py",
        "check_same",
        "elif set(record.kept) != set(kept):",
        "elif False:",
        ("saving/test_adapter_file.py",),
    ),
    Fault(
        "temporary_file_left",
        "forgotten restore",
        "model/paths.py",
        "replace",
        "os.unlink(temporary)",
        "pass",
        ("saving/test_adapter_file.py",),
    ),
    # Files of weights and of whole models.
    Fault(
        "weights_lose_an_inactive_head",
        "lost head",
        "model/adapted_model.py",
        "AdaptedModel.load_weights",
        "keeping[0].kept_values[address] = kept_layer_values(layer)",
        "pass",
        ("saving/test_whole_model.py",),
    ),
    Fault(
        "whole_model_loses_inactive_heads",
        "lost head",
        "model/adapted_model.py",
        "AdaptedModel.save_assets",
        "record.kept_values or {}",
        "{}",
        ("saving/test_whole_model.py",),
    ),
    Fault(
        "whole_model_loses_sources",
        "lost setting",
        "model/adapted_model.py",
        "AdaptedModel.get_config",
        '"sources": record.sources,',
        "",
        ("test_bottleneck.py",),
    ),
    Fault(
        "optimizer_starts_afresh",
        "forgotten restore",
        "optimizers/wrapper.py",
        "OptimizerWrapper.load_own_variables",
        "variable.assign(store[str(i)])",
        "pass",
        ("test_adalora.py", "test_sora.py", "test_rmlora.py"),
    ),
    Fault(
        "saving_thaws_layers",
        "forgotten restore",
        "model/adapted_model.py",
        "plain_classes",
        "for layer, flag in flags:",
        "for layer, flag in ():",
        ("saving/test_whole_model.py",),
    ),
    # Targets.
    Fault(
        "suffix_of_a_name_matches",
        "dropped condition",
        "sites/selection.py",
        "_matches",
        'f"/{path}".endswith(f"/{target}")',
        "path.endswith(target)",
        ("test_targets.py",),
    ),
    Fault(
        "routers_are_adapted",
        "dropped condition",
        "sites/selection.py",
        "_linear",
        "and not linear.steers_experts(address, layers)",
        "",
        ("test_targets.py",),
    ),
    Fault(
        "gates_without_a_word",
        "dropped condition",
        "sites/selection.py",
        "select_sites",
        "left_out = linear.left_out_of_all_linear(layers, chosen, kept)",
        "left_out = []",
        ("test_targets.py",),
    ),
    Fault(
        "excluded_by_a_part_of_a_name",
        "dropped condition",
        "sites/linear.py",
        "is_below",
        'address.startswith(f"{parent}/")',
        "address.startswith(parent)",
        ("test_targets.py", "test_injection.py"),
    ),
    # Optimizers.
    Fault(
        "masked_values_move",
        "swapped argument",
        "optimizers/masked_gradient.py",
        "MaskedGradient.after_update",
        "ops.where(mask, updated, value)",
        "ops.where(mask, value, updated)",
        ("optimizers/test_masked_gradient.py",),
    ),
    Fault(
        "galore_decay_without_rate",
        "wrong scale",
        "optimizers/galore.py",
        "GaLore._decay",
        'decay * ops.cast(leaf.learning_rate, "float32")',
        "decay",
        ("optimizers/test_galore.py",),
    ),
    Fault(
        "galore_interval_in_micro_steps",
        "wrong scale",
        "optimizers/galore.py",
        "GaLore.transform_gradients",
        "self.update_interval * micro_steps",
        "self.update_interval",
        ("optimizers/test_galore.py",),
    ),
    Fault(
        "proximal_step_in_micro_steps",
        "dropped condition",
        "optimizers/proximal_l1.py",
        "ProximalL1.after_update",
        "if is_update is not True:",
        "if False:",
        ("optimizers/test_proximal_l1.py",),
    ),
    Fault(
        "group_decays_what_is_excluded",
        "lost setting",
        "model/learning_rate_groups.py",
        "_group",
        "_compat.copy_weight_decay_exclusions"
        "(optimizer, result, model.variables)",
        "pass",
        ("optimizers/test_learning_rate_groups.py",),
    ),
    Fault(
        "uncertainty_of_the_old_average",
        "stale value",
        "optimizers/rank_allocation.py",
        "RankAllocation.transform_gradients",
        "ops.abs(now - smooth)",
        "ops.abs(now - sensitivity)",
        ("optimizers/test_rank_allocation.py",),
    ),
    Fault(
        "scores_of_one_step_more",
        "off by one",
        "optimizers/rank_allocation.py",
        "RankAllocation.transform_gradients",
        "update < ops.convert_to_tensor(self._phases)[1]",
        "update <= ops.convert_to_tensor(self._phases)[1]",
        ("optimizers/test_rank_allocation.py", "test_adalora.py"),
    ),
    Fault(
        "update_one_micro_step_early",
        "off by one",
        "optimizers/wrapper.py",
        "OptimizerWrapper.is_update_step",
        "(_compat.iterations(self) + 1) % steps",
        "_compat.iterations(self) % steps",
        (
            "optimizers/test_wrapper.py",
            "optimizers/test_proximal_l1.py",
            "optimizers/test_galore.py",
        ),
    ),
    Fault(
        "loss_scale_starts_afresh",
        "lost setting",
        "optimizers/automatic.py",
        "attach",
        "type(optimizer)(inner, **config)",
        "type(optimizer)(inner)",
        ("optimizers/test_wrapper.py", "test_rmlora.py"),
    ),
    # Regularizers and callbacks.
    Fault(
        "orthogonality_by_the_mean",
        "wrong scale",
        "regularizers/orthogonality.py",
        "Orthogonality.__call__",
        "ops.sum(ops.square(error))",
        "ops.mean(ops.square(error))",
        ("regularizers/test_orthogonality.py",),
    ),
    Fault(
        "head_penalty_without_reduction",
        "wrong scale",
        "regularizers/pac_bayes.py",
        "PACBayesPenalty.value",
        "self.head_strength * self.scale * information",
        "self.head_strength * information",
        ("callbacks/test_pac_bayes.py",),
    ),
    Fault(
        "linear_penalty_sign",
        "sign",
        "regularizers/pac_bayes.py",
        "PACBayesPenalty._information",
        "- self.offset",
        "+ self.offset",
        ("callbacks/test_pac_bayes.py",),
    ),
    Fault(
        "shared_weights_counted_twice",
        "skipped check",
        "model/state.py",
        "AdaptedState.trainable_by_site",
        "if id(variable) not in seen:",
        "if True:",
        ("callbacks/test_pac_bayes.py",),
    ),
    Fault(
        "own_regularizer_lost",
        "missed regularizer",
        "callbacks/pac_bayes.py",
        "PACBayes._attach",
        "JointRegularizer(self._penalty, own)",
        "JointRegularizer(self._penalty)",
        ("callbacks/test_pac_bayes.py",),
    ),
    Fault(
        "same_examples_every_time",
        "dropped seed",
        "callbacks/pac_bayes.py",
        "PACBayes._draw",
        "[self.seed, len(self._penalty.history.rows)]",
        "[self.seed, 0]",
        ("callbacks/test_pac_bayes.py",),
    ),
    Fault(
        "stream_drops_what_is_left",
        "stale value",
        "per_example/example_source.py",
        "StreamSource.draw",
        "self.left[:samples], self.left[samples:]",
        "self.left[:samples], []",
        ("per_example/test_example_source.py",),
    ),
    Fault(
        "sampler_state_not_restored",
        "forgotten restore",
        "per_example/example_source.py",
        "own_random_state",
        "generator.set_state(state)",
        "pass",
        ("per_example/test_example_source.py", "callbacks/test_pac_bayes.py"),
    ),
    Fault(
        "rows_of_the_padding",
        "off by one",
        "per_example/__init__.py",
        "PerExampleGradients.__call__",
        "self._rows(chunk)[:count]",
        "self._rows(chunk)",
        (
            "per_example/test_per_example_gradients.py",
            "callbacks/test_pac_bayes.py",
        ),
    ),
    Fault(
        "gradients_with_dropout",
        "swapped argument",
        "per_example/__init__.py",
        "ExampleLoss.of_batch",
        "self.model(x, training=False)",
        "self.model(x, training=True)",
        (
            "per_example/test_per_example_gradients.py",
            "callbacks/test_pac_bayes.py",
        ),
    ),
    Fault(
        "regularizers_not_restored",
        "forgotten restore",
        "per_example/__init__.py",
        "without_regularizers",
        "variable.regularizer = regularizer",
        "variable.regularizer = None",
        (
            "per_example/test_per_example_gradients.py",
            "callbacks/test_pac_bayes.py",
        ),
    ),
    Fault(
        "tensorflow_loss_without_scale",
        "wrong scale",
        "per_example/tensorflow.py",
        "strategies",
        "loss(values, [], example, scale)",
        "loss(values, [], example, 1.0)",
        ("per_example/test_per_example_gradients.py",),
        "tensorflow",
    ),
    Fault(
        "monitor_one_epoch_late",
        "off by one",
        "callbacks/rank_monitor.py",
        "RankMonitor.on_epoch_end",
        "(epoch + 1) % self.frequency",
        "epoch % self.frequency",
        ("callbacks/test_rank_monitor.py",),
    ),
    # Analysis.
    Fault(
        "orthogonality_of_the_inputs",
        "wrong axis",
        "analysis/deltas.py",
        "SiteDelta.orthogonality_loss",
        "self.shape[1]",
        "self.shape[0]",
        ("analysis/test_rank.py",),
    ),
    Fault(
        "rounding_counts_as_rank",
        "dropped condition",
        "analysis/deltas.py",
        "_gram",
        "4 * _EPSILON * float(np.linalg.norm(merged))",
        "0.0",
        ("analysis/test_rank.py",),
    ),
    Fault(
        "unbiased_estimate",
        "off by one",
        "analysis/similarity.py",
        "_unbiased_hsic",
        "((n - 1) * (n - 2))",
        "(n * (n - 2))",
        ("analysis/test_similarity.py",),
    ),
    Fault(
        "adapted_against_itself",
        "dropped condition",
        "analysis/similarity.py",
        "cka",
        "model_a, switch.disabled(model_a)",
        "model_a, contextlib.nullcontext()",
        ("analysis/test_similarity.py",),
    ),
    Fault(
        "loss_plane_transposed",
        "transposition",
        "analysis/loss_plane.py",
        "mode_connectivity",
        ".reshape(shape[::-1])",
        ".reshape(shape)",
        ("analysis/test_loss_plane.py",),
    ),
    Fault(
        "weights_of_the_last_point",
        "forgotten restore",
        "analysis/point_values.py",
        "restored",
        "variable.assign(value)",
        "pass",
        ("analysis/test_loss_plane.py",),
    ),
    Fault(
        "bootstrap_without_its_ridge",
        "wrong scale",
        "analysis/pac_bayes_bound.py",
        "_Sums._bootstrap_quadratic",
        "ridge = damping / n",
        "ridge = damping",
        ("analysis/test_pac_bayes_bound.py",),
    ),
    # Checks.
    Fault(
        "shared_kernel_adapted",
        "off by one",
        "model/checks.py",
        "check_attachable",
        "len(sharing) > 1",
        "len(sharing) > 2",
        ("test_injection.py",),
    ),
    Fault(
        "kept_site",
        "dropped condition",
        "model/checks.py",
        "_check_overlap",
        'a == address or a.startswith(f"{address}/")',
        'a.startswith(f"{address}/")',
        ("test_injection.py",),
    ),
    Fault(
        "no_warning_of_inference_in_fit",
        "dropped condition",
        "model/advice.py",
        "warn_of_inference_in_fit",
        "template.dropout or _has_training_delta(template)",
        "template.dropout",
        ("test_injection.py", "test_dylora.py"),
    ),
    Fault(
        "peft_divides_by_the_rank_alone",
        "wrong scale",
        "peft/methods.py",
        "Reader._rank_and_scaling",
        "math.sqrt(rank) if options",
        "rank if options",
        ("peft/test_loading.py",),
    ),
    Fault(
        "peft_keeps_the_scaling_beside_B",
        "wrong scale",
        "peft/canonical.py",
        "config_of",
        '"lora_alpha": rank,',
        '"lora_alpha": 2 * rank,',
        ("peft/test_saving.py",),
    ),
    Fault(
        "peft_pairs_outputs_in_order",
        "wrong order",
        "peft/saving.py",
        "_modules",
        "b[..., part.outputs, :]",
        "b[..., : len(part.columns), :]",
        ("peft/test_saving.py",),
    ),
    Fault(
        "peft_orders_experts_as_in_A",
        "wrong order",
        "peft/canonical.py",
        "shaped",
        "b.transpose(1, 2, 0)",
        "b.transpose(1, 0, 2)",
        ("peft/test_experts.py",),
    ),
    Fault(
        "peft_wraps_experts_inside_out",
        "wrong order",
        "peft/experts.py",
        "starts_of",
        "reversed(inside)",
        "inside",
        ("peft/test_experts.py",),
    ),
    Fault(
        "quantized_experts_are_adapted",
        "missing check",
        "sites/supported.py",
        "check_site",
        "isinstance(layer, KernelSite) and layer.quantization_mode is not None",
        "False",
        ("sites/test_experts.py",),
    ),
    Fault(
        "peft_pairs_randlora_as_the_paper",
        "wrong order",
        "peft/methods.py",
        "Reader._randlora",
        "thin = a.reshape(-1, small)",
        "thin = a.transpose(1, 0, 2).reshape(-1, small)",
        ("peft/test_transformers.py",),
    ),
    Fault(
        "peft_drops_untrained_ranks",
        "wrong first value",
        "peft/sites.py",
        "_trimmed",
        "(np.any(here != 0, axis=-2) | untrained)",
        "np.any(here != 0, axis=-2)",
        ("peft/test_saving.py",),
    ),
    Fault(
        "peft_takes_part_of_a_module",
        "missing check",
        "peft/options.py",
        "missing_targets",
        "if module not in held",
        "if module in held",
        ("peft/test_loading.py",),
    ),
    Fault(
        "merged_checkpoints_are_of_the_base",
        "wrong state",
        "peft/merged.py",
        "save_merged",
        'model._randadapt.block != "merged"',
        'model._randadapt.block == "merged"',
        ("peft/test_merged.py",),
    ),
    Fault(
        "peft_converts_without_the_scaling",
        "wrong scale",
        "peft/conversion.py",
        "_factors",
        "update.a.T, update.scaling * update.b.T",
        "update.a.T, update.b.T",
        ("peft/test_command_line.py",),
    ),
    Fault(
        "tensors_in_the_order_of_memory",
        "wrong order",
        "model/tensor_data.py",
        "in_order",
        'np.asarray(one, order="C")',
        "np.asarray(one)",
        ("model/test_tensor_data.py",),
    ),
    Fault(
        "merged_checkpoints_of_any_base",
        "missing check",
        "peft/merged.py",
        "_tensors_of_base",
        "if one is None or not _is_value(",
        "if one is None and not _is_value(",
        ("peft/test_merged.py",),
    ),
    Fault(
        "energy_of_values",
        "wrong formula",
        "matrices/low_rank.py",
        "shortest",
        "squares = s**2",
        "squares = s",
        ("matrices/test_low_rank.py", "test_to_lora.py"),
    ),
    Fault(
        "one_root_of_the_values",
        "wrong scale",
        "matrices/low_rank.py",
        "_product",
        "u[:, :rank] * root",
        "u[:, :rank]",
        ("matrices/test_low_rank.py", "test_to_lora.py"),
    ),
    Fault(
        "ties_counts_all",
        "wrong scale",
        "matrices/merging.py",
        "ties",
        "count += agrees",
        "count += delta != 0",
        ("matrices/test_merging.py", "test_combine.py"),
    ),
    Fault(
        "dare_keeps_what_it_drops",
        "wrong side",
        "matrices/merging.py",
        "drop_and_rescale",
        "uniforms < density",
        "uniforms >= density",
        ("matrices/test_merging.py", "test_combine.py"),
    ),
    Fault(
        "to_lora_keeps_the_scaling",
        "wrong scale",
        "model/convert.py",
        "to_lora",
        "seed=record.template.seed,",
        "seed=record.template.seed, scaling=2.0,",
        ("test_to_lora.py",),
    ),
    Fault(
        "dead_ranks",
        "wrong first value",
        "model/low_rank.py",
        "give",
        "whole_a[..., :rank] = _float32(a)",
        "whole_a[..., rank:] = 0; whole_a[..., :rank] = _float32(a)",
        ("test_to_lora.py",),
    ),
    Fault(
        "fields_that_no_file_tells",
        "missing check",
        "model/file_conversion.py",
        "_SiteOfFile",
        "if field in type(self).untold:",
        "if False:",
        ("saving/test_file_conversion.py",),
    ),
    Fault(
        "converted_file_of_other_bases",
        "missing check",
        "model/file_conversion.py",
        "_adapters",
        "file_checks.check_bases(source, metadata, built)",
        "pass",
        ("saving/test_file_conversion.py",),
    ),
    Fault(
        "base_kernels_for_transformers",
        "missing check",
        "model/exporting.py",
        "check_transformers_export",
        "if names:",
        "if False:",
        ("model/test_exporting.py",),
    ),
    Fault(
        "combined_head_is_the_active_one",
        "stale value",
        "model/combine.py",
        "_kept_values",
        "if values is None:",
        "if True:",
        ("test_combine.py",),
    ),
    Fault(
        "combined_weight_of_another",
        "wrong index",
        "model/combine.py",
        "_combined",
        "own = [weights[name] for name in terms]",
        "own = list(weights.values())[:len(terms)][::-1]",
        ("test_combine.py",),
    ),
]


def changed(fault, source):
    """The source of the fault's file, with the fault.

    Raises:
        ValueError: If the function is not there, or if it does not have the
            text exactly once.
        SyntaxError: If the result is no Python.
    """
    lines = source.splitlines(keepends=True)
    found = [
        n for name, n in _named(ast.parse(source)) if name == fault.function
    ]
    if not found:
        raise ValueError(f"no `{fault.function}` in {fault.path}")
    # A property and its setter have one name.
    parts = ["".join(lines[n.lineno - 1 : n.end_lineno]) for n in found]
    counts = [part.count(fault.old) for part in parts]
    if sum(counts) != 1:
        raise ValueError(
            f"`{fault.function}` in {fault.path} has the text {sum(counts)} "
            f"times: {fault.old}"
        )
    i = counts.index(1)
    start, end = found[i].lineno - 1, found[i].end_lineno
    part = parts[i].replace(fault.old, fault.new)
    result = "".join([*lines[:start], part, *lines[end:]])
    compile(result, fault.path, "exec")
    return result


def _named(node, prefix=""):
    """`(qualified name, node)` of all functions and classes below a node."""
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for child in ast.iter_child_nodes(node):
        inner = prefix
        if isinstance(child, definitions):
            yield prefix + child.name, child
            inner = f"{prefix}{child.name}."
        yield from _named(child, inner)


def check(faults, package):
    """Returns what is wrong with the list, by name of the fault."""
    problems = {}
    for fault in faults:
        file = package / PACKAGE / fault.path
        try:
            changed(fault, file.read_text(encoding="utf-8"))
        except (OSError, ValueError, SyntaxError) as error:
            problems[fault.name] = str(error)
    return problems


def lay_out(folder, suite, package):
    """Puts the package and the tests of a suite into an empty folder."""
    for entry in sorted(suite.iterdir()):
        if entry.name in (PACKAGE, "tests") or entry.name.startswith("."):
            continue
        if entry.name == "pyproject.toml":
            # Its folder is where pytest looks for everything.
            shutil.copy2(entry, folder)
        else:
            (folder / entry.name).symlink_to(entry)
    shutil.copytree(suite / "tests", folder / "tests")
    shutil.copytree(package / PACKAGE, folder / PACKAGE)
    if not any(folder.glob(f"{PACKAGE}/**/_native*.so")):
        # A clone without compiled code: this repository's fits, or says so.
        for file in ROOT.glob(f"{PACKAGE}/**/_native*.so"):
            shutil.copy2(file, folder / file.relative_to(ROOT))


def run(folder, selection, backend):
    """Runs tests; returns `(outcome, detail)`.

    The outcome is "passed", "failed", where the detail is the first test that
    did, or "error", where it says why there is no outcome.
    """
    file, *options = shlex.split(selection)
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
    command += ["-p", "no:cacheprovider", "-m", "not slow"]
    try:
        process = subprocess.run(
            [*command, f"tests/{file}", *options],
            env={
                **os.environ,
                "KERAS_BACKEND": backend,
                "PYTHONPATH": str(folder),
                "TF_CPP_MIN_LOG_LEVEL": "3",
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LIMIT,
        )
    except subprocess.TimeoutExpired:
        return "error", f"{selection}: it took more than {LIMIT} seconds"
    if process.returncode == 0:
        return "passed", ""
    lines = process.stdout.splitlines()
    if process.returncode == 1:
        failed = [x for x in lines if x.startswith(("FAILED ", "ERROR "))]
        return "failed", " ".join(failed[:1])[:300]
    end = " ".join(lines[-3:])[:300]
    return "error", f"{selection}: exit code {process.returncode}: {end}"


def seek(fault, folder):
    """Runs the tests that reach a fault; returns what is recorded of it."""
    file = folder / PACKAGE / fault.path
    source = file.read_text(encoding="utf-8")
    start = time.monotonic()
    record = {"outcome": "missed", "kind": fault.kind, "key": _key(fault)}
    file.write_text(changed(fault, source), encoding="utf-8")
    try:
        for selection in fault.reach:
            outcome, detail = run(folder, selection, fault.backend)
            if outcome == "failed":
                record.update(outcome="found", by=selection, test=detail)
            elif outcome == "error":
                record.update(outcome="error", detail=detail)
            if outcome != "passed":
                break
    finally:
        file.write_text(source, encoding="utf-8")
    record["seconds"] = round(time.monotonic() - start, 1)
    return record


def _key(fault):
    """Tells a fault from one that had its name in an earlier run."""
    return hashlib.sha256(repr(tuple(fault)).encode()).hexdigest()[:12]


def run_baseline(faults, folder, results):
    """Runs all selections on the package as it is; returns those that fail."""
    known = results.setdefault("baseline", {})
    for backend, selection in dict.fromkeys(
        (fault.backend, selection)
        for fault in faults
        for selection in fault.reach
    ):
        key = f"{backend}: {selection}"
        if known.get(key) != "passed":
            known[key] = " ".join(run(folder, selection, backend)).strip()
            print(f"{key}: {known[key]}", flush=True)
            yield key


def read(file):
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def write(file, results):
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f"{file.name}.tmp")
    temporary.write_text(json.dumps(results, indent=1), encoding="utf-8")
    temporary.replace(file)


def summarize(faults, records):
    """Prints a line for each fault and what was missed; whether all is well."""
    print()
    for fault in faults:
        record = records.get(fault.name, {"outcome": "not run"})
        seconds = f"{record.get('seconds', 0):.0f} s"
        by = record.get("by") or record.get("detail", "")
        print(f"{fault.name:<34}{record['outcome']:<8}{seconds:>7}  {by}")
    names = {
        outcome: [
            fault.name
            for fault in faults
            if records.get(fault.name, {}).get("outcome") == outcome
        ]
        for outcome in ("found", "missed", "error")
    }
    print(f"\nfound {len(names['found'])} of {len(faults)}")
    print(f"missed: {', '.join(names['missed']) or 'none'}")
    if names["error"]:
        print(f"errors of the list: {', '.join(names['error'])}")
    return not names["error"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--suite", type=pathlib.Path, default=ROOT)
    parser.add_argument("--package", type=pathlib.Path, default=ROOT)
    parser.add_argument(
        "--results",
        type=pathlib.Path,
        default=ROOT / "outputs" / "seeded_faults.json",
    )
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--baseline", action="store_true")
    arguments = parser.parse_args()
    by_name = {fault.name: fault for fault in FAULTS}
    assert len(by_name) == len(FAULTS)
    unknown = set(arguments.only or ()) - set(by_name)
    if unknown:
        parser.error(f"no faults of these names: {sorted(unknown)}")
    faults = [by_name[name] for name in arguments.only or by_name]
    suite, package = arguments.suite.resolve(), arguments.package.resolve()
    problems = check(faults, package)
    for name, problem in problems.items():
        print(f"{name}: {problem}")
    if arguments.check or problems:
        print(f"{len(faults) - len(problems)} of {len(faults)} faults apply")
        return bool(problems)
    results = read(arguments.results)
    results.update(suite=str(suite), package=str(package))
    records = results.setdefault("faults", {})
    with tempfile.TemporaryDirectory(prefix="seeded_faults_") as folder:
        folder = pathlib.Path(folder)
        lay_out(folder, suite, package)
        if arguments.baseline:
            for _ in run_baseline(faults, folder, results):
                write(arguments.results, results)
            return any(v != "passed" for v in results["baseline"].values())
        for fault in faults:
            known = records.get(fault.name, {})
            done = known.get("outcome") in ("found", "missed")
            if done and known.get("key") == _key(fault):
                continue
            records[fault.name] = record = seek(fault, folder)
            write(arguments.results, results)
            print(
                f"{fault.name}: {record['outcome']}, {record['seconds']:.0f} s",
                flush=True,
            )
    return not summarize(faults, records)


if __name__ == "__main__":
    sys.exit(main())
