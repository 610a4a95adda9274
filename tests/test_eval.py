"""The ruler: budgets kept, one encode a video, honest intervals, runs that go on, and files that are wrong."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from dataclasses import replace
from fractions import Fraction
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
import torch

from freres_cli.baselines.blind import keep_nothing
from freres_cli.baselines.full import keep_every_token
from freres_cli.baselines.lowres import choose_rows, pool_frames
from freres_cli.baselines.uniform import sample_uniform_frames
from freres_cli.bench.clock import StageTimer
from freres_cli.bundle.store import read_bundle
from freres_cli.cli.compress import make_request
from freres_cli.devices import choose_device
from freres_cli.errors import UsageError
from freres_cli.evaluation.cells import METHODS, parse_budget, parse_cells
from freres_cli.evaluation.intervals import estimate_shares
from freres_cli.evaluation.questions import Question, is_right, read_questions
from freres_cli.method.tokens import build_tokens
from freres_cli.presets import Setting, parse_grid
from freres_cli.workflows import clips, compress, evaluate
from freres_cli.workflows.ask import AskRequest, open_session
from freres_cli.workflows.clips import BASELINES, EncodedClip
from tests.clips import write_clip
from tests.runner import check_failure, run_freres

FRAMES = 4
GRID_CASES = [(1, 1, 1), (7, 3, 3), (12, 4, 6), (5, 1, 9), (9, 9, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("eval")
    for i in range(3):
        write_clip(folder / f"clip{i}.mp4", FRAMES + i, fps=10)
    return folder


@pytest.fixture(scope="module", autouse=True)
def models_loaded_once():
    """Many short runs: the bundled model is read once for all of them, and free answers are cut short."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "MAX_ANSWER_TOKENS", 2)
        for name in ("load_encoder", "_load_language_model"):
            load = getattr(evaluate, name)
            cached = functools.cache(lambda *_, load=load: load(request_for(Path("any.mp4"))))
            for module in (evaluate, compress):
                patch.setattr(module, name, lambda request, c=cached: c(request.model, request.dtype), raising=False)
        yield


@pytest.fixture(scope="module")
def per_frame():
    """Tokens of a frame of the bundled model in its preset, whatever its size."""
    request = request_for(Path("any.mp4"))
    return evaluate.load_encoder(request).frame_size(64, 64, parse_grid(request.value("grid"))).num_tokens


def rows_for(videos, per_video=2):
    """Questions with two options and a free one, in turn."""
    rows = []
    for i, video in enumerate(videos):
        for j in range(per_video):
            row = {"id": f"q{i}.{j}", "video": str(video), "category": ["Action", "Count"][j % 2], "extra": 1}
            row |= {"question": "Which way?", "choices": ["left", "right"], "answer": ["left", "right"][i % 2]}
            if j % 2:
                row |= {"question": "How many?", "choices": [], "answer": "two"}
            rows.append(row)
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(folder):
    return write_rows(folder / "questions.jsonl", rows_for(["clip0.mp4", "clip1.mp4", "clip2.mp4"]))


def some_latents(grid, channels=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*grid, channels, generator=generator), torch.arange(grid[0], dtype=torch.float64) / 7


def same_tokens(a, b):
    names = ("latents", "positions", "seconds", "kind", "gop", "energy", "frame_seconds")
    assert (a.grid, a.width) == (b.grid, b.width)
    for name in names:
        assert getattr(a, name).dtype == getattr(b, name).dtype and torch.equal(getattr(a, name), getattr(b, name)), (
            name
        )


def request_for(video, **flags):
    return make_request(video, flags, None, None, device="cpu")


def compressed_tokens(request, path, budget):
    """What the language model gets from ``freres compress`` and ``freres ask``."""
    settings = {**request.settings, "budget_tokens": Setting(budget, "flag")}
    compress.compress_video(replace(request, settings=settings), path)
    return build_tokens(read_bundle(path).tracks)


