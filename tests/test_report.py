"""``freres report``: one file that needs nothing else, says what the bundle says, and runs nothing that a bundle says."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from freres_cli.bundle.store import write_bundle
from freres_cli.page.elements import tag, text
from freres_cli.page.style import COLOURS, SERIES
from freres_cli.workflows.report import MAX_PIECES
from freres_cli.world.bundled_model import bundled_adapter
from tests.clips import write_clip
from tests.forged_bundles import make_tracks, manifest_for, smooth_latents
from tests.pipeline_fixtures import bundle as bundle
from tests.pipeline_fixtures import clip as clip
from tests.runner import check_failure, run_freres

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>' &amp;\u202e\x1b[31m"


class Page(HTMLParser):
    """A page as a browser reads it: its elements with their attributes, its text, and whether every element is closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text("utf-8")
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(self.source)
        self.close()

    def handle_starttag(self, name, attributes):
        self.elements.append((name, dict(attributes)))
        if name not in ("meta", "img"):
            self.open.append(name)

    def handle_startendtag(self, name, attributes):
        self.elements.append((name, dict(attributes)))

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, name):
        return [attributes for own, attributes in self.elements if own == name]


def make_page(bundle, folder, *flags) -> Page:
    output = folder / "page.html"
    run = run_freres("report", bundle, "-o", output, "--force", *flags)
    assert run.status == 0, run.err
    assert run.out == f"{output}\n"
    return Page(output)


def write_tracks(path, num_frames=40, side=8, budget=300, anchors=4, **sections):
    tracks = make_tracks(smooth_latents(num_frames, side), budget, anchors)
    manifest = manifest_for(tracks)
    for name, changes in sections.items():
        manifest[name] = {**manifest[name], **changes}
    write_bundle(path, tracks, manifest)
    return path


@pytest.fixture(scope="module")
def bundles(clip, tmp_path_factory):
    """A bundle of each kind, of the same clip."""
    folder, made = tmp_path_factory.mktemp("kinds"), {}
    for method in ("fre-res", "adaptive", "evs", "lowres", "tome"):
        made[method] = folder / f"{method}.pt"
        flags = ("--method", method, "--frames", 12, "--grid", "6x6")
        assert run_freres("compress", clip, *flags, "--budget", 60, "-o", made[method]).status == 0
    return made


# What is on it


def test_a_page_has_every_section_and_the_figures_of_inspect(bundle, clip, tmp_path):
    page = make_page(bundle, tmp_path, "--video", clip)
    report = run_freres("inspect", bundle, "--json").json
    for key, setting in report["settings"].items():
        assert key in page.text and setting["source"] in page.text
    assert report["source"]["sha256"] in page.text
    for name in ("spectrum", "null_spectrum"):
        assert all(f"{100 * share:.1f} %" in page.text for share in report["energy"][name])
    for gop in report["gops"]:
        assert f"{100 * gop['energy_kept']:.1f} % of its pooled residual energy kept" in page.text
    events = sum(gop["start"] == "event" for gop in report["gops"])
    assert f"{events} event" in page.text and f"{len(report['gops'])} GoPs" in page.text
    assert "Absorber maps:" not in page.text and "gamma" in page.text
    links = [link["href"] for link in page.all("a")]
    identifiers = {attributes.get("id") for _, attributes in page.elements}
    assert len(links) == 11 and all(link[1:] in identifiers for link in links)


@pytest.mark.parametrize("method", ["fre-res", "adaptive", "evs", "lowres", "tome"])
def test_what_a_kind_of_bundle_cannot_show_is_said(bundles, method, tmp_path):
    page = make_page(bundles[method], tmp_path)
    lost = "Energy lost:" in page.text
    assert lost == (method != "fre-res")
    assert ("so there is no spectrum" in page.text) == lost
    assert (f"method {method} has no absorber" in page.text) == lost
    assert ("cannot be cut" in page.text) == (method in ("evs", "lowres", "tome"))
    assert ("does not name" in page.text) == (method in ("lowres", "tome"))
    assert ("does not name" in run_freres("inspect", bundles[method]).out) == (method in ("lowres", "tome"))
    assert ("it has no GoPs, so no anchor frames are marked" in page.text) == lost
    assert "There are no thumbnails" in page.text
    for section in re.findall(r"<section.*?</section>", page.source, re.S):
        assert len(re.sub(r"<h2>.*?</h2>|<[^>]+>", "", section).strip()) > 20, "no section is left blank"


