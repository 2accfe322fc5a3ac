"""Faults that somebody could make, and the tests that have to fail for each of them.

A fault is an edit: `old`, which is in the file once, becomes `new`. `test_faults.py` makes them,
one at a time, in a copy of the project. Whoever changes the old text of a fault in the script
changes it here too; whoever finds a fault that no test notices adds a test, and the fault.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """An edit of one file of the project."""

    name: str
    old: str
    new: str
    tests: str  # in tests/, separated by spaces
    file: str = "train_mdlm.py"
    quick: bool = False  # whether its tests take so little time that it is always tried


FAULTS = []


def fault(name: str, old: str, new: str, tests: str, **more) -> None:
    FAULTS.append(Fault(name, old, new, tests, **more))


# ---- Once unnoticed


fault(
    "every step reads the same data",
    "    first = step * hp.batch_rows\n",
    "    first = 0\n",
    "test_noise.py::test_step_after_step_reads_the_split_from_front_to_back",
    quick=True,
)
fault(
    "the last weights are packed, not the average",
    "    trainer.optimizer.swap_average()\n    return trainer.model\n",
    "    return trainer.model\n",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
    quick=True,
)
fault(
    "the last weights are validated, not the average",
    "        self.optimizer.swap_average()\n        try:\n",
    "        try:\n",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
    quick=True,
)
fault(
    "the clock counts pauses",
    "        self.started += seconds\n",
    "",
    "test_train.py::test_pauses_are_not_training_time",
    quick=True,
)
fault(
    "a window begins as if <s> were before it",
    "token_bytes(windows.x0, windows.tokens[:, 0], split.luts)",
    "token_bytes(windows.x0, BOS_ID, split.luts)",
    "test_scores.py::test_the_bytes_of_a_window_depend_on_the_token_before_it",
    quick=True,
)
fault(
    "the T-step bound lacks its terminal term",
    "return terminal + weighted_nll(",
    "return weighted_nll(",
    "test_scores.py::test_the_t_step_bound_pays_for_what_its_last_step_leaves_visible",
    quick=True,
)
fault(
    "second moments are those of one process",
    "{name: all_reduce(moment) for",
    "{name: moment for",
    "test_train.py::test_two_processes_share_a_batch_and_take_one_step",
    quick=True,
)
fault(
    "an artifact may claim any size",
    "len(data) >= least_bytes(weights)",
    "len(data) >= 0",
    "test_model.py::test_a_file_that_claims_a_huge_model_is_refused_before_anything_is_unpacked",
    quick=True,
)


# ---- What is refused, and what is never lost


fault(
    "any tokenizer goes with verified data",
    'pairs = {f"{hp.tokenizer_path} (SHA-256)": (verified["tokenizer_sha256"], digest)}',
    "pairs = {}",
    "test_denominators.py::test_any_other_tokenizer_file_is_known_by_its_digest",
)
fault(
    "verified shards are not compared",
    'pairs[f"{name} (CRC-32)"] = (stated["shards"].get(name), checksum)',
    "pass",
    "test_denominators.py::test_a_run_reads_and_compares_only_the_shards_it_can_reach",
)
fault(
    "a piece may have any character",
    "    if strange:",
    "    if False:",
    "test_denominators.py::test_a_flipped_bit_in_a_sign_for_a_space",
)
fault(
    "only the first shard is split again",
    "for i in own_share(len(numbers)):",
    "for i in range(1):",
    "test_denominators.py::test_a_shard_of_another_tokenizer_is_refused",
)
fault(
    "decoded bytes are not counted",
    "if abs(counted - decoded) > 8 + 1e-4 * decoded:",
    "if False:",
    "test_denominators.py::test_bytes_are_compared_with_the_decoded_text",
)
fault(
    "what is packed to nothing is not filled up",
    ".ljust(least_bytes(weights) - len(packed))",
    "",
    "test_artifact.py::test_what_is_saved_is_read_whatever_the_knobs",
)
fault(
    "a text that is no log is replaced",
    "if not begun and (not source.startswith(text) or ",
    "if not begun and (False or ",
    "test_restart.py::test_what_another_program_made_is_left_alone",
)
fault(
    "an artifact without a log is replaced",
    "(artifact.exists() and not hp.eval_only)",
    "False",
    "test_restart.py::test_what_another_program_made_is_left_alone",
)
fault(
    "a validation is never cut short",
    "lambda: clock.stopped",
    "lambda: False",
    "test_restart.py::test_a_long_validation_is_cut_short",
)
fault(
    "a closed terminal kills a run",
    "(signal.SIGTERM, signal.SIGINT, signal.SIGHUP)",
    "(signal.SIGTERM, signal.SIGINT)",
    "test_restart.py::test_a_closed_terminal",
)
fault(
    "nohup does not help",
    "if signal.getsignal(number) != signal.SIG_IGN:",
    "if True:",
    "test_restart.py::test_a_closed_terminal",
)
fault(
    "no memory is too little",
    "if sum(needed.values()) > there_are:",
    "if False:",
    "test_hyperparameters.py::test_what_cannot_fit_is_refused_with_figures_before_it_is_built",
)
fault(
    "a checkpoint of another version counts as damaged",
    '    raise InputError(f"{path}: {OF_ANOTHER_VERSION}")\n\n\n# ---- Training',
    "    return None\n\n\n# ---- Training",
    "test_restart.py::test_a_checkpoint_of_another_version_is_not_damaged",
)


# ---- Data and bytes


fault(
    "a sliding window reads as if it did not slide",
    "rows = [self.read(number * (stride or length), 1 + length) for number in numbers]",
    "rows = [self.read(number * length, 1 + length) for number in numbers]",
    "test_scores.py::test_split_scores_are_their_definitions",
)

fault(
    "the shards are read in another order",
    'self.files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"))',
    'self.files = sorted(Path(folder).glob(f"fineweb_{split}_*.bin"), reverse=True)',
    "test_data.py::test_stream_is_a_ring_over_shards",
)

fault(
    "the chunks of a shard come in one order for ever",
    'generator = seeded("cpu", self.hp.seed, "chunks", visit)',
    'generator = seeded("cpu", self.hp.seed, "chunks", place)',
    "test_documents.py::test_a_single_shard_has_another_order_in_every_epoch",
)

fault(
    "what comes before the first <s> of a shard is lost",
    "documents = np.union1d([0], np.flatnonzero(shard == BOS_ID))",
    "documents = np.flatnonzero(shard == BOS_ID)",
    "test_documents.py::test_every_chunk_once_an_epoch_in_shard_after_shard",
)

fault(
    "tokens without text are no boundary",
    "boundary = np.ones(size, bool)",
    "boundary = np.zeros(size, bool)",
    "test_scores.py::test_byte_tables_of_every_kind_of_piece",
)

fault(
    "characters are counted, not bytes",
    'text_bytes = len(piece.replace("\\u2581", " ").encode())',
    'text_bytes = len(piece.replace("\\u2581", " "))',
    "test_scores.py::test_byte_tables_of_every_kind_of_piece",
)

fault(
    "a byte has as many bytes as its name",
    "base[token] = 1 if sp.is_byte(token) else text_bytes - space[token]",
    "base[token] = text_bytes - space[token]",
    "test_scores.py::test_byte_tables_of_every_kind_of_piece",
)

fault(
    "the first space of a text is never counted",
    "space_stays = luts.keeps_space | ~luts.is_boundary[before]",
    "space_stays = ~luts.is_boundary[before]",
    "test_data.py::test_published_tokenizer_rule_for_a_space_after_a_boundary",
)


# ---- Noise


fault(
    "every step has the same masks",
    'seeded(device, hp.seed, "train", step)',
    'seeded(device, hp.seed, "train")',
    "test_noise.py::test_every_step_and_every_row_has_a_mask_of_its_own",
)

fault(
    "every micro-batch has the masks of the first",
    "probability, keys[own], capacity)",
    "probability, keys[: len(rows)], capacity)",
    "test_noise.py::test_every_step_and_every_row_has_a_mask_of_its_own",
)

fault(
    "strata have times at places of their own",
    "return (strata + u[0]) / len(u)",
    "return (strata + u) / len(u)",
    "test_noise.py::test_stratified_times_are_all_at_the_same_place_in_their_strata",
)

fault(
    "<s> is masked with ANCHOR_BOS too",
    "return not_pad & (x != BOS_ID) if hp.anchor_bos else not_pad",
    "return not_pad",
    "test_documents.py::test_pad_and_anchors_are_neither_masked_nor_scored",
)

fault(
    "the weight is of the probability, not of the share",
    "    return 1 / share\n",
    "    return 1 / probability\n",
    "test_noise.py::test_masks_have_the_promised_probability_and_weight",
)

fault(
    "the published weight is of the share that was masked",
    "return (hp.mask_max - hp.mask_eps) / (1 - probability)",
    "return (hp.mask_max - hp.mask_eps) / (1 - share)",
    "test_noise.py::test_the_published_weight_does_not_explode_for_short_documents",
)

fault(
    "weights are not clamped",
    "return mask & allowed, weight.clamp(max=hp.weight_clamp), share",
    "return mask & allowed, weight, share",
    "test_noise.py::test_weights_are_clamped",
)

fault(
    "a batch has no room for chance",
    "128 * math.ceil((most * length + slack) / 128)",
    "math.ceil(most * length)",
    "test_noise.py::test_capacity_is_never_exceeded",
)

fault(
    "all blocks of a window are masked in the same order",
    "keys = draw(hp.batch_rows, blocks * length)",
    "keys = draw(hp.batch_rows, length).repeat(1, blocks)",
    "test_blocks.py::test_every_block_has_a_count_of_its_own_on_the_lattice",
)

fault(
    "a single block may have no noise",
    "return max(round(self.block_share * (self.train_seq_len // self.noise_length)), 1)",
    "return round(self.block_share * (self.train_seq_len // self.noise_length))",
    "test_blocks.py::test_a_single_block_is_noisy_whatever_its_share",
)

fault(
    "block models have room for every noisy token",
    "    if hp.causal:\n        return tokens\n",
    "    if hp.causal or hp.block_size:\n        return tokens\n",
    "test_blocks.py::test_capacity_saves_work_with_blocks_too",
)


# ---- Model


fault(
    "queries and keys turn the other way",
    "return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)",
    "return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), -sin)",
    "test_model.py::test_forward_equals_the_equations_in_float64",
)

fault(
    "a causal model sees what comes next",
    "is_causal=view.causal",
    "is_causal=False",
    "test_model.py::test_causal_model_does_not_look_ahead_and_mdlm_does",
)

fault(
    "neighbours are those on the other side",
    "torch.where(seen, wanted, -1)",
    "torch.where(seen, wanted.flip(0), -1)",
    "test_model.py::test_forward_equals_the_equations_in_float64",
)

fault(
    "blocks mix the embedding in from the start",
    "for starts_at_zero in (self.resid_mix[1], self.attn.proj.weight, self.mlp.proj.weight):",
    "for starts_at_zero in (self.attn.proj.weight, self.mlp.proj.weight):",
    "test_model.py::test_initial_weights_of_the_unet",
)

fault(
    "the noise level counts what cannot be masked",
    "masked_fraction = masked / maskable(self.hp, z).sum(1).clamp(min=1)",
    "masked_fraction = masked / z.shape[1]",
    "test_model.py::test_the_dit_finds_the_noise_level_itself",
)

fault(
    "a scored position is told the noise of another row",
    "mlp_mod = mlp_mod[positions // x.shape[1], 0]",
    "mlp_mod = mlp_mod[positions % len(mlp_mod), 0]",
    "test_model.py::test_the_dit_is_the_published_stack",
)


# ---- Batch and loss


fault(
    "a masked token has the weight of another row",
    "weights=torch.where(used, weight[positions // hp.noise_length], 0)",
    "weights=torch.where(used, weight[positions % len(weight)], 0)",
    "test_noise.py::test_the_loss_is_the_weighted_nll_of_a_model_that_is_told_the_noise",
)

fault(
    "PAD counts as a token of the batch",
    "tokens=(x0 != hp.pad_id).sum(),",
    "tokens=torch.tensor(x0.numel(), device=x0.device),",
    "test_documents.py::test_pad_and_anchors_are_neither_masked_nor_scored",
)

fault(
    "the loss ignores the weights",
    "return (nll * batch.weights).sum()",
    "return (nll * (batch.weights > 0)).sum()",
    "test_noise.py::test_the_loss_is_the_weighted_nll_of_a_model_that_is_told_the_noise",
)

fault(
    "the loss is not told the noise",
    "return model.hidden(batch.z, batch.masked_fraction, batch.positions, batch.view)",
    "return model.hidden(batch.z, None, batch.positions, batch.view)",
    "test_noise.py::test_the_loss_is_the_weighted_nll_of_a_model_that_is_told_the_noise",
)

fault(
    "dropped tokens of blocks are not told of",
    "        tokens=clean.tokens,\n    )\n",
    "        tokens=clean.tokens,\n        dropped=clean.dropped,\n    )\n",
    "test_blocks.py::test_a_step_masks_a_share_of_the_blocks",
)

fault(
    "documents have the order of shuffled windows",
    "    if hp.shuffle and not hp.doc_chunks:\n",
    "    if hp.shuffle:\n",
    "test_data.py::test_a_shuffled_batch_has_the_shuffled_windows",
)


# ---- Optimizer and average


fault(
    "Muon has plain momentum",
    "nesterov = self.grads.addcmul(self.first, now.momentum)",
    "nesterov = self.first.clone()",
    "test_optim.py::test_three_steps_equal_separate_optimizers",
)

fault(
    "AdamW does not correct its second moment",
    "square = self.second / (1 - hp.beta2**now.steps_taken)",
    "square = self.second / (1 - hp.beta2)",
    "test_optim.py::test_three_steps_equal_separate_optimizers",
)

fault(
    "AdamW counts steps that were skipped",
    "steps_taken=self.counts[0].clamp(min=1),",
    "steps_taken=self.counts.sum().clamp(min=1),",
    "test_optim.py::test_a_skipped_step_is_no_step",
)

fault(
    "gradients are clipped to 1 whatever GRAD_CLIP_NORM is",
    "factor *= (hp.grad_clip_norm / (norms[:-1].norm() + 1e-6)).clamp(max=1.0)",
    "factor *= (1.0 / (norms[:-1].norm() + 1e-6)).clamp(max=1.0)",
    "test_optim.py::test_gradients_are_a_token_and_no_longer_than_the_limit",
)

fault(
    "the loss counts as a part of the gradient",
    "factor *= (hp.grad_clip_norm / (norms[:-1].norm() + 1e-6)).clamp(max=1.0)",
    "factor *= (hp.grad_clip_norm / (norms.norm() + 1e-6)).clamp(max=1.0)",
    "test_optim.py::test_gradients_are_a_token_and_no_longer_than_the_limit",
)

fault(
    "gradients are those of one process",
    "        all_reduce(self.grads)\n",
    "",
    "test_train.py::test_two_processes_share_a_batch_and_take_one_step",
)

fault(
    "a process keeps its own share of Muon's matrices",
    "    run_collective(dist.all_gather_into_tensor, whole, own)\n",
    "",
    "test_train.py::test_two_processes_share_the_matrices_of_muon",
)

fault(
    "the average decays by 1 − EMA_DECAY",
    "self.average.lerp_(self.weights, 1 - self.hp.ema_decay if self.averages else 1.0)",
    "self.average.lerp_(self.weights, self.hp.ema_decay if self.averages else 1.0)",
    "test_optim.py::test_average_in_closed_form",
)

fault(
    "AdamW adds a constant to its denominators",
    "mean / (square.sqrt() + hp.adam_eps)",
    "mean / (square.sqrt() + 1e-8)",
    "test_optim.py::test_three_steps_equal_separate_optimizers",
)

fault(
    "Muon always iterates five times",
    "return orthogonalize_shared(nesterov, hp.muon_backend_steps)",
    "return orthogonalize_shared(nesterov, 5)",
    "test_optim.py::test_three_steps_equal_separate_optimizers",
)


# ---- Schedules and the training loop


fault(
    "the first steps say how long a step takes",
    "if hp.max_wallclock_seconds and step >= 10 and elapsed_ms > 0:",
    "if hp.max_wallclock_seconds and step >= 1 and elapsed_ms > 0:",
    "test_optim.py::test_learning_rate_schedules",
)

fault(
    "all processes take the same rows",
    "    first = rank() * rows\n",
    "    first = 0\n",
    "test_train.py::test_two_processes_share_a_batch_and_take_one_step",
)

fault(
    "only the first micro-batch is used",
    "return [range(start, start + size) for start in range(first, first + rows, size)]",
    "return [range(first, first + size)]",
    "test_train.py::test_every_step_takes_the_next_windows_at_its_own_rate",
)

fault(
    "the learning rates never change",
    "mean_loss = self.optimizer.step(step, scale)",
    "mean_loss = self.optimizer.step(step, 1.0)",
    "test_train.py::test_every_step_takes_the_next_windows_at_its_own_rate",
)

fault(
    "Muon's momentum stays at its start",
    "mean_loss = self.optimizer.step(step, scale)",
    "mean_loss = self.optimizer.step(0, scale)",
    "test_train.py::test_every_step_takes_the_next_windows_at_its_own_rate",
)

fault(
    "the learning rates do not follow the clock",
    "lr_scale(hp, progress.step, progress.train_ms))",
    "lr_scale(hp, progress.step, 0.0))",
    "test_train.py::test_rates_and_the_end_follow_the_clock",
)

fault(
    "the log has half of the loss",
    "torch.stack([batch.tokens, loss.detach(), batch.dropped])",
    "torch.stack([batch.tokens, loss.detach() / 2, batch.dropped])",
    "test_train.py::test_the_logged_loss_is_that_of_the_step",
)

fault(
    "averaging starts at once",
    "if self.hp.ema_decay and fraction >= self.hp.ema_start_frac:",
    "if self.hp.ema_decay:",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
)

fault(
    "writing checkpoints is training time",
    '            with clock.paused("checkpoints"):\n                trainer.save()',
    "            trainer.save()",
    "test_train.py::test_pauses_are_not_training_time",
)

fault(
    "what the warm-up has learnt is kept",
    "changed = (optimizer.state, optimizer.counts, optimizer.dropped, optimizer.first_bad)",
    "changed = (optimizer.counts, optimizer.dropped, optimizer.first_bad)",
    "test_train.py::test_a_warm_up_leaves_nothing_behind",
)

fault(
    "a validation takes as many masks as the final score",
    "once = dataclasses.replace(self.hp, nelbo_passes=1)",
    "once = self.hp",
    "test_train.py::test_validations_are_short_and_logged_as_they_are",
)

fault(
    "training goes on from the average",
    "        finally:\n            self.optimizer.swap_average()\n",
    "        finally:\n            pass\n",
    "test_train.py::test_the_average_is_what_is_validated_and_kept",
)

fault(
    "the time is the sum over processes",
    "return ms / world_size(), stopped > 0",
    "return ms, stopped > 0",
    "test_train.py::test_two_processes_agree_on_time_signals_and_files",
)

fault(
    "the average waits for the steps, not for the clock",
    "fraction = run_fraction(self.hp, self.progress.step, self.progress.train_ms)",
    "fraction = run_fraction(self.hp, self.progress.step, 0.0)",
    "test_train.py::test_rates_and_the_end_follow_the_clock",
)


# ---- Checkpoints and restarts


fault(
    "a resumed run reads the data again",
    "loss = trainer.step(progress.step, lr_scale(",
    "loss = trainer.step(progress.step - first_step, lr_scale(",
    "test_train.py::test_a_resumed_run_goes_on_where_it_was",
)

fault(
    "a resumed run has all of its time again",
    "    clock.started -= progress.train_ms / 1000\n",
    "",
    "test_train.py::test_a_resumed_run_goes_on_where_it_was",
)

fault(
    "a resumed run starts its average again",
    "        self.optimizer.averages = checkpoint.averages\n",
    "",
    "test_train.py::test_a_resumed_run_goes_on_where_it_was",
)

fault(
    "a resumed run has no moments",
    "self.optimizer.state.copy_(checkpoint.state)",
    "self.optimizer.state[0].copy_(checkpoint.state[0])",
    "test_train.py::test_a_resumed_run_goes_on_where_it_was",
)

fault(
    "a resumed run does not validate the step that it begins with",
    "(every and progress.step and progress.step % every == 0)",
    "(every and progress.step > first_step and progress.step % every == 0)",
    "test_train.py::test_a_restart_validates_what_was_not_validated",
)

fault(
    "CHECKPOINT_EVERY=0 saves after every step",
    "checkpoint_due = hp.checkpoint_every and (finished or waited)",
    "checkpoint_due = finished or waited",
    "test_train.py::test_every_step_takes_the_next_windows_at_its_own_rate",
)

fault(
    "a run goes on with other settings",
    "if changed or checkpoint.data != self.stream.digest:",
    "if checkpoint.data != self.stream.digest:",
    "test_restart.py::test_what_a_restart_says_and_refuses",
)


# ---- Quantizing, packing, artifact


fault(
    "a clip is that of all rows",
    "reach = clip * rows.square().mean(1, keepdim=True).sqrt()",
    "reach = clip * rows.square().mean().sqrt().expand(len(rows), 1)",
    "test_quantize.py::test_a_clip_is_in_root_mean_squares_of_its_row",
)

fault(
    "QUANT_CLIP is ignored",
    "quantize(weight, quantizer, hp.quant_clip, moments.get(name))",
    "quantize(weight, quantizer, 0.0, moments.get(name))",
    "test_quantize.py::test_clip_and_moments_are_those_of_the_parameter",
)

fault(
    "the smallest inputs are rounded first",
    "order = moments.diagonal().argsort(descending=True)",
    "order = moments.diagonal().argsort()",
    "test_quantize.py::test_error_feedback_is_the_regression_on_what_is_not_rounded_yet",
)

fault(
    "errors are doubled instead of cancelled",
    "rest[:, i:].addr_(lost, upper[i, i:], alpha=-1)",
    "rest[:, i:].addr_(lost, upper[i, i:], alpha=1)",
    "test_quantize.py::test_error_feedback_is_the_regression_on_what_is_not_rounded_yet",
)

fault(
    "second moments are those of the last batch",
    "moments[name] = moments.get(name, 0) + moment",
    "moments[name] = moment",
    "test_quantize.py::test_moments_are_of_all_batches_as_the_model_is_told_of_their_noise",
)

fault(
    "the artifact is written without second moments",
    "on_first_process(save_artifact, model, hp, path, moments)",
    "on_first_process(save_artifact, model, hp, path)",
    "test_train.py::test_what_is_packed_is_the_average_and_what_is_scored_is_the_file",
)

fault(
    "the model in memory is scored, not the file",
    "    return read_artifact(path)\n\n\ndef run(",
    "    return Artifact(model, hp, read_artifact(path).label)\n\n\ndef run(",
    "test_train.py::test_what_is_packed_is_the_average_and_what_is_scored_is_the_file",
)

fault(
    "the code is not part of the size",
    "    total = code_bytes + artifact_bytes\n",
    "    total = artifact_bytes\n",
    "test_train.py::test_log_lines_of_an_artifact_have_its_figures",
)

fault(
    "bytes are logged as bits",
    "bits_per_weight:{8 * kind['bytes'] / weights:.3f}",
    "bits_per_weight:{kind['bytes'] / weights:.3f}",
    "test_train.py::test_log_lines_of_an_artifact_have_its_figures",
)


# ---- Scores


fault(
    "bounds mask anchors",
    "masked = mask.to(window.device).view(allowed.shape) & allowed\n",
    "masked = mask.to(window.device).view(allowed.shape)\n",
    "test_anchors.py::test_the_t_step_bound_masks_free_tokens_only",
)

fault(
    "the NELBO forgets how likely a mask size was",
    "p_k = (k.double() / n) ** (1 / power) - ((k - 1).double() / n) ** (1 / power)",
    "p_k = 1 / n.double()",
    "test_scores.py::test_weights_of_the_nelbo_are_exact",
)

fault(
    "all passes of the NELBO mask the same tokens",
    "        masked_before = masked_before + k[:, None]\n",
    "",
    "test_scores.py::test_mask_sizes_are_evenly_spread_and_arcs_do_not_overlap",
)

fault(
    "the last step of the T-step bound masks everything",
    "yield next(keys) < (1 - TSTEP_EPS) * i / steps, 1 / i",
    "yield next(keys) < i / steps, 1 / i",
    "test_scores.py::test_masks_of_the_t_step_bound_and_of_the_grid_are_the_published_ones",
)

fault(
    "the published grid masks no first token",
    "        if t < 0.01:\n            mask[:, 0] = True\n",
    "",
    "test_scores.py::test_masks_of_the_t_step_bound_and_of_the_grid_are_the_published_ones",
)

fault(
    "a token of the chain rule is seen while it is predicted",
    "masked_nll(model, window[rows], steps[rows] >= now",
    "masked_nll(model, window[rows], steps[rows] > now",
    "test_scores.py::test_chain_rule_is_its_definition",
)

fault(
    "the least sure position is revealed first",
    "surest = logp.amax(-1).where",
    "surest = (-logp.amax(-1)).where",
    "test_scores.py::test_confidence_reveals_the_surest_position_first",
)

fault(
    "the random order is from left to right",
    'return score_in_order(model, windows, next(windows.keys("random")))',
    "return score_left_to_right(model, windows)",
    "test_scores.py::test_orders_of_the_chain_rule_scores",
)

fault(
    "a sliding causal window scores its context",
    "return causal_nll(model, windows.tokens, windows.scored)",
    "return causal_nll(model, windows.tokens)",
    "test_scores.py::test_sliding_windows_of_a_causal_model",
)

fault(
    "the chain rule of a sliding window hides its context",
    "windows.tokens, place, windows.hp.chain_group, context)",
    "windows.tokens, place, windows.hp.chain_group)",
    "test_scores.py::test_split_scores_are_their_definitions",
)

fault(
    "the standard error is that of the bits alone",
    "stderr = (bits - bpb * nbytes).square().sum().sqrt() / nbytes.sum()",
    "stderr = (bits - bits.mean()).square().sum().sqrt() / nbytes.sum()",
    "test_scores.py::test_split_score_is_the_ratio_with_its_standard_error",
)

fault(
    "the first sliding window scores its last tokens only",
    "self.length if number == 0 and whole_split else self.stride for number in self.numbers",
    "self.stride for number in self.numbers",
    "test_scores.py::test_sliding_windows_of_a_causal_model",
)

fault(
    "all processes score all windows",
    "for start in range(rank() * self.rows, len(self.numbers), world_size() * self.rows):",
    "for start in range(0, len(self.numbers), self.rows):",
    "test_train.py::test_two_processes_score_every_window_once",
)

fault(
    "scores are those of one process",
    "    all_reduce(table)\n",
    "",
    "test_train.py::test_two_processes_score_every_window_once",
)

fault(
    "anchors of the context are paid for",
    "anchors = (windows.scored & ~maskable(hp, windows.x0)).sum(1).tolist()",
    "anchors = (~maskable(hp, windows.x0)).sum(1).tolist()",
    "test_anchors.py::test_split_scores_pay_for_the_places_once",
)

fault(
    "the biased estimator is not marked",
    '"tgrid": Estimator(score_tgrid, windows=256, biased=True),',
    '"tgrid": Estimator(score_tgrid, windows=256),',
    "test_scores.py::test_score_lines_have_the_figures_of_the_score",
)

fault(
    "the exact line has the loss twice",
    'exact = f"val_loss:{score.loss:.8f} val_bpb:{score.bpb:.8f}"',
    'exact = f"val_loss:{score.loss:.8f} val_bpb:{score.loss:.8f}"',
    "test_scores.py::test_score_lines_have_the_figures_of_the_score",
)

fault(
    "tokens per second are tokens per millisecond",
    "speed = 1000 * self.tokens / self.ms",
    "speed = self.tokens / self.ms",
    "test_scores.py::test_score_lines_have_the_figures_of_the_score",
)

fault(
    "the bound of a sliding window pays for its context",
    "return any_order_nll(model, tokens, scored, hp.nelbo_passes, numbers, offset, keys)",
    "return any_order_nll(model, tokens, scored | True, hp.nelbo_passes, numbers, offset, keys)",
    "test_scores.py::test_the_bound_of_overlapping_windows_pays_for_what_it_scores",
)

fault(
    "the bound of a window forgets the token before it",
    "    hp, tokens, scored, places = windows\n",
    "    hp, tokens, scored, places = windows\n    tokens = with_before(windows.x0)\n",
    "test_scores.py::test_the_bound_of_overlapping_windows_pays_for_what_it_scores",
)

fault(
    "the confidence score forgets the token before a window",
    "return confidence_nll(model, windows.tokens, windows.hp.chain_group)",
    "return confidence_nll(model, with_before(windows.x0), windows.hp.chain_group)",
    "test_blocks.py::test_a_run_with_blocks_trains_packs_and_is_scored_again",
)

fault(
    "groups of a chain rule are counted from the start of the window",
    "steps = (ranks(place).flatten(-2).to(x0.device) - context) // group",
    "steps = ranks(place).flatten(-2).to(x0.device) // group - context // group",
    "test_scores.py::test_split_scores_are_their_definitions",
)

fault(
    "the order of confidence depends on rounding",
    "surest) * 2**12).round()",
    "surest) * 2**40).round()",
    "test_scores.py::test_positions_that_are_almost_equally_sure_are_revealed_from_left_to_right",
)


# ---- Tools


fault(
    "a text that does not come back is compressed",
    "    if loaded.tokenizer.decode(tokens.tolist()) != text:\n",
    "    if False:\n",
    "test_codec.py::test_a_lossy_tokenizer_is_noticed",
    file="tools/codec.py",
)

fault(
    "another artifact decodes",
    "    if header.artifact_id != loaded.artifact_id:\n",
    "    if False:\n",
    "test_codec.py::test_what_cannot_be_decoded_is_said_in_one_line",
    file="tools/codec.py",
)

fault(
    "the difference has the other sign",
    "difference=tm.bits_per_byte(first_bits - second_bits, nbytes),",
    "difference=tm.bits_per_byte(second_bits - first_bits, nbytes),",
    "test_compare.py::test_paired_difference_by_position",
    file="tools/compare.py",
)

fault(
    "the deviation of a record is too small",
    "val_bpb_std=round(statistics.stdev(bpbs), 8)",
    "val_bpb_std=round(statistics.pstdev(bpbs), 8)",
    "test_record.py::test_record_is_made_from_the_logs_and_checks",
    file="tools/make_record.py",
)

fault(
    "an edited record passes",
    "        if stated.get(name) != derived.get(name):\n",
    "        if False:\n",
    "test_record.py::test_an_edited_record_is_found_out",
    file="tools/make_record.py",
)

fault(
    "a sweep compares runs of other lengths",
    'if old["planned_tokens"] == planned_tokens and same_text(',
    "if same_text(",
    "test_sweep.py::test_runs_are_compared_at_equal_length",
    file="tools/sweep.py",
)

fault(
    "data with wrong byte counts are written",
    "            if counted != true_bytes:\n",
    "            if False:\n",
    "test_data.py::test_a_tokenizer_with_a_wrong_byte_table_is_refused",
    file="data/prepare_text.py",
)

fault(
    "a token is lost between two shards",
    "        self.parts = [rest]\n",
    "        self.parts = [rest[1:]]\n",
    "test_data.py::test_prepared_data_is_deterministic_and_split_by_document",
    file="data/prepare_text.py",
)

fault(
    "a damaged download is kept",
    "        if digest != etag:\n",
    "        if False:\n",
    "test_fetch.py::test_what_is_damaged_on_its_way_is_refused_and_fetched_again",
    file="data/fetch_fineweb.py",
)

fault(
    "a noisy token sees the clean tokens of its own block",
    "first[:, None] > clean]",
    "first[:, None] + block > clean]",
    "test_blocks.py::test_no_gradient_comes_from_what_a_decoder_does_not_have",
)

fault(
    "the token before a block is seen twice",
    "first[:, None] > clean]",
    "first[:, None] >= clean]",
    "test_blocks.py::test_the_mask_is_that_of_the_definition",
)

fault(
    "a noisy token has clean neighbours of its own block",
    "end = torch.cat([first, clean + 1])",
    "end = torch.cat([first + block, clean + 1])",
    "test_blocks.py::test_no_gradient_comes_from_what_a_decoder_does_not_have",
)

fault(
    "a clean token of a block model sees the clean ones after it",
    "neighbors, causal=True, mask=mask)",
    "neighbors, mask=mask)",
    "test_blocks.py::test_one_pass_predicts_each_block_from_the_clean_past_and_itself",
)

fault(
    "flex attention chooses its kernel itself",
    "FORCE_USE_FLEX_ATTENTION=True",
    "FORCE_USE_FLEX_ATTENTION=False",
    "test_cuda_paths.py::test_few_noisy_tokens_with_grouped_heads_have_a_kernel",
)

fault(
    "clean tokens come before the noisy ones",
    "torch.cat([y, others], dim=2)",
    "torch.cat([others, y], dim=2)",
    "test_blocks.py::test_one_pass_predicts_each_block_from_the_clean_past_and_itself",
)

fault(
    "a block begins with its own first token",
    "window[:, columns[::block]]",
    "window[:, 1 + columns[::block]]",
    "test_blocks.py::test_no_gradient_comes_from_what_a_decoder_does_not_have",
)

fault(
    "a noisy token is predicted where it stands itself",
    "column // block + column",
    "column // block + column + 1",
    "test_blocks.py::test_the_chain_rule_is_its_definition",
)

fault(
    "a noisy token has neighbours in the next block",
    "(wanted <= end + block)",
    "(wanted <= length)",
    "test_blocks.py::test_no_gradient_comes_from_what_a_decoder_does_not_have",
)

fault(
    "a clean token is paid for where it is seen",
    "places[:, -hp.train_seq_len :]",
    "places[:, : hp.train_seq_len]",
    "test_blocks.py::test_a_batch_scores_masked_tokens_and_every_clean_one",
)

fault(
    "clean tokens have the weight 1",
    "hp.causal_weight",
    "1.0",
    "test_blocks.py::test_the_loss_is_the_bound_and_the_weighted_causal_loss",
)

fault(
    "the first blocks of a window are the noisy ones",
    ".topk(blocks).indices.sort().values",
    "[:blocks].argsort()",
    "test_blocks.py::test_noisy_blocks_that_are_left_out_change_nothing_for_the_others",
)

fault(
    "a loss with fewer noisy blocks is divided by fewer tokens",
    "        tokens=clean.tokens,\n",
    "",
    "test_blocks.py::test_a_step_masks_a_share_of_the_blocks",
)

fault(
    "a score may have blocks that the model knows nothing of",
    'name == "block_size" and asked and there',
    'name == "block_size" and asked',
    "test_blocks.py::test_an_artifact_has_blocks_or_none",
)

fault(
    "all blocks of a window have one mask size",
    "* len(blocks) + blocks)",
    "* len(blocks) + 0 * blocks)",
    "test_blocks.py::test_the_bound_spreads_its_mask_sizes_over_all_blocks",
)

fault(
    "a score has the blocks of training",
    "    model.block_size = hp.block_size\n",
    "",
    "test_blocks.py::test_a_run_with_blocks_trains_packs_and_is_scored_again",
)

fault(
    "a shuffled window comes twice in an epoch",
    "if math.gcd(n, count) == 1)",
    "if n > 0)",
    "test_data.py::test_shuffled_windows_are_all_over_the_text_and_each_once_an_epoch",
)

fault(
    "shuffled windows are of text that the run does not reach",
    "reached = min(stream.total, hp.iterations * hp.train_batch_tokens)",
    "reached = stream.total",
    "test_data.py::test_shuffled_windows_are_all_over_the_text_and_each_once_an_epoch",
)

fault(
    "shuffled windows are near each other",
    "itertools.count(round(GOLDEN * count))",
    "itertools.count(1)",
    "test_data.py::test_shuffled_windows_are_all_over_the_text_and_each_once_an_epoch",
)

fault(
    "a batch is not shuffled",
    "        numbers = scattered(hp, stream, numbers)\n",
    "        pass\n",
    "test_data.py::test_a_shuffled_batch_has_the_shuffled_windows",
)

fault(
    "kept keys are all at the start of the text",
    "rotary = tm.rotary_table(self.hp, place[old - first :])",
    "rotary = tm.rotary_table(self.hp, place[old - first :] - old)",
    "test_decoding.py::test_causal_predictions",
    file="tools/decoding.py",
)

fault(
    "a kept token has neighbours on its right",
    "last = torch.where(place < all_clean, place, total - 1)",
    "last = torch.full_like(place, total - 1)",
    "test_decoding.py::test_blocks_are_predicted_as_they_are_scored",
    file="tools/decoding.py",
)

fault(
    "keys and values of several heads are mixed up",
    ".unflatten(-1, (2, -1, own.head_dim)).unbind(2)",
    ".unflatten(-1, (-1, 2, own.head_dim)).unbind(3)",
    "test_decoding.py::test_causal_predictions",
    file="tools/decoding.py",
)

fault(
    "the causal decoder rounds as training does",
    "@torch.no_grad()  # with gradients, CPUs may round: see tm.multiply\n",
    "",
    "test_decoding.py::test_nothing_is_rounded_where_training_rounds",
    file="tools/decoding.py",
)

fault(
    "confidence is a random order",
    'sliding=True),\n        "confidence": Estimator(score_by_confidence, windows=256, rows=16)',
    'sliding=True),\n        "confidence": Estimator(score_random_order, windows=256)',
    "test_scores.py::test_every_score_of_a_split_is_the_one_of_its_name",
)

fault(
    "the causal half of a block model is scored in blocks",
    '"ar": Estimator(score_causally, prefixes=True),\n        "nelbo"',
    '"ar": Estimator(score_left_to_right, prefixes=True),\n        "nelbo"',
    "test_scores.py::test_every_score_of_a_split_is_the_one_of_its_name",
)

fault(
    "the host runs ahead of the device",
    "        self.step_done.synchronize()  # one step",
    "        # one step",
    "test_train.py::test_the_host_is_one_step_ahead_at_most",
)

fault(
    "a pause begins before the device is idle",
    "        since = self.now()\n        yield\n",
    "        since = time.perf_counter()\n        yield\n",
    "test_train.py::test_a_pause_begins_and_ends_when_the_device_is_idle",
)

fault(
    "one process alone leaves a validation",
    "    if all_reduce(torch.tensor(float(told_to_stop()))) > 0:\n",
    "    if told_to_stop():\n",
    "test_train.py::test_one_process_that_is_told_to_stop_stops_all",
)

fault(
    "every process looks for checkpoints of its own",
    "on_first_process(checkpoint_paths, hp.run_id)",
    "checkpoint_paths(hp.run_id)",
    "test_train.py::test_the_first_process_says_where_a_run_goes_on",
)

fault(
    "the loss of a score lacks the places of anchors",
    "loss=bits.sum().item()",
    "loss=table[..., 0].sum().item()",
    "test_anchors.py::test_split_scores_pay_for_the_places_once",
)

fault(
    "a score is written into the log of an unfinished run",
    " or hp.eval_only\n    if finished",
    "\n    if finished",
    "test_train.py::test_scoring_leaves_an_unfinished_run_alone",
)

fault(
    "a line goes on with the half line before",
    '    elif not text.endswith("\\n"):\n        log.lock.write("\\n")\n',
    "",
    "test_train.py::test_half_a_line_of_an_earlier_life_is_ended",
)

fault(
    "a model is told noise that it never saw",
    "clamp(min=1e-3)",
    "clamp(min=1e-6)",
    "test_model.py::test_the_dit_is_told_no_noise_that_training_never_shows",
)

fault(
    "skipped steps are forgotten in a restart",
    "counts.copy_(torch.tensor(checkpoint.counts))",
    "counts[:1].copy_(torch.tensor(checkpoint.counts[:1]))",
    "test_train.py::test_skipped_steps_are_those_of_all_lives",
)

fault(
    "the time of training has no limit",
    "BUDGET_SECONDS + 1  # the",
    "math.inf  # the",
    "test_train.py::test_budgets_of_time_that_a_run_exceeds_are_said",
)

fault(
    "the time of scoring has no limit",
    '- started, BUDGET_SECONDS, "s")',
    '- started, math.inf, "s")',
    "test_train.py::test_budgets_of_time_that_a_run_exceeds_are_said",
)

fault(
    "the last step is no training time",
    "            clock.now()\n            progress.train_ms",
    "            progress.train_ms",
    "test_train.py::test_the_step_that_is_still_running_is_training_time",
)

fault(
    "a pass of a score takes more than MICRO_BATCH_TOKENS",
    "max(min(rows, hp.micro_batch_tokens // self.length), 1)",
    "max(rows, 1)",
    "test_scores.py::test_plans_of_windows",
)

fault(
    "PAD and anchors are masked",
    "    return mask & allowed, weight.clamp",
    "    return mask, weight.clamp",
    "test_documents.py::test_pad_and_anchors_are_neither_masked_nor_scored",
)