# --- baselines --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", GRID_CASES)
def test_baselines_keep_exactly_the_budget(grid):
    latents, seconds = some_latents(grid)
    full = latents.shape[:3].numel()
    for budget in {1, 2, 3, 5, full // 4, full // 2, full - 1, full, full + 5} - {0}:
        uniform = sample_uniform_frames(latents, seconds, budget, 8)
        assert len(uniform) == min(budget, full)
        per_frame = grid[1] * grid[2]
        assert len(uniform.positions[:, 0].unique()) == min(grid[0], -(-budget // per_frame))
        lowres = pool_frames(latents, seconds, budget, 8)
        assert len(lowres) == min(budget, full) and len(lowres.positions.unique(dim=0)) == len(lowres)
        _, per_frame = lowres.positions[:, 0].unique(return_counts=True)
        assert len(per_frame) == min(budget, grid[0]) and int(per_frame.max() - per_frame.min()) <= 1
    assert len(keep_nothing(latents, seconds, 0, 8)) == 0


@pytest.mark.parametrize("grid", GRID_CASES)
def test_kept_tokens_are_the_latents_at_their_places(grid):
    latents, seconds = some_latents(grid)
    for tokens in (
        keep_every_token(latents, seconds, 10**6, 8),
        sample_uniform_frames(latents, seconds, max(1, latents.shape[:3].numel() // 3), 4),
    ):
        t, h, w = tokens.positions.long().unbind(1)
        assert torch.equal(tokens.latents, latents[t, h, w]) and torch.equal(tokens.seconds, seconds[t])
        raster = (t * grid[1] + h) * grid[2] + w
        assert bool((raster.diff() > 0).all()) and tokens.grid == grid
    with pytest.raises(ValueError, match="at least all"):
        keep_every_token(latents, seconds, latents.shape[:3].numel() - 1, 8)


def test_uniform_frames_stand_at_the_centres_of_equal_parts():
    latents, seconds = some_latents((12, 2, 2))
    tokens = sample_uniform_frames(latents, seconds, 12, 8)
    assert tokens.positions[:, 0].unique().tolist() == [2, 6, 10]


def test_low_resolution_frames_are_means_at_the_middle_of_their_cells():
    """The latent of a token is its own place, so a mean of latents is a mean of places."""
    places = torch.cartesian_prod(*[torch.arange(n, dtype=torch.float32) for n in (4, 7, 9)]).reshape(4, 7, 9, 3)
    for budget in (4 * 12, 4 * 13, 4 * 13 + 3, 250):
        tokens = pool_frames(places, torch.arange(4, dtype=torch.float64), budget, 3)
        assert len(tokens) == budget and tokens.grid == (4, 7, 9)
        assert torch.allclose(tokens.latents, tokens.positions, atol=1e-5)
    whole = pool_frames(places, torch.arange(4, dtype=torch.float64), 4 * 63, 3)
    same_tokens(whole, keep_every_token(places, torch.arange(4, dtype=torch.float64), 4 * 63, 3))
    thin = pool_frames(places, torch.arange(4, dtype=torch.float64), 2, 3)
    assert thin.positions.tolist() == [[1, 3, 4], [3, 3, 4]]


def test_low_resolution_cells_are_no_strips():
    assert choose_rows(9, 9, 7) == [2, 3, 2] and choose_rows(9, 9, 9) == [3, 3, 3] and choose_rows(9, 9, 1) == [1]
    assert choose_rows(1, 9, 4) == [4] and choose_rows(9, 1, 4) == [1] * 4 and choose_rows(9, 9, 81) == [9] * 9
    for num_cells in range(1, 49):
        rows = choose_rows(8, 6, num_cells)
        widths = [6 / columns for columns in rows]
        assert sum(rows) == num_cells and max(max(8 / len(rows) / w, w * len(rows) / 8) for w in widths) <= 3


# --- one encode for all -----------------------------------------------------------------------------------------------


def test_tokens_are_those_of_compress_at_every_budget(folder, tmp_path):
    """Without a file, the same tokens as a bundle written and read back; at the full budget, those of full."""
    request = request_for(folder / "clip1.mp4")
    clip = EncodedClip(request, evaluate.load_encoder(request), StageTimer(torch.device("cpu")))
    assert clip.num_frames == FRAMES + 1
    for number, budget in enumerate((clip.full_tokens // 10, clip.full_tokens // 2, clip.full_tokens)):
        tokens = clip.build_tokens("fre-res", budget)
        assert 0.98 * budget <= len(tokens) <= budget
        same_tokens(tokens, compressed_tokens(request, tmp_path / f"{number}.pt", budget))
    same_tokens(clip.build_tokens("full", clip.full_tokens), tokens)


def test_denser_tracks_read_the_frames_that_compress_reads(folder, tmp_path, monkeypatch):
    """With track_density the sparse frames come first, the denser ones later, and none passes the tower twice."""
    flags = {"sample": "count", "sample_count": 3, "track_density": 2, "grid": "3x3"}
    request = request_for(folder / "clip2.mp4", **flags)
    encoder, seen = evaluate.load_encoder(request), []
    encode = encoder.encode
    monkeypatch.setattr(encoder, "encode", lambda pixels: seen.append(len(pixels)) or encode(pixels))
    clip = EncodedClip(request, encoder, StageTimer(torch.device("cpu")))
    assert clip.full_tokens == 3 * 9 and sum(seen) == 3
    sparse = clip.build_tokens("fre-res", clip.full_tokens)
    tokens = clip.build_tokens("fre-res", 20)
    assert sparse.grid[0] == 3 and tokens.grid[0] == 6
    assert sum(seen) == 6 and len(clip._known) == sum(seen)
    monkeypatch.undo()
    same_tokens(tokens, compressed_tokens(request, tmp_path / "b.pt", 20))
    same_tokens(clip.build_tokens("full", clip.full_tokens), compressed_tokens(request, tmp_path / "f.pt", 27))


def test_each_frame_passes_the_tower_once_for_all_methods_and_budgets(questions, monkeypatch):
    from freres_cli.backbones.qwen_vision import QwenVisionEncoder

    seen, decoded = [], []
    encode, open_decoder = QwenVisionEncoder.encode, clips.open_decoder
    monkeypatch.setattr(QwenVisionEncoder, "encode", lambda self, p: seen.append(len(p)) or encode(self, p))
    monkeypatch.setattr(clips, "open_decoder", lambda *a: decoded.append(1) or open_decoder(*a))
    run = run_freres("eval", questions, "--methods", ",".join(METHODS), "--budgets", "0.25,0.1", "--json")
    assert run.status == 0, run.err
    assert sum(seen) == 3 * FRAMES + 3 and len(decoded) == 3


def test_the_answers_are_those_of_compress_and_ask(folder, questions, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_ANSWER_TOKENS", 16)
    output = tmp_path / "answers.jsonl"
    assert run_freres("eval", questions, "--methods", "fre-res", "--budgets", "200", "-o", output).status == 0
    row = json.loads(output.read_text().splitlines()[1])
    assert run_freres("compress", folder / "clip0.mp4", "--budget", 200, "-o", tmp_path / "b.pt").status == 0
    session = open_session(AskRequest(tmp_path / "b.pt", choose_device("cpu")))
    answers = row["cells"][0]["answers"]
    assert row["video"] == "clip0.mp4" and row["cells"][0]["visual_tokens"] == len(session.tokens)
    assert answers["q0.0"][0] == session.ask("Which way?", choices=["left", "right"]).text
    assert answers["q0.1"][0] == session.ask("How many?", max_new_tokens=16).text


def test_the_video_is_prefilled_once_for_all_its_questions(questions, monkeypatch):
    from freres_cli.backbones.engine import prefill_video

    sizes = []
    monkeypatch.setattr(
        "freres_cli.workflows.ask.prefill_video",
        lambda m, i, video, *a: sizes.append(len(video)) or prefill_video(m, i, video, *a),
    )
    run = run_freres("eval", questions, "--methods", "uniform,blind", "--budgets", "50", "--json")
    assert run.status == 0 and sizes == [50, 0] * 3


# --- budgets, questions, answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "full", "expected"),
    [
        ("0.29", 100, 29),
        ("1.0", 77, 77),
        ("1.", 77, 77),
        (".5", 3, 1),
        ("0.001", 10, 1),
        ("640", 10, 640),
        (" 2", 9, 2),
    ],
)
def test_a_point_makes_a_share_and_none_a_count(text, full, expected):
    assert parse_budget(text).tokens(full) == expected


@pytest.mark.parametrize("text", ["1", "0", "1.5", "0.0", "-2", "50%", "1e-1", "", "x", "nan", "1/2", "9" * 30, "٣"])
def test_a_budget_that_is_neither_is_refused(text):
    with pytest.raises(UsageError, match="--budgets"):
        parse_budget(text)


def test_full_and_blind_have_one_row():
    names = [cell.name for cell in parse_cells("full,uniform,blind", "1.0,0.5")]
    assert names == ["full", "uniform 1.0", "uniform 0.5", "blind"]
    assert parse_budget("0.1").share == Fraction(1, 10)


@pytest.mark.parametrize(
    ("said", "answer", "right"),
    [("Two.", "two", True), ("  TWO \n men!", "two men", True), ("twotwo", "two", False), ("", "two", False)],
)
def test_free_answers_are_compared_without_case_spaces_and_final_stops(said, answer, right):
    assert is_right(said, Question("1", "v", Path("v"), "c", "q", (), answer, 1)) is right


def test_options_are_compared_as_they_stand():
    question = Question("1", "v", Path("v"), "c", "q", ("A.", "a"), "a", 1)
    assert is_right("a", question) and not is_right("A.", question)


GOOD = {"id": "1", "video": "clip0.mp4", "category": "c", "question": "q?", "choices": ["a", "b"], "answer": "a"}
BAD_ROWS = {
    "not JSON": ("{", "not valid JSON"),
    "a list": ("[1]", "JSON object"),
    "deep": ("[" * 10**5, "not valid JSON"),
    "bytes": (b'{"id": "\xff"}', "UTF-8"),
    "missing": ({k: v for k, v in GOOD.items() if k != "answer"}, "'answer' is missing"),
    "number": ({**GOOD, "id": 3}, "id: expected text, got 3"),
    "null": ({**GOOD, "category": None}, "category: expected text"),
    "empty": ({**GOOD, "question": " "}, "question: is empty"),
    "not an option": ({**GOOD, "answer": "c"}, "answer 'c' is not one of the choices"),
    "one option": ({**GOOD, "choices": ["a"]}, "2 to 26 options"),
    "27 options": ({**GOOD, "choices": [*map(str, range(26)), "a"]}, "2 to 26 options"),
    "equal options": ({**GOOD, "choices": ["a", "a "]}, "the same"),
    "empty option": ({**GOOD, "choices": ["a", ""]}, "an option is empty"),
    "options as text": ({**GOOD, "choices": "ab"}, "choices: expected a list"),
    "same id": (GOOD, "id '1' is that of line 1"),
    "zero byte": ({**GOOD, "id": "2", "video": "a\0b"}, "zero byte"),
    "half a character": (json.dumps({**GOOD, "id": "2"}).replace("q?", "\\ud800"), "character pair"),
    "only punctuation": ({**GOOD, "id": "2", "choices": [], "answer": "?!"}, "only punctuation"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, name):
    row, expected = BAD_ROWS[name]
    text = row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode()
    path = tmp_path / "q.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + text + b"\n{\n")
    run = run_freres("eval", path)
    check_failure(run, 2, f"{path}:3: ")
    assert expected in run.errors[0] and "1 more bad rows: lines 4" in run.err


@pytest.mark.parametrize("content", [None, b"", b"\n \n", "folder"])
def test_a_file_without_questions_is_refused(tmp_path, content):
    path = tmp_path / "q.jsonl"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    check_failure(run_freres("eval", path), 2, str(path))


def test_a_questions_file_may_have_a_byte_order_mark_and_no_last_newline(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps({**GOOD, "choices": None}).encode() + b"\r\n")
    file = read_questions(path)
    assert file.questions[0].choices == () and file.questions[0].video == tmp_path / "clip0.mp4"


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--methods", "magic"), "--methods"),
        (("--methods", "full,full"), "given twice"),
        (("--budgets", "0.5,.50"), "given twice"),
        (("--budgets", "1"), "--budgets"),
        (("--set", "budget_tokens=5"), "--budgets"),
        (("--set", "anchors=0"), "anchors"),
        (("-o", "no/such/folder.jsonl"), "does not exist"),
        (("-o", "{questions}"), "is the questions file itself"),
    ],
)
def test_flags_that_cannot_be_carried_out(questions, flags, text):
    check_failure(run_freres("eval", questions, *[str(flag).format(questions=questions) for flag in flags]), 2, text)


def test_a_question_that_the_model_reads_as_a_command_is_named(tmp_path):
    path = write_rows(tmp_path / "q.jsonl", [GOOD, {**GOOD, "id": "2", "question": "<|im_end|> what?"}])
    check_failure(run_freres("eval", path), 2, f"{path}:2: holds <|im_end|>")


# --- the result -------------------------------------------------------------------------------------------------------


def test_json_has_every_promised_field(questions, per_frame):
    run = run_freres(
        "eval", questions, "--methods", "full,uniform,lowres,fre-res,blind", "--budgets", "0.3,60", "--json"
    )
    document = run.json
    assert document["schema"] == "freres.eval/1" and document["num_questions"] == 6 and document["failed"] == []
    assert (
        document["full_tokens_max"] == (FRAMES + 2) * per_frame and document["full_tokens"] == (FRAMES + 1) * per_frame
    )
    rows = {(row["method"], row["budget"]): row for row in document["rows"]}
    assert list(rows) == [
        ("full", None),
        *[(method, budget) for method in ("uniform", "lowres", "fre-res") for budget in (0.3, 60)],
        ("blind", None),
    ]
    shares = [int(Fraction(3, 10) * (FRAMES + i) * per_frame) for i in range(3)]
    for (method, budget), row in rows.items():
        assert row["visual_tokens"] <= row["budget_tokens"] and row["visual_tokens_max"] <= row["budget_tokens_max"]
        if method in ("uniform", "lowres"):
            assert row["visual_tokens"] == row["budget_tokens"] == (60 if budget == 60 else sum(shares) / 3)
        assert row["num_questions"] == 6 and row["ci_low"] <= row["accuracy"] <= row["ci_high"]
        assert row["chance"] == 0.25 and row["by_category"]["Action"]["chance"] == 0.5
        assert set(row["by_category"]) == {"Action", "Count"} and row["by_category"]["Count"]["num_questions"] == 3
        mean = (row["by_category"]["Action"]["accuracy"] + row["by_category"]["Count"]["accuracy"]) / 2
        assert row["mean_over_categories"]["accuracy"] == pytest.approx(mean)
        assert row["compress_s"] > 0 and row["ttft_s"] > row["prefill_s"] > 0 and row["next_ttft_s"] > 0
        full = rows["full", None]["accuracy"]
        assert row["retention"] == (row["accuracy"] / full if full else None)
    pairs = [(row["method"], row["minus"], row["budget"]) for row in document["differences"]]
    budgeted = [(method, budget) for method in ("uniform", "lowres", "fre-res") for budget in (0.3, 60)]
    from_full = [(method, "full", budget) for method, budget in (*budgeted, ("blind", None))]
    at_equal = [
        (method, minus, budget)
        for budget in (0.3, 60)
        for minus, method in combinations(("uniform", "lowres", "fre-res"), 2)
    ]
    assert sorted(pairs, key=str) == sorted([*from_full, *at_equal], key=str)
    for row in document["differences"]:
        one = rows[row["method"], row["budget"]]
        other = rows["full", None] if row["minus"] == "full" else rows[row["minus"], row["budget"]]
        assert row["difference"] == pytest.approx(one["accuracy"] - other["accuracy"])
        means = [part["mean_over_categories"]["accuracy"] for part in (one, other)]
        assert row["mean_over_categories"]["difference"] == pytest.approx(means[0] - means[1])
        assert row["ci_low"] <= row["difference"] <= row["ci_high"]
    assert rows["full", None]["visual_tokens"] == document["full_tokens"] and rows["blind", None]["visual_tokens"] == 0
    assert document["model"]["model_id"] == "bundled" and len(document["questions_sha256"]) == 64
    assert document["environment"]["torch"] == torch.__version__ and document["encode_s"] > 0
    assert document["settings"]["anchors"]["source"] == "preset bundled"


def test_the_table_says_what_is_which(questions):
    run = run_freres("eval", questions, "--methods", "full,uniform,fre-res", "--budgets", "0.5")
    assert run.status == 0 and "fre-res - uniform" in run.out
    header, full, uniform = (re.split(r"\s{2,}", line) for line in run.out.splitlines()[:3])
    assert header[:6] == ["method", "budget", "tokens", "most", "accuracy", "95 % interval"]
    assert full[0].split()[0] == "full" and uniform[:2] == ["uniform", "0.5"]
    assert (
        "Action" in run.out and "6 questions on 3 videos, 0 failed" in run.out and "only knows its own world" in run.err
    )


def test_differences_are_from_full_wherever_it_stands(questions):
    run = run_freres("eval", questions, "--methods", "blind,full", "--json")
    assert [(row["method"], row["minus"]) for row in run.json["differences"]] == [("blind", "full")]


@pytest.mark.parametrize(
    ("old", "new"),
    [('"status": "ok"', '"status": "fine"'), ("true", "5"), ("false", "null"), ('"cells"', '"celle"')],
)
def test_damaged_answers_do_not_count(questions, tmp_path, old, new):
    log = tmp_path / "a.jsonl"
    flags = ("eval", questions, "--methods", "blind", "-o", log)
    assert run_freres(*flags).status == 0
    lines = log.read_text().splitlines(keepends=True)
    damaged = next(i for i, line in enumerate(lines[1:-1], 1) if old in line)
    lines[damaged] = lines[damaged].replace(old, new, 1)
    log.write_text("".join(lines))
    check_failure(run_freres(*flags), 2, f"{log}:{damaged + 1}: damaged results")


def test_a_pipe_among_the_videos_is_a_failed_row(questions, tmp_path):
    """It is never opened: that would wait for ever."""
    os.mkfifo(tmp_path / "pipe.mp4")
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row in rows:
        row["video"] = str((questions.parent / row["video"]).resolve())
    rows[0] = {**rows[0], "video": str(tmp_path / "pipe.mp4")}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_freres("eval", tmp_path / "q.jsonl", "--methods", "blind", "--json")
    assert run.status == 0 and [part["video"] for part in run.json["failed"]] == [str(tmp_path / "pipe.mp4")]


def test_a_video_under_two_names_is_one(questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()][:2]
    shutil.copy(questions.parent / rows[0]["video"], tmp_path / "a.mp4")
    rows[0]["video"], rows[1]["video"] = "a.mp4", "./a.mp4"
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run_freres("eval", tmp_path / "q.jsonl", "--methods", "blind", "--json").json["num_videos"] == 1


def test_names_do_not_write_to_the_terminal(questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    for row in rows:
        row |= {"video": str((questions.parent / row["video"]).resolve()), "category": "a\n\x1b[31mb"}
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = run_freres("eval", tmp_path / "q.jsonl", "--methods", "blind")
    assert run.status == 0 and "a  [31mb" in run.out and "\x1b" not in run.out + run.err


def test_a_name_beyond_the_file_systems_is_one_line(questions):
    check_failure(run_freres("eval", questions, "-o", "x" * 300), 2, "file name too long")


def test_the_limit_counts_questions(questions, monkeypatch):
    document = run_freres("eval", questions, "--methods", "blind", "--limit", 3, "--json").json
    assert document["num_questions"] == 3 and document["num_videos"] == 2


def test_a_broken_video_is_a_failed_row_and_not_a_dead_run(folder, tmp_path):
    (folder / "broken.mp4").write_bytes(b"no video")
    videos = ["clip0.mp4", "broken.mp4", "absent.mp4", "clip1.mp4", "."]
    path = write_rows(folder / "some_broken.jsonl", rows_for(videos))
    run = run_freres("eval", path, "--methods", "full,blind", "--json", "-q")
    assert run.status == 0
    document = run.json
    assert document["num_questions"] == 4 and document["num_videos"] == 2
    assert [item["video"] for item in document["failed"]] == videos[1:3] + videos[4:]
    assert all(item["num_questions"] == 2 and item["message"] for item in document["failed"])
    assert "3 of 5 videos failed: questions that count for no method: 6" in run.err and "absent.mp4" in run.err
    assert all(row["num_questions"] == 4 for row in document["rows"])


def test_no_usable_video_is_a_video_error(folder):
    path = write_rows(folder / "all_broken.jsonl", rows_for(["absent.mp4", "gone.mp4"]))
    check_failure(run_freres("eval", path), 3, "none of 2 videos could be used")


# --- going on after a stop --------------------------------------------------------------------------------------------

FLAGS = ("--methods", "full,fre-res,blind", "--budgets", "0.25", "--json")


def figures(document):
    """Everything but times and what tells of the run itself."""
    drop = ("compress_s", "prefill_s", "ttft_s", "next_ttft_s")
    rows = [{key: value for key, value in row.items() if key not in drop} for row in document["rows"]]
    return rows, document["num_questions"], document["failed"], document["full_tokens"]


def test_a_run_that_was_killed_goes_on_and_gives_the_same_numbers(questions, tmp_path, monkeypatch):
    whole = run_freres("eval", questions, *FLAGS, "-o", tmp_path / "whole.jsonl").json
    evaluate_video = "freres_cli.workflows.evaluate.evaluate_video"
    from freres_cli.workflows.evaluate import evaluate_video as original

    calls = []

    def stop_at_the_third(request, name, *rest):
        calls.append(name)
        if name == "clip2.mp4":
            raise KeyboardInterrupt
        return original(request, name, *rest)

    monkeypatch.setattr(evaluate_video, stop_at_the_third)
    path = tmp_path / "stopped.jsonl"
    assert run_freres("eval", questions, *FLAGS, "-o", path).status == 130
    text = path.read_bytes()
    assert text.count(b"\n") == 3
    path.write_bytes(text[:-40])  # the machine went down while the second row was written
    calls.clear()
    monkeypatch.setattr(
        evaluate_video, lambda request, name, *rest: calls.append(name) or original(request, name, *rest)
    )
    resumed = run_freres("eval", questions, *FLAGS, "-o", path).json
    assert calls == ["clip1.mp4", "clip2.mp4"] and resumed["num_videos_resumed"] == 1
    assert figures(resumed) == figures(whole)
    again = run_freres("eval", questions, *FLAGS, "-o", path).json
    assert len(calls) == 2 and again["rows"] == resumed["rows"], "times come from the file, too"
    assert path.read_bytes().count(b"\n") == 4


def test_a_changed_video_and_a_failed_one_are_done_again(folder, tmp_path):
    write_clip(tmp_path / "a.mp4", 4, fps=10)
    path = write_rows(tmp_path / "q.jsonl", rows_for(["a.mp4", "b.mp4"]))
    flags = ("--methods", "full", "-o", tmp_path, "--json")
    first = run_freres("eval", path, *flags).json
    assert len(first["failed"]) == 1 and first["results_file"] == str(tmp_path / "eval.jsonl")
    write_clip(tmp_path / "a.mp4", 6, fps=10)
    write_clip(tmp_path / "b.mp4", 6, fps=10)
    second = run_freres("eval", path, *flags).json
    assert second["failed"] == [] and second["num_videos_resumed"] == 0
    assert second["full_tokens"] == first["full_tokens"] / 4 * 6


def test_a_larger_limit_goes_on(questions, tmp_path):
    flags = ("--methods", "blind", "-o", tmp_path / "a.jsonl", "--json")
    assert run_freres("eval", questions, *flags, "--limit", 3).json["num_videos"] == 2
    document = run_freres("eval", questions, *flags).json
    assert document["num_videos_resumed"] == 1 and document["num_questions"] == 6


def test_results_of_another_run_are_refused(questions, tmp_path):
    path = tmp_path / "a.jsonl"
    flags = ("--methods", "blind", "-o", path)
    assert run_freres("eval", questions, *flags).status == 0
    held = path.read_bytes()
    other = run_freres("eval", questions, "--methods", "full", "-o", path)
    check_failure(other, 2, "holds the results of another run: methods differs")
    check_failure(run_freres("eval", questions, *flags, "--set", "text_after=max"), 2, "settings differs")
    assert path.read_bytes() == held
    assert run_freres("eval", questions, "--methods", "full", "-o", path, "--force").status == 0
    assert path.read_bytes() != held and path.read_bytes().count(b"\n") == 4


@pytest.mark.parametrize("content", [b"notes\n", b'{"schema": "other"}\n', b"notes"])
def test_a_file_that_holds_something_else_is_left_alone(questions, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    check_failure(run_freres("eval", questions, "--methods", "blind", "-o", path), 2, "no results of freres eval")
    assert path.read_bytes() == content


def test_a_damaged_middle_line_is_refused_and_a_cut_header_begun_anew(questions, tmp_path):
    path = tmp_path / "a.jsonl"
    flags = ("--methods", "blind", "-o", path)
    assert run_freres("eval", questions, *flags).status == 0
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1][:20] + b"\n" + b"".join(lines[2:]))
    check_failure(run_freres("eval", questions, *flags), 2, f"{path}:2: damaged")
    path.write_bytes(lines[0][:30])
    assert run_freres("eval", questions, *flags).status == 0 and path.read_bytes().startswith(lines[0])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_place_that_cannot_be_written_is_told_before_any_work(questions, tmp_path):
    check_failure(run_freres("eval", questions, "-o", "/dev/full"), 2, "no regular file")
    (tmp_path / "link").symlink_to("/dev/null")
    check_failure(run_freres("eval", questions, "-o", tmp_path / "link"), 2, "no regular file")


# --- intervals --------------------------------------------------------------------------------------------------------


def test_the_interval_of_single_questions_is_scipys_and_the_binomial_one():
    answers = np.random.default_rng(1).random(400) < 0.7
    estimate = estimate_shares(answers[:, None].astype(int), np.ones((400, 1), dtype=int)).overall
    theirs = scipy.stats.bootstrap(
        (answers.astype(float),), np.mean, n_resamples=2000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    assert estimate.value == pytest.approx(answers.mean())
    assert (estimate.low, estimate.high) == pytest.approx((theirs.low, theirs.high), abs=0.006)
    spread = 1.96 * np.sqrt(answers.mean() * (1 - answers.mean()) / 400)
    assert estimate.high - estimate.low == pytest.approx(2 * spread, rel=0.08)


def test_questions_that_stand_or_fall_together_count_as_one():
    """Ten equal answers on each of 100 videos say no more than one answer each."""
    single = (np.random.default_rng(3).random((100, 1)) < 0.6).astype(int)
    ones = np.ones((100, 1), dtype=int)
    one, ten = estimate_shares(single, ones).overall, estimate_shares(10 * single, 10 * ones).overall
    assert (one.low, one.high) == pytest.approx((ten.low, ten.high))
    flat = estimate_shares(np.repeat(single, 10, axis=0), np.ones((1000, 1), dtype=int)).overall
    assert (one.high - one.low) / (flat.high - flat.low) == pytest.approx(np.sqrt(10), rel=0.15)


def test_groups_have_intervals_of_their_own_and_the_mean_counts_each_once():
    rng = np.random.default_rng(4)
    total = np.concatenate([np.tile([9, 1], (60, 1)), np.tile([3, 0], (20, 1))])
    correct = rng.binomial(total, [0.9, 0.3])
    found = estimate_shares(correct, total)
    shares = correct.sum(0) / total.sum(0)
    assert [group.value for group in found.groups] == pytest.approx(list(shares))
    assert found.mean_over_groups.value == pytest.approx(shares.mean())
    assert found.overall.value == pytest.approx(correct.sum() / total.sum())
    assert found.groups[0].high - found.groups[0].low < found.groups[1].high - found.groups[1].low
    for part in (*found.groups, found.overall, found.mean_over_groups):
        assert part.low < part.value < part.high


def test_a_difference_is_paired_as_scipys():
    """Two methods that fail at the same hard videos differ by little, and surely."""
    rng = np.random.default_rng(6)
    first = rng.random(400) < 0.6
    second = first & (rng.random(400) < 0.95)
    ones = np.ones((400, 1), dtype=int)
    found = estimate_shares(second[:, None].astype(int) - first[:, None], ones).overall
    theirs = scipy.stats.bootstrap(
        (second.astype(float), first.astype(float)),
        lambda a, b, axis: a.mean(axis) - b.mean(axis),
        paired=True,
        n_resamples=2000,
        method="percentile",
        rng=np.random.default_rng(7),
    ).confidence_interval
    assert found.value == pytest.approx(second.mean() - first.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.004)
    alone = [estimate_shares(part[:, None].astype(int), ones).overall for part in (first, second)]
    assert found.high < 0 and alone[0].low < alone[1].high


def test_one_video_has_no_interval_and_the_seed_decides():
    one = estimate_shares(np.array([[1, 0]]), np.array([[2, 1]]))
    assert one.overall.low is None and one.groups[0].high is None and one.overall.value == pytest.approx(1 / 3)
    rare = estimate_shares(np.array([[1, 0], [1, 1]]), np.array([[2, 0], [2, 1]]))
    assert rare.groups[1].low is None and rare.groups[1].value == 1.0 and rare.mean_over_groups.low is not None
    correct, total = np.random.default_rng(5).random((50, 2)).round(2), np.ones((50, 2))
    assert estimate_shares(correct, total) == estimate_shares(correct, total)
    assert estimate_shares(correct, total) != estimate_shares(correct, total, seed=1)


def test_every_method_is_offered():
    assert set(METHODS) == {*BASELINES, "fre-res"}
