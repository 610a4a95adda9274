"""How bundles pass through vLLM's processors and its connector, with parts that stand in for vLLM's own.

``test_vllm.py`` has the real engine.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from freres_cli.integrations import vllm_bundles
from freres_cli.integrations.vllm_bundles import BundleReader, make_payload, split_payload
from freres_cli.world.bundled_model import bundled_model_dir
from tests.pipeline_fixtures import bundle, clip
from tests.runner import fails, run_freres
from tests.vllm_stand_in import VLLMValidationError, data_url, stand_in

__all__ = ["bundle", "clip"]


@pytest.fixture(autouse=True)
def vllm(monkeypatch):
    stand_in(monkeypatch)


@pytest.fixture(scope="module")
def files(bundle, tmp_path_factory):
    """The bytes of three bundles of one clip, at three budgets."""
    folder = tmp_path_factory.mktemp("files")
    for budget in (200, 250):
        run = run_freres("repack", bundle, "--budget", budget, "-o", folder / f"{budget}.pt")
        assert run.status == 0, run.err
    return [bundle.read_bytes(), *((folder / f"{budget}.pt").read_bytes() for budget in (250, 200))]


@pytest.fixture
def placed(monkeypatch):
    """The number of visual tokens of every bundle that was read anew, in order."""
    found, place = [], vllm_bundles.place_bundle

    def counting(*arguments):
        made = place(*arguments)
        found.append(len(made.video.latents))
        return made

    monkeypatch.setattr(vllm_bundles, "place_bundle", counting)
    return found


def read_all(reader, files):
    return [len(reader.read(content).video.latents) for content in files]


def test_bundles_read_last_are_kept_up_to_a_number_of_bytes(files, placed, monkeypatch):
    reader = BundleReader(str(bundled_model_dir()))
    own = read_all(reader, files)
    assert own == placed and len(set(own)) == 3
    assert read_all(reader, files) == own and len(placed) == 3, "all of them fit"
    sizes = [vllm_bundles._count_bytes(reader.read(content).video) for content in files]
    assert min(sizes) > 200 * 192 * 4
    # Two fit. The one read longest ago goes, however often it was read before.
    monkeypatch.setattr(vllm_bundles, "KEPT_BYTES", sum(sizes[:2]))
    reader, start = BundleReader(str(bundled_model_dir())), len(placed)
    read_all(reader, [files[0], files[1], files[0], files[2], files[0], files[1]])
    assert placed[start:] == [own[place] for place in (0, 1, 2, 1)]
    # None fits: the newest is kept all the same.
    monkeypatch.setattr(vllm_bundles, "KEPT_BYTES", 1)
    reader, start = BundleReader(str(bundled_model_dir())), len(placed)
    assert read_all(reader, [files[0], files[0], files[1], files[0]]) == [own[0], own[0], own[1], own[0]]
    assert placed[start:] == [own[0], own[1], own[0]]


def make_info(dtype=torch.float32, revision=None):
    """What vLLM asks about bundles, for the bundled model as a server names it."""
    from freres_cli.integrations.vllm_processing import BundleInfo

    info = BundleInfo()
    config = SimpleNamespace(model=str(bundled_model_dir()), revision=revision, dtype=dtype)
    info.ctx = SimpleNamespace(model_config=config, get_mm_config=lambda: None)
    return info


def test_latents_have_the_served_dtype_whatever_the_bundles_have(files):
    """vLLM joins the items of a batch in the dtype of the first, so that an answer would depend on who else asks."""
    from freres_cli.integrations.vllm_processing import LATENTS

    whole, halved = (make_info(dtype).read_bundles(make_payload(files[0])) for dtype in (torch.float32, torch.bfloat16))
    assert whole.data[LATENTS].dtype == torch.float32
    assert torch.equal(halved.data[LATENTS], whole.data[LATENTS].bfloat16())


def test_a_folder_that_vllm_made_of_a_hub_id_keeps_no_revision(files):
    """Offline, vLLM names the folder of the revision that was asked for, and still the revision."""
    assert make_info(revision="0a1b2c3").read_bundles(make_payload(files[0])).bundles


def test_bundles_with_too_many_positions_together_are_a_bad_request(files, monkeypatch):
    info, bundles = make_info(), [make_payload(files[0])] * 2
    (own,) = info.read_bundles(bundles[0]).bundles
    end = int(own.video.next_position)
    monkeypatch.setattr(vllm_bundles, "MOST_POSITIONS", 2 * end)
    assert len(info.read_bundles(bundles).bundles) == 2
    monkeypatch.setattr(vllm_bundles, "MOST_POSITIONS", 2 * end - 1)
    with pytest.raises(VLLMValidationError, match=f"expected at most {2 * end - 1} positions in all, got {2 * end}"):
        info.read_bundles(bundles)


def test_an_object_of_vllms_own_embeddings_is_a_bad_request(files, tmp_path):
    """vLLM fetches what stands under each of its keys, and then asks for the number of dimensions."""
    from freres_cli.integrations.vllm_connector import BundleConnector

    with pytest.raises(VLLMValidationError, match="expected one URL or base64 text with a bundle, got an object"):
        _ = BundleConnector(tmp_path).fetch_video_embedding(data_url(files[0])).ndim


@pytest.mark.parametrize("kept_bytes", [1, 2**32])
def test_bundles_never_answer_for_each_other(files, kept_bytes, monkeypatch):
    """Neither where they are kept, nor by the name that they have in vLLM's caches, alone or together in a prompt."""
    from freres_cli.integrations.vllm_processing import LATENTS

    monkeypatch.setattr(vllm_bundles, "KEPT_BYTES", kept_bytes)
    info = make_info()
    alone = [info.read_bundles(make_payload(content)) for content in files]
    names = [items.get_item_for_hash(0) for items in alone]
    assert len(set(names)) == 3
    payloads = [make_payload(content) for content in files]
    together = info.read_bundles({key: torch.cat([one[key] for one in payloads]) for key in payloads[0]})
    assert [together.get_item_for_hash(place) for place in range(3)] == names
    assert torch.equal(together.data[LATENTS], torch.cat([items.data[LATENTS] for items in alone]))
    again = [info.read_bundles(payload) for payload in reversed(payloads)]
    assert [items.get_item_for_hash(0) for items in again] == names[::-1]
    for items, first in zip(again, alone[::-1], strict=True):
        assert torch.equal(items.data[LATENTS], first.data[LATENTS])


