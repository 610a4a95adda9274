"""What the man pages say about each verb beyond its own help: examples, output, JSON."""

from __future__ import annotations

from typing import Any

import yaml

# ``schemas``: the --json documents and their main keys; "lines" where there is one for each item. ``defaults``: like
# DEFAULTS, for this verb only.
VERBS: dict[str, dict[str, Any]] = yaml.safe_load("""
compress:
  examples:
    freres compress video.mp4 --budget 1280: Write bundle.pt with at most 1,280 visual tokens.
    freres compress video.mp4 --model Qwen/Qwen2-VL-7B-Instruct: Use a larger model, with the preset long-video.
    freres compress clips/ -o bundles/: Compress every video in a folder. Run it again to resume after a stop.
    freres compress a.mp4 b.mp4 more.txt -o bundles/ --json: Files and a list of paths; one JSON line for each video.
    freres compress video.mp4 --start 60 --end 90 --fps 10 -o part.pt: Half a minute, 10 frames a second.
    freres compress video.mp4 --quality 0.95: As few tokens as keep 95 % of the energy.
    freres compress video.mp4 --method uniform --budget 1280: A baseline in place of adaptive.
    freres compress video.mp4 --budget 1280 --dry-run: Show the token allocation; encode nothing.
    freres compress video.mp4 --method fre-res --set temporal_share=0.4: The paper's method, with one setting changed.
  output: >-
    The path of the bundle, one line for each video. Token counts, time and peak memory go to stderr, as does a warning
    for each video that failed. `context_tokens` are all tokens of the prompt without a question; `text_overhead_tokens`
    are those inside the video that are not visual, such as the time of each frame. A family that writes text around every
    frame gets at most 10 % of it: ask then moves tokens that stand for more than one frame to frames that they share, and
    `moved_tokens`, `moved_outside` (those that leave the time they stand for), `mean_shift_s` and `max_shift_s` say how
    far. Anchor tokens never move; if their frames alone need more text, it is counted as it is. All of these are null if
    the model's tokenizer cannot be read. With `--dry-run`, the first two are upper bounds, because the frames that will
    hold tokens are not known yet, and the kinds of fre-res are those of a clip without cuts. With `--quality`, the number
    of visual tokens is known only once the frames are encoded: `--dry-run` has null for it. Method adaptive records
    `quality`, the share of energy that its bundle keeps; a note says so if it is below the one asked for. It is null for
    other methods. Frames are read and resized while others are encoded, and on a GPU most methods work beside the tower,
    so the stages of `timings_s` may add up to more than `total`; `decode` is the time of the thread that reads. With
    `--residual-grid`, only anchor frames pass the tower at their whole grid; every frame, anchors too, passes it at the
    smaller one, from which events and residuals are taken. The file is decoded once for both grids. `encoded_tokens`
    counts both. With `--set line_levels=N`, it counts the frames that passed the tower; see freres(7).
  schemas:
    freres.compress/1:
      bundle bundle_bytes visual_tokens budget_tokens full_tokens compression retention tokens_by_kind quality
      context_tokens text_overhead_tokens moved_tokens moved_outside mean_shift_s max_shift_s grid timings_s
      peak_memory_bytes model source sampling settings notes environment
    freres.compress_many/1 lines with several videos:
      video status (done, skipped or failed) bundle; then the keys of freres.compress/1 if done, token counts if skipped,
      message and exit_status if failed
    freres.plan/1 with --dry-run:
      method quality visual_tokens budget_tokens full_tokens compression tokens_by_kind context_tokens text_overhead_tokens
      frames baseline_frames grid num_gops
      num_coefficients pooled_grid max_events is_lossless settings environment
  defaults: {method: the preset's, variant: the preset's, fps: the preset's sample, frames: the preset's sample,
    grid: the preset's, residual_grid: the preset's, start: the beginning of the video, end: the end of the video,
    output: "bundle.pt, or the folder bundles for several videos"}
batch:
  examples:
    freres batch clips/ -o bundles/: Every video in a folder. Run it again to resume after a stop.
    freres batch "clips/**/*.mp4" list.jsonl -o bundles/ --actors 4: A pattern and a list with settings; four workers.
    freres batch s3://bucket/clips -o s3://bucket/bundles --rows rows.jsonl: Videos and bundles on an object store.
    freres batch clips/ -o bundles/ --engine ray --address auto --actors 16: Sixteen workers on the Ray cluster of this node.
  output: >-
    The path or URL of each bundle, in the order in which they are done. A note for each video, or a warning if it failed,
    goes to stderr. At the end the rows of all videos, in the order of the lists, are written to `--rows`, one JSON object a
    line, with the keys below; the file is there only if the run came to its end. `status` is done, skipped (the same bundle
    was there) or failed; `error` is the message and `exit_status` its number, null and 0 if there was none. `total_s` is
    the wall time of the video in its worker, with fetching and storing; `timings_s` has its stages. `tries` is 2 if a
    worker broke on it before.
  schemas:
    freres.batch/1 lines:
      video bundle status visual_tokens full_tokens video_s video_bytes bundle_bytes total_s timings_s tries error exit_status
  defaults: {method: the preset's, variant: the preset's, fps: the preset's sample, frames: the preset's sample,
    grid: the preset's, start: the beginning of the video, end: the end of the video,
    actors: "one for each GPU, or one", address: a cluster of its own on this machine,
    rows: rows.jsonl in the folder of the bundles}
plan:
  examples:
    freres plan video.mp4 --model Qwen/Qwen2-VL-7B-Instruct --budget 6600 --device-memory 24GiB: Does it fit a GPU of 24 GiB?
    freres plan video.mp4 --model my-model --device-memory 80GB --tflops 400: Times on a device that is not this one.
    freres plan video.mp4 --device cpu --json: The bundled model on this machine, as one document.
  output: >-
    Frames and tokens as `freres compress --dry-run` gives them, then the work and estimated time of each stage, the parts
    of the peak memory of compress and of ask with their formulas, and whether the larger of the two fits `--device-memory`;
    if not, `fits` is false, the exit status is 6, and the message has the largest budget that fits. Letters: n frames of R
    patches in a batch of the tower, w and I the widths of a row in the layers and inside their MLPs, b bytes of a number, C
    channels and S visual tokens, N tokens of a frame, L rows of the prompt, q rows of a pass of the prefill, K coefficients
    of a cell. Parts marked host are not in a GPU's memory. With `--device-memory`, and no `--device cpu`, a CUDA device is
    planned for, whose context is taken to be 0.5 GiB; on the CPU the interpreter and its libraries, about 0.4 GiB, are not
    counted, nor is memory that the C library keeps after it was freed (up to a third more, on small models), nor the page
    cache while weights are read. FLOPs count every multiplication and addition of matrices and attention, masked ones
    too. Times are estimates: one stage after the other, at the speed of a large matrix product on this device, or at
    `--tflops`; with that, the time per token of an answer is null, because it depends on the bandwidth of the memory. For a
    GPU that is not here, the times of tower and decoder are null without `--tflops`. Of the model, the configs and the
    tokenizer are read, and of its weights, if they are in a folder, in which dtype they are stored.
  schemas:
    freres.plan/2:
      the keys of freres.plan/1; model dtype device_memory_bytes fits largest_budget peak_memory_bytes base_memory_bytes
      kv_bytes frame_tower_flops prefill_chunk_tokens speed (flops_per_s bytes_per_s source) stages (name flops seconds
      assumes) memory (compress ask, each with bytes and parts (name num_bytes formula is_on_device)) kv_dtype weight_dtype
      notes environment
  defaults: {device_memory: nothing is compared, tflops: measured on this device, method: the preset's}
ask:
  examples:
    freres ask bundle.pt "What moves first?": Stream an answer.
    freres ask bundle.pt "Which way?" --choices "left|right": Choose an option; print probabilities.
    freres ask bundle.pt: Read questions line by line; the video is prefilled once.
    freres ask bundle.pt "What moves first?" --where: Also say which seconds the model attended to.
    freres ask bundle.pt - --json < question.txt: Read the question from stdin; print one document.
    freres ask bundle.pt --questions questions.jsonl --json: Answer a file of questions from one prefill.
    freres ask bundle.pt "what moves first?" --refine 64: Only the 64 visual tokens that this question needs.
  output: >-
    The answer. `--choices` adds a line with the probability of each option; `--questions` prints one line for each
    question. Costs go to stderr. `context_tokens` are all tokens of the prompt with the question; the other counts of text
    are as in freres-compress(1), and a note says how many tokens moved. A question with its options may have at most
    16,384 bytes of UTF-8. A bundle made with the embedded weights of another release opens with --model and a folder of
    those. With --refine, `visual_tokens` and the counts of text are those of the question, what moved is that of the bundle,
    and `refined_tokens` is B, or null if all tokens are kept.
  schemas:
    freres.ask/1:
      bundle question answer choices visual_tokens refined_tokens context_tokens text_overhead_tokens moved_tokens
      moved_outside mean_shift_s max_shift_s new_tokens ttft_s cold_ttft_s tpot_s load_s finish_reason
      model kv_dtype weight_dtype text_after notes environment where (num_layers visual_share, and spans with start_s
      end_s share token_share)
    freres.answer/1 lines with --questions:
      id question answer choices visual_tokens refined_tokens context_tokens new_tokens finish_reason notes
  defaults: {choices: none (a free answer), questions: none, refine: none (every token),
    adapter: "the bundled model's own, none for others", model: the bundle's,
    revision: the bundle's, text_after: the bundle's}
profile:
  examples:
    freres profile bundle.pt: Prefill, TTFT, TPOT and memory of a bundle and of the full-token run.
    freres profile video.mp4 --budget 1280 --repeat 5: Decode, encode and compress as well.
    freres profile video.mp4 --method fre-res --set anchors=12: The paper's method, with one setting changed.
    freres profile --json > profile.json: A clip made on the spot; every figure with its spread.
  output: >-
    A table with a row for the compressed clip and one for the full-token run of the same model. Figures are medians. A row
    that could not be measured says why: out_of_memory, context_exceeded or timed_out. If that is the compressed clip, or
    every row of a table, the exit status is 6. `--plot` needs matplotlib: pip install 'freres[plot]'.
  schemas: {freres.profile/1: target question repeat warmup model rows plot environment}
  defaults: {method: the preset's, timeout: "1800, and 110 with a table", table: a clip or a bundle is measured,
    plot: none (nothing is drawn), model: "bundled, or the bundle's (null in the JSON)",
    revision: "the hub's main branch, or the bundle's"}
eval:
  examples:
    freres eval questions.jsonl: The bundled model, four methods at four budgets.
    freres eval questions.jsonl --methods full,uniform,fre-res,blind --budgets 0.25,640: A share of each clip, and a count.
    freres eval questions.jsonl -o answers.jsonl --json > result.json: Keep every answer; run it again to resume after a stop.
    freres eval questions.jsonl --csv rows.csv --plot rows.png: Rows for a spreadsheet, and accuracy against tokens.
    freres eval questions.jsonl --preset compact-16f --set track_density=1: Every method from the same 16 frames.
    freres eval questions.jsonl --shard 2/8 -o part2.jsonl: The second of eight runs that share the videos.
    freres eval questions.jsonl --join part1.jsonl --join part2.jsonl: The whole, from the files of two shards.
    freres eval MVBench/ --budgets 1280: A local copy of a public benchmark, scored by its own prompt and rule.
    freres eval NExT-QA/ --benchmark nextqa:val: The validation split of another.
  output: >-
    Tables: a row for each method and budget with its accuracy, one with its cost, accuracy by category, and the differences
    between methods at equal budgets, paired by video (above 40, only those from the first of `--methods` with a budget). A
    paired difference can separate methods whose own intervals overlap (`differences` in the JSON has those from full as
    well). `accuracy` counts every question once, `mean_over_categories` every category once; `retention` is accuracy over
    that of full. Intervals are 95 % percentile bootstrap intervals over 2,000 resamples (seed 0) of whole videos, each with
    all its parts, because the answers to questions about one video depend on each other. Where all n videos agree (every
    answer right, every one wrong, or two methods that never differ) no resample says anything, and the interval is the
    exact one-sided Clopper-Pearson bound by videos: all right is at least 0.05^(1/n). Videos are fewer than questions, so
    that is wide rather than narrow. An interval is null for a single video. Each is a single 95 % interval: none is
    corrected for the number of comparisons in a table, so of twenty differences that are none, one can be expected to look
    certain. Tokens are means over videos (`_max` is the largest), times are medians: `compress_s` from latents to tokens
    (with a GPU, on it for adaptive and fre-res and on the CPU for the others), `ttft_s` for a video's first question with
    its prefill, `next_ttft_s` for the others. `context_tokens` is the whole prompt with its text and the question, a mean
    over questions. `num_frames` is how many frames a row's tokens are made from, and `encoded_tokens` how many tokens pass
    the tower for them, as if the row were run alone: means over videos. A note says where rows differ in frames. `adapter`
    is the file of trained modules that a row used, and a note names it: fre-res uses the bundled model's own unless
    `--adapter none`. `kv_cache_bytes` is what the cache of the longest prompt takes, computed from the model's shape, and
    null for methods that prune in the decoder. `peak_memory_bytes` is the most allocated on the GPU while any video was
    prefilled and asked about, with the model; it is null on a CPU, where memory cannot be told apart by row. A method that
    fails on a video is a warning: its row has `num_videos` of the others, `failed` says why, and `retention` and
    `differences` compare two rows on the videos that both have. Of a video that is damaged or cut short, what can be read
    counts: a warning says how many there are, and `video_notes` has the seconds lost and the notes on each video that was
    read with any. Where answers came with notes, such as positions beyond the model's context, one of each kind is shown,
    with the number of rows that have it. `--csv` has a line for each row, an empty cell for what is unknown, and four
    columns for each category. `--plot` needs matplotlib: pip install 'freres[plot]'. The `--output` file, freres-results(5),
    has a header and a line for each video. A file from a different run is refused: of another release, with other
    questions, methods, settings, adapters, device, precision or attention kernel, or of a model with another config,
    tokenizer, chat template or other weights (256 values of each tensor are compared). Failed videos are tried again.
    `scoring` says how answers were made and read: of a benchmark, which prompt and rule were used.
  schemas:
    freres.eval/1:
      questions_file questions_sha256 num_questions num_videos failed video_notes (video lost_s notes) full_tokens
      full_tokens_max decode_s encode_s intervals rows (method label settings adapter adapter_sha256 budget
      budget_tokens budget_tokens_max visual_tokens visual_tokens_max context_tokens num_frames encoded_tokens
      num_videos failed accuracy ci_low ci_high retention chance num_questions mean_over_categories by_category
      compress_s prefill_s ttft_s next_ttft_s kv_cache_bytes peak_memory_bytes) differences (method minus budget
      num_questions difference ci_low ci_high mean_over_categories) results_file csv plot scoring (benchmark answers
      prompt extraction) num_videos_resumed joined_files num_rows_joined shard model
      kv_dtype weight_dtype settings notes environment
  defaults: {output: none (nothing is kept), limit: every question, shard: every video,
    joined: none, table: none (nothing is written),
    benchmark: "by the files in the folder; none for a file",
    plot: none (nothing is drawn),
    adapter: "the bundled model's own, none for others"}
fidelity:
  examples:
    freres fidelity video.mp4: What six methods keep at three budgets; no language model is loaded.
    freres fidelity clips/ --methods dtd,fre-res --budgets 0.1 --json: Every video of a folder, with what each second loses.
    freres fidelity video.mp4 --model Qwen/Qwen2-VL-7B-Instruct --plot kept.png: Another model's tower, and a picture.
  output: >-
    A table with a row for each method and budget: tokens and the share of energy that hold and linear keep, means over
    the videos, each of which counts once. For several videos a second table lists each of them. A video that cannot be
    used is a warning, and counts for no mean. One that is damaged or cut short is measured as far as it can be read,
    and a warning says so; the JSON has the seconds lost and the notes on each. In the JSON, `lost_by_second_hold` and
    `lost_by_second_linear` have the share of the clip's energy that is lost in each second after its first frame; each
    sums to 1 minus the share kept.
    `--plot` needs matplotlib: pip install 'freres[plot]'. It shows the seconds of at most 6 videos, at the smallest
    budget of each method, by the reader that keeps more. `num_frames` of a row is how many frames its tokens are made
    from. A note says where rows differ in them: each is judged on the frames that the settings name.
  schemas:
    freres.fidelity/1:
      rows (method budget budget_tokens visual_tokens full_tokens num_frames kept_hold kept_linear) videos (video num_frames
      full_tokens lost_s notes and rows with lost_by_second_hold lost_by_second_linear) failed (video message) plot
      model settings notes environment
  defaults: {plot: none (nothing is drawn)}
compare:
  examples:
    freres compare video.mp4: What four methods keep at a quarter of the tokens; no language model is loaded.
    freres compare video.mp4 --methods full,evs,adaptive --question "What moves first?": Their answers, side by side.
    freres compare video.mp4 --budgets 0.25,0.1 --question "Which way?" --choices "left|right": With probabilities.
  output: >-
    A table with a row for each method and budget: tokens, the share of energy that hold and linear keep, and seconds
    from latents to tokens (with a GPU, on it for adaptive and fre-res and on the CPU for the others). With `--question`
    also all tokens of the longest prompt, the prefill, and the time to the first token of the first question, which
    includes it; later questions reuse the prefill. Then a table for each question, with the answer of each method, and
    with `--choices` the probability of the option it chose. An answer that was cut at `--max-new-tokens` ends in three
    dots. Fre-Res is rebuilt from its tracks, as in freres-fidelity(1). blind has no tokens, and so no shares; nor have
    methods that need the question. Times are of one run without a warm-up: see freres-profile(1) for repeated ones.
    `num_frames` of a row in the JSON is how many frames its tokens are made from; a note says where rows differ in
    them.
  schemas:
    freres.compare/1:
      video num_frames full_tokens decode_s encode_s questions
      rows (method budget status (ok or failed) message budget_tokens visual_tokens full_tokens num_frames adapter
      context_tokens kept_hold kept_linear compress_s prefill_s ttft_s notes
      answers (question answer choices context_tokens new_tokens finish_reason ttft_s)) model settings notes environment
  defaults: {question: none (no language model is loaded), choices: none (free answers),
    adapter: "the bundled model's own, none for others"}
train:
  examples:
    freres train data.jsonl --model Qwen/Qwen2-VL-2B-Instruct: Write adapter.safetensors.
    freres train data.jsonl -o a.safetensors --steps 200 --cache bundles: Keep the compressed videos in the folder bundles.
    "torchrun --nproc-per-node 4 $(command -v freres) train data.jsonl": Four GPUs, with the same steps as one.
  output: >-
    The adapter's path. Training and validation loss, validation accuracy and the time left go to stderr. The loss is the
    mean negative log-likelihood of the true answer's tokens, plus 4 times the divergence of the options' probabilities from
    those of the same model with every token, at temperature 2, plus 0.001 times the squared distance of the gates from 1.
    The adapter holds digests of the model's config, of its projector and of samples of all its weights, the settings, the
    data's SHA-256, the recipe, every validation, and how the SHA-256 of each video begins: eval and compare note the videos
    that it was trained on. The cache keeps the bundles and the scores of the model with every
    token. A clip whose tokens are too many for the model or for the memory has no such scores, and is learned from its
    answers alone. What did not fit in memory is tried again on a device of another kind, or with another amount of
    memory; to have it tried again on the same one, remove the cache. Of a damaged video, what can be read is used, and a
    warning says so.
  schemas:
    freres.train/1:
      adapter method variant settings recipe data_sha256 num_questions num_videos num_videos_untaught
      num_videos_teacher_failed num_videos_damaged num_left_out num_parameters share_of_model steps best_step validation
      history train_s cache failed
      video_notes (video lost_s notes) environment
  defaults: {rank: "the largest power of two up to 64 that trains at most 1 % of the model", cache: FILE.cache}
ablate:
  examples:
    freres ablate questions.jsonl -o out --train data.jsonl: Train five adapters, fill all tables at a quarter of the tokens.
    freres ablate MVBench -o out --tables anchors --budgets 0.5,0.25: One table, on a local benchmark, without training.
  output: >-
    The tables of freres eval, with a row for each setting; `--json` has the paired difference between any two rows at equal
    budgets. DIR keeps the adapters, the compressed videos and every answer.
  schemas: {freres.ablate/1: the keys of freres.eval/1 and tables and plot}
  defaults: {data: nothing is trained, limit: every question, plot: none (nothing is drawn), benchmark: as the files tell}
inspect:
  examples:
    freres inspect bundle.pt: What is inside, on one screen.
    freres inspect bundle.pt --all: With every GoP, every setting and where it came from, and every note.
    freres inspect bundle.pt --tokens: With a row for each visual token.
    freres inspect bundle.pt --absorber out.png --adapter modules.safetensors: Draw what the absorber took, and from where.
  output: >-
    Source, model, tokens, context, residual energy kept, GoPs and settings. The counts of text are those that the bundle
    records, as in freres-compress(1). The spectrum is shown with its null, the spectrum of
    independent noise frames. Bundles of other methods have no residual energy or GoPs. Those of method adaptive have
    `stretches` in their place: the quality, that at other budgets (`curve`: of this clip), how many frames and
    cells a stretch covers, and the cuts. `--absorber` adds a line about
    the picture, which shows at most 20 GoPs, those with the most energy; `--json` has the maps of all.
  schemas:
    freres.inspect/1:
      bundle bundle_bytes bytes_per_token schema_version visual_tokens budget_tokens full_tokens compression retention
      tokens_by_kind context_tokens text_overhead_tokens moved_tokens moved_outside mean_shift_s max_shift_s model source
      sampling geometry settings history channels latents_dtype quality energy gops tokens
      over_time (edges_s tokens tokens_by_kind lost_energy why_no_loss note)
      stretches (quality curve num_cuts cuts_s frames_mean frames_max cells_mean cells_max num_single largest)
      absorber (picture adapter height_px width_px gamma pooled_grid gops_shown notes gops) environment
  defaults: {absorber: none (nothing is drawn), adapter: "the bundled model's own, none for others; it needs --absorber"}
report:
  examples:
    freres report bundle.pt: Write report.html; open it in any browser.
    freres report bundle.pt --video video.mp4 -o page.html: With a thumbnail for each part of the clip.
  output: >-
    The path of the page. Its size and the number of thumbnails go to stderr, as does a note if the video is not the file
    that was compressed. A clip of 1,800 frames gives a page of well under a megabyte.
  schemas: {freres.report/1: bundle report report_bytes num_thumbnails notes environment}
  defaults: {video: none (no thumbnails), adapter: "the bundled model's own, none for others"}
repack:
  examples:
    freres repack bundle.pt --budget 320 -o small.pt: Cut a bundle to 320 visual tokens.
    freres repack bundle.pt --quality 0.9 -o small.pt: As few tokens as keep 90 % of the energy (method adaptive).
    freres repack bundle.pt --deepstack drop -o small.pt: Leave out the DeepStack rows; answers change.
  output: >-
    The new bundle's path. Token counts go to stderr. Bundles of methods other than fre-res and adaptive cannot be cut,
    because their tokens have no order of importance. With `--budget` and `--quality`, the cut bundle keeps to the budget,
    and a note says if its quality is below the one asked for. A bundle that keeps less already keeps all its
    tokens. One of `--budget`, `--quality` and `--deepstack` is needed.
  schemas:
    freres.repack/1:
      bundle bundle_bytes source_bundle visual_tokens budget_tokens full_tokens compression retention tokens_by_kind quality
      context_tokens text_overhead_tokens moved_tokens moved_outside mean_shift_s max_shift_s notes environment
  defaults: {budget: all tokens are kept, quality: none, deepstack: unchanged}
export:
  examples:
    freres export bundle.pt --to hf -o prompt.safetensors: Ids, positions and encoder outputs for generate of transformers.
    freres export bundle.pt --to vllm -o video.safetensors: The video's part of the prompt, for the plug-in of vLLM.
    freres export bundle.pt --to safetensors -o tokens.safetensors: The visual tokens alone, for code of your own.
  output: >-
    The path of the file. freres-serving(7) has its content, and the code that reads it.
  schemas: {freres.export/1: bundle target output output_bytes visual_tokens tensors (shapes by name) notes environment}
  defaults: {adapter: "the bundled model's own, none for others", model: the bundle's, revision: the bundle's}
presets:
  examples:
    freres presets: List the presets.
    freres presets qwen2-vl-7b > mine.yaml: Start a preset of your own; use it with --preset mine.yaml.
  output: A table of presets; with NAME, that preset as YAML.
  schemas: {freres.presets/1: presets, freres.preset/1 with NAME: name settings}
models:
  examples: {freres models: List model families and checkpoints.}
  output: >-
    A table: tokens per frame, key-value cache and bundle size per token, size of all weights, and whether the real weights
    have been run.
  schemas: {freres.models/1: families bundled checkpoints environment}
methods:
  examples:
    freres methods: List the compression methods.
    freres methods --all: Also published systems that are not here, and why.
    freres methods --json: The same as one document.
  output: >-
    A table of methods, then a line for each with what it keeps and how it differs from its source. With `--all`, the same
    for published systems that `--method` does not take, because what they need cannot be had or is not written: why, and
    what it would take.
  schemas:
    freres.methods/1:
      methods (name summary source training needs is_question_blind streams has_budget has_quality makes_bundles
      mixes deviations num_full_layers origin) faults
      unavailable (name source reason needs), with --all
doctor:
  examples: {freres doctor: Check this machine.}
  output: "A line for each part: ok, limited or missing, and what that means."
  schemas: {freres.doctor/1: findings environment}
verify:
  examples:
    freres verify: The bundled model.
    freres verify Qwen/Qwen2-VL-2B-Instruct: A hub model, on the device and in the precision that freres ask would choose.
    freres verify my-model --dtype float32 --json: The sharpest test, as one document.
  output: >-
    A table with a line for each law: whether it holds, the largest difference, and the largest that is rounding. `pixels` and
    `latents` compare the two towers, `prompt` the token ids, `logits` every row of the prompt with every token kept,
    `answer` 16 greedy tokens, and `subset` 4 steps from some of the tokens with the stock model over all of them, where a
    mask hides the others. The tolerance is a share of the largest stock value: 1/32768 in float32, 1/128 in float16 and 1/16
    in bfloat16, whose 8 significant bits round in every layer; wrong positions are off by more in all of them. Greedy
    answers may part where the stock model's own logits are closer than the tolerance. Laws that cannot be tried say why:
    in families with linear attention, to leave tokens out is not to mask them. Positions after the video are those of
    transformers (`--text-after hf` of freres-ask(1)); penalties of the checkpoint's generation config are left out.
  schemas:
    freres.verify/1:
      model family dtype grid context_tokens laws (name what state difference tolerance reason) environment
demo:
  examples:
    freres demo: Run the whole job on a clip made on the spot.
    freres demo -o here: Keep the clip and the bundles in the folder here.
  output: >-
    Three tables: token counts, answers next to the correct ones, and cost next to that of the full-token run. The small
    model is sometimes wrong with every token as well.
  schemas: {freres.demo/1: clip bundles answers profile environment}
  defaults: {folder: "a temporary folder, removed at the end"}
world make:
  examples:
    freres world make --split test --count 500 -o test: Write the clips and questions that the shipped model is tested on.
    freres world make --level 2 --count 20 -o long: Longer clips at higher rates, for stronger models.
  output: The path of questions.jsonl.
  schemas: {freres.world_make/1: questions split seed level num_clips num_questions by_category}
world train:
  examples:
    freres world train -o my-model: Train a model from scratch; run it again to resume after a stop.
    freres world train -o better --start bundled --tower-steps 0 --steps 500: Continue from the shipped weights.
  output: The folder, to use with --model. Its name is that of the weights. Progress goes to stderr.
  schemas:
    freres.world_train/1:
      model tower_steps language_steps train_seeds start start_sha256 choices_as train_s environment
  defaults: {start: random weights}
""")