def test_a_bundle_without_anchor_tokens_says_so_and_the_summary_says_which_part_was_read(clip, tmp_path):
    flags = ("--method", "fre-res", "--variant", "temporal", "--frames", 12, "--grid", "6x6", "--budget", 60)
    run = run_freres("compress", clip, *flags, "--start", 0.5, "-o", tmp_path / "part.pt")
    assert run.status == 0, run.err
    page = make_page(tmp_path / "part.pt", tmp_path)
    assert "it holds no anchor tokens" in page.text and "has no anchor frames" not in page.text
    assert "12 read (count) from 0.53 to 2.00 s" in page.text


def test_thumbnails_are_the_first_frames_of_the_parts(bundle, clip, tmp_path):
    run = run_freres("report", bundle, "-o", tmp_path / "p.html", "--video", clip, "--json").json
    page = Page(tmp_path / "p.html")
    shown = [image["src"] for image in page.all("img") if image.get("class") == "thumb"]
    assert len(shown) == run["num_thumbnails"] == len(set(shown)) and run["schema"] == "freres.report/1"
    assert f"{len(shown)} thumbnails" in page.text and (tmp_path / "p.html").stat().st_size == run["report_bytes"]


def test_another_video_is_noted(bundle, tmp_path):
    other = write_clip(tmp_path / "other.mp4", 8)
    run = run_freres("report", bundle, "-o", tmp_path / "p.html", "--video", other)
    assert "not the file that was compressed" in run.err
    page = Page(tmp_path / "p.html")
    assert "other.mp4: not the file" in page.text and str(tmp_path) not in page.source


@pytest.mark.parametrize("method", ["adaptive", "evs"])
def test_an_adapter_that_a_bundle_has_no_use_for_is_refused(bundles, method, tmp_path):
    """Also one that is not there. That none is wanted may be said of every bundle."""
    output = tmp_path / "page.html"
    for named in (tmp_path / "none.safetensors", bundled_adapter()):
        run = run_freres("report", bundles[method], "-o", output, "--adapter", named)
        check_failure(run, 2, f"--adapter {named}: method {method} has no absorber")
        assert not output.exists()
    make_page(bundles[method], tmp_path, "--adapter", "none")


def test_a_named_adapter_must_be_shown(tmp_path):
    """Variant sparse-idct has no absorber."""
    path = write_tracks(tmp_path / "b.pt", settings={"variant": {"value": "sparse-idct", "source": "flag"}})
    assert "has no absorber" in make_page(path, tmp_path).text
    run = run_freres("report", path, "-o", tmp_path / "p.html", "--adapter", bundled_adapter())
    check_failure(run, 4, "variant sparse-idct has no absorber")
    assert not (tmp_path / "p.html").exists()


def test_quality_over_budget_is_that_of_cut_bundles(bundles, tmp_path):
    for method in ("fre-res", "adaptive"):
        page = make_page(bundles[method], tmp_path)
        rows = re.search(r"<caption>Quality over budget</caption>(.*?)</table>", page.source, re.S)[1]
        points = re.findall(r'<th scope="row">(\d+)</th><td>([\d.]+) %</td>', rows)
        assert len(points) > 2
        for budget, share in points[1:-1:2]:
            small = tmp_path / "small.pt"
            assert run_freres("repack", bundles[method], "--budget", budget, "-o", small, "--force").status == 0
            report = run_freres("inspect", small, "--json").json
            kept = report["energy"]["clip_kept"] if method == "fre-res" else report["quality"]
            assert 100 * kept == pytest.approx(float(share), abs=0.06)


def test_of_many_gops_the_worst_and_the_largest_are_shown(tmp_path):
    """Of a minute at 30 frames a second, on a page that is still small."""
    path = write_tracks(tmp_path / "long.pt", 1800, 12, 6000, 60)
    page = make_page(path, tmp_path)
    gops = run_freres("inspect", path, "--json").json["gops"]
    cards = [image["alt"] for image in page.all("img") if image.get("class") == "map"]
    assert (
        len(cards) == MAX_PIECES < len(gops) and f"{MAX_PIECES} of {len(gops)} GoPs: those that kept least" in page.text
    )
    kept = [gop["energy_kept"] for gop in gops]
    counts = [sum(gop["tokens_by_kind"].values()) for gop in gops]
    for gop in (gops[kept.index(min(kept))], gops[counts.index(max(counts))]):
        assert any(f"of {gop['start_s']:.2f} to" in alt for alt in cards)
    assert len(page.source) < 1_000_000