def test_a_bundle_comes_by_path_or_with_its_content(files, tmp_path):
    from freres_cli.integrations.vllm_connector import BundleConnector

    connector, path = BundleConnector(tmp_path), tmp_path / "b.pt"
    path.write_bytes(files[0])
    url = data_url(files[0])
    for given in (f"file://{path}", url, url.partition(",")[2]):
        assert split_payload(connector.fetch_video_embedding(given)) == [files[0]]


def test_what_holds_no_bundle_is_a_bad_request(tmp_path):
    from freres_cli.integrations.vllm_connector import BundleConnector

    connector = BundleConnector(tmp_path)
    (tmp_path / "empty.pt").touch()
    for given, told in (
        (f"file://{tmp_path}/empty.pt", "empty.pt: is empty: expected a bundle"),
        (data_url(b""), "video_embeds: is empty: expected a bundle"),
        ("", "video_embeds: is empty: expected a bundle"),
        ("!!", "video_embeds: expected a file:// or data: URL, or base64"),
        (f"file://{tmp_path}/none.pt", "none.pt: cannot be read"),
        ("file:///elsewhere/b.pt", "video_embeds: must be a subpath"),
    ):
        with pytest.raises(VLLMValidationError) as caught:
            connector.fetch_video_embedding(given)
        assert told in str(caught.value)
    with fails(4, "bundle: is empty"):
        make_payload(b"")