# What it needs


def test_nothing_is_loaded_and_nothing_runs(bundle, clip, tmp_path):
    page = make_page(bundle, tmp_path, "--video", clip)
    names = {name for name, _ in page.elements}
    assert not names & {"script", "link", "iframe", "object", "embed", "form", "base", "video", "audio"}
    for name, attributes in page.elements:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href", "srcset", "action", "poster", "xlink:href"):
            value = attributes.get(key)
            assert value is None or value.startswith(("data:image/", "#")), value
    assert "url(" not in page.source and "@import" not in page.source
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv"))
    assert "default-src 'none'" in policy and "script" not in policy
    assert not page.open


def test_hostile_text_is_text(clip, tmp_path):
    folder = tmp_path / "hostile"
    folder.mkdir()
    path = write_tracks(
        folder / "<img src=x onerror=alert(3)>.pt",
        source={"file": HOSTILE, "codec": HOSTILE, "notes": [HOSTILE]},
        sampling={"notes": [HOSTILE, "</style></title><script>alert(4)</script>"]},
        model={"model_id": HOSTILE, "revision": HOSTILE},
    )
    page = make_page(path, tmp_path, "--adapter", "none")
    plain = make_page(write_tracks(folder / "plain.pt"), tmp_path, "--adapter", "none")
    assert "alert(1)" in page.text and "alert(4)" in page.text, "it is shown"
    extra = {"note": 3}
    count = {name: len(page.all(name)) for name, _ in [*page.elements, *plain.elements]}
    expected = {name: len(plain.all(name)) for name in count}
    expected["tr"] += extra["note"]
    expected["th"] += extra["note"]
    expected["td"] += extra["note"]
    assert count == expected, "no element more"
    assert "\u202e" not in page.source and "\x1b" not in page.source


def test_only_markup_of_ours_is_not_escaped():
    assert text("<b>&\"'") == "&lt;b&gt;&amp;&quot;&#x27;"
    assert tag("p", "<b>", tag("i", "&"), title='"x" onclick="y') == (
        '<p title="&quot;x&quot; onclick=&quot;y">&lt;b&gt;<i>&amp;</i></p>'
    )
    assert text("a\ud800b\x00c") == "a?b\ufffdc"


def test_figures_have_text_and_tables_have_heads(bundle, clip, tmp_path):
    page = make_page(bundle, tmp_path, "--video", clip)
    pictures = [svg for svg in page.all("svg") if svg.get("role") == "img"]
    assert len(pictures) >= 5 and all(len(svg["aria-label"]) > 20 for svg in pictures)
    assert all(svg.get("aria-hidden") for svg in page.all("svg") if svg not in pictures)
    assert all(len(image["alt"]) > 5 for image in page.all("img"))
    assert all(head["scope"] in ("col", "row") for head in page.all("th"))
    assert page.source.count("<caption>") == len(page.all("table")) >= 6
    scrolls = [div for div in page.all("div") if div.get("class") == "wide"]
    assert all(div["tabindex"] == "0" and div["aria-label"] for div in scrolls), "by keyboard too"


# Colours


def luminance(colour):
    parts = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    parts = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return parts, 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def contrast(a, b):
    low, high = sorted((luminance(a)[1], luminance(b)[1]))
    return (high + 0.05) / (low + 0.05)


# Machado, Oliveira and Fernandes (2009): how linear RGB looks without one kind of cone.
SIGHT = {
    "every cone": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "no red": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "no green": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "no blue": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}
TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def lab(colour, sight):
    """CIELAB of a colour as seen."""
    seen = (torch.tensor(SIGHT[sight], dtype=torch.float32) @ torch.tensor(luminance(colour)[0])).clamp(0, 1)
    xyz = torch.tensor(TO_XYZ) @ seen / torch.tensor([0.95047, 1.0, 1.08883])
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=1e-9) ** (1 / 3), 7.787 * xyz + 16 / 116).tolist()
    return torch.tensor([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_colours_can_be_told_apart_and_read(place):
    named = {name: pair[place] for name, pair in COLOURS.items()}
    for behind in ("paper", "card"):
        assert all(contrast(named[name], named[behind]) >= 4.5 for name in ("ink", "faint", "link"))
    series = [pair[place] for pair in SERIES.values()]
    assert all(contrast(colour, named["paper"]) >= 3 for colour in series)
    for sight, (a, b) in itertools.product(SIGHT, itertools.combinations(series, 2)):
        assert float((lab(a, sight) - lab(b, sight)).norm()) > 20, (sight, a, b)


# The file


def test_a_page_is_not_overwritten_and_never_the_bundle(bundle, clip, tmp_path):
    page = tmp_path / "page.html"
    page.write_text("mine")
    check_failure(run_freres("report", bundle, "-o", page), 2, "already exists")
    assert page.read_text() == "mine"
    for name, source in (("bundle", bundle), ("video", clip)):
        copied = tmp_path / source.name
        shutil.copy(source, copied)
        flags = (copied,) if name == "bundle" else (bundle, "--video", copied)
        check_failure(run_freres("report", *flags, "-o", copied, "--force"), 2, f"is the {name} itself")
        assert copied.read_bytes() == source.read_bytes()
    check_failure(run_freres("report", tmp_path / "none.pt", "-o", tmp_path / "x.html"), 4)
    check_failure(run_freres("report", bundle, "-o", tmp_path / "x.html", "--video", tmp_path / "none.mp4"), 3)
    assert not (tmp_path / "x.html").exists()


def test_the_same_bundle_gives_the_same_page(bundle, tmp_path):
    assert make_page(bundle, tmp_path).source == make_page(bundle, tmp_path).source


# A real browser


def find_browser():
    names = ("chromium", "chromium-browser", "google-chrome", "chrome", "chromium-headless-shell")
    return next((path for name in names if (path := shutil.which(name))), None)


def photograph(page, picture, width, height, dark=False):
    """A picture of the page in a headless Chromium that has no network: (height, width, 3)."""
    import av

    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--proxy-server=127.0.0.1:9"]
    flags += [f"--user-data-dir={picture.parent / 'profile'}", f"--window-size={width},{height}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else []
    command = [find_browser(), *flags, f"--screenshot={picture}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with av.open(str(picture)) as file:
        return next(file.decode(video=0)).to_ndarray(format="rgb24")


@pytest.mark.slow
@pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome on PATH")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_browser_shows_the_page(bundle, clip, tmp_path, dark):
    make_page(bundle, tmp_path, "--video", clip)
    pixels = photograph(tmp_path / "page.html", tmp_path / "p.png", 1000, 4600, dark)
    place = int(dark)
    paper = [int(COLOURS["paper"][place][at : at + 2], 16) for at in (1, 3, 5)]
    assert pixels[5, 5].tolist() == paper
    seen = {bytes(pixel).hex() for pixel in pixels.reshape(-1, 3)}
    for name, pair in SERIES.items():
        assert pair[place][1:] in seen, f"{name} is drawn"
    # A red square and a green circle: the thumbnails of the clip.
    red = (pixels[..., 0] > 150) & (pixels[..., 1] < 90) & (pixels[..., 2] < 90)
    assert red.sum() > 200
    narrow = photograph(tmp_path / "page.html", tmp_path / "n.png", 500, 1500, dark)
    assert (narrow[:, -6:] == paper).mean() > 0.9, "nothing is cut off at the right"


def test_a_page_that_says_why_there_are_no_maps_names_no_folder(tmp_path):
    """The adapter that ships has fewer bands than these settings allow."""
    write_clip(tmp_path / "clip.mp4", 24)
    settings = ("max_coefficients=12", "anchors=1", "events=false", "tau=1")
    flags = [part for setting in settings for part in ("--set", setting)]
    run_freres(
        "compress", tmp_path / "clip.mp4", "--method", "fre-res", "--budget", 100, *flags, "-o", tmp_path / "b.pt"
    )
    assert run_freres("report", tmp_path / "b.pt", "-o", tmp_path / "page.html").status == 0
    page = (tmp_path / "page.html").read_text()
    assert "adapter bands: expected at least 12" in page and str(bundled_adapter().parent) not in page
