"""What `examine` makes of folders and networks that are not as they should be."""

import json

import pytest
from benchmark_files import png, write
from generation_files import benchmark, image_folder
from tiny_networks import inception, with_networks

from unifork.cluster import run_jobs
from unifork.config import Network
from unifork.errors import ConfigError, DataError, IdentityError
from unifork.evaluation.answers import read_answers
from unifork.evaluation.examining import CANARY, Examiner, absent_networks, examine_job, load_networks
from unifork.evaluation.generation.layout import checked_images
from unifork.evaluation.names import ABSENT


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "00001/samples/0002.png").unlink(), r"1 prompts lack images: 00001 \(1\)"),
        (lambda folder: (folder / "00001/samples/0009.png").write_bytes(png()), r"1 files belong to no prompt: .*0009"),
        (lambda folder: (folder / "notes.txt").write_text("x"), r"1 files belong to no prompt: notes\.txt"),
        (lambda folder: (folder / "00001/samples/2.jpg").write_bytes(png()), r"1 files belong to no prompt"),
        (lambda folder: (folder / "00000/samples/0001.png").write_bytes(png()[:50]), r"1 images cannot be used: 00000"),
        (lambda folder: (folder / "00000/samples/0001.png").write_bytes(b"GIF"), r"no image of a known format"),
        (lambda folder: (folder / "00000/samples/0001.png").write_bytes(png(side=9)), r"differ: 8x8 \(23\), 9x9 \(1\)"),
    ],
    ids=["missing", "too many", "foreign", "twice", "truncated", "no image", "another size"],
)  # fmt: skip
def test_folders_that_are_not_whole_are_refused_before_any_network_runs(damage, problem, tmp_path):
    card, items = benchmark("geneval", tmp_path / "files")
    card = card.model_copy(update={"networks": {"detector": Network(kind="no:Such", path=str(tmp_path))}})
    image_folder(items, tmp_path / "images")
    write(tmp_path / "images" / "00000" / "metadata.jsonl", "{}")
    damage(tmp_path / "images")
    with pytest.raises(DataError, match=problem):
        examine_job(card, items, tmp_path / "images", tmp_path / "out")


def test_no_link_leads_out_of_a_folder_of_images(tmp_path):
    card, items = benchmark("geneval", tmp_path / "files")
    image_folder(items, tmp_path / "images")
    write(tmp_path / "secret.png", png())
    (tmp_path / "images" / "00000/samples/0001.png").unlink()
    (tmp_path / "images" / "00000/samples/0001.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(DataError, match=r"1 images cannot be used: 00000/samples/0001\.png: .*leaves"):
        checked_images(card, items, tmp_path / "images")


def test_grids_need_two_by_two_square_tiles(tmp_path):
    card, items = benchmark("dpg", tmp_path / "files")
    image_folder(items, tmp_path / "images", side=8)
    write(tmp_path / "images" / "30.png", png(side=17))
    with pytest.raises(DataError, match=r"30\.png: 17x17 is no grid of 2 x 2 square images"):
        checked_images(card, items, tmp_path / "images")


def test_references_may_have_unequal_sizes_and_answers_not(tmp_path):
    card, items = benchmark("mjhq", tmp_path / "files")
    image_folder(items, tmp_path / "images")
    write(tmp_path / "images" / f"{items[0].about['file']}.png", png(side=20))
    assert len(checked_images(card, items, tmp_path / "images", equal=False)) == len(items)
    with pytest.raises(DataError, match=r"sizes differ: 8x8 \(5\), 20x20 \(1\)"):
        checked_images(card, items, tmp_path / "images")


@pytest.mark.parametrize("protocols", [("pytorch-fid",), ("clean-fid",), ("pytorch-fid", "clean-fid")], ids="+".join)
def test_unequal_sizes_are_refused_for_pytorch_fid_and_scaled_by_clean_fid(tmp_path, protocols):
    card, items = benchmark("mjhq", tmp_path / "files")
    networks = {}
    for name in protocols:
        inception(tmp_path / name)
        networks[name] = Network(kind=name, path=str(tmp_path / name))
    card = card.model_copy(update={"networks": networks})
    load_networks(card, "cpu", trusted=True)
    image_folder(items, tmp_path / "images")
    write(tmp_path / "images" / f"{items[0].about['file']}.png", png(side=20))
    if "pytorch-fid" in protocols:
        with pytest.raises(DataError, match=r"sizes differ: 8x8 \(5\), 20x20 \(1\)"):
            examine_job(card, items, tmp_path / "images", tmp_path / "out")
        return
    job, worker = examine_job(card, items, tmp_path / "images", tmp_path / "out")
    run_jobs([job], Examiner, *worker, "cpu")
    assert len(read_answers(tmp_path / "out")) == len(items)


def test_networks_that_are_not_there_are_named_with_what_to_put_where(tmp_path):
    card, items = benchmark("geneval", tmp_path / "files")
    message = absent_networks(card)
    assert "put config.json and model.safetensors of facebook/mask2former-swin-small-coco-instance" in message
    assert "into networks/mask2former-swin-small-coco-instance; the network colors: put config.json, " in message
    job, _ = examine_job(card, items, tmp_path / "images", tmp_path / "out")
    assert job.tasks == []
    assert job.lineage[ABSENT] == message
    with pytest.raises(DataError, match=r"put config\.json"):
        load_networks(card, "cpu")
    hashed = card.networks["detector"].model_copy(update={"sha256": {"model.safetensors": "ab12", "config.json": ""}})
    wanted = absent_networks(card.model_copy(update={"networks": {"detector": hashed}}))
    assert wanted.endswith("into networks/mask2former-swin-small-coco-instance, model.safetensors with sha256 ab12")
    dpg, _ = benchmark("dpg", tmp_path / "dpg")
    assert absent_networks(dpg).startswith("the network answerer: put config.json ")
    dpg = dpg.model_copy(update={"networks": {}})
    assert "no network is named in `networks`: give kind MODULE:OBJECT" in absent_networks(dpg)
    pope = card.model_copy(update={"items": card.items.model_copy(update={"suite": "pope", "options": {}})})
    with pytest.raises(ConfigError, match="nothing is to be examined"):
        examine_job(pope, items, tmp_path / "images", tmp_path / "out")


def test_files_of_another_hash_are_refused(tmp_path):
    card, _ = benchmark("dpg", tmp_path / "files")
    card = with_networks(card, tmp_path / "networks")
    wrong = card.networks["answerer"].model_copy(update={"sha256": {"vocab.txt": "6726825d"}})
    with pytest.raises(DataError, match=r"vocab\.txt: sha256 is [0-9a-f]{64}, the card dpg wants 6726825d"):
        load_networks(card.model_copy(update={"networks": {"answerer": wrong}}), "cpu")


def test_a_network_with_other_outputs_than_its_canary_is_refused(tmp_path):
    card, _ = benchmark("mjhq", tmp_path / "files")
    card = with_networks(card, tmp_path / "networks")
    path = tmp_path / "networks" / "clean-fid" / CANARY
    with pytest.raises(DataError, match=rf"{CANARY}: not there; .*`unifork answers canary mjhq`"):
        load_networks(card, "cpu")
    load_networks(card, "cpu", trusted=True)
    before = load_networks(card, "cpu")
    plain = json.loads(path.read_text())
    path.write_text(json.dumps(plain | {"outputs": [1.001 * value for value in plain["outputs"]]}))
    assert load_networks(card, "cpu")["clean-fid"].hash == before["clean-fid"].hash
    path.write_text(json.dumps(plain | {"outputs": [1.05 * value for value in plain["outputs"]]}))
    with pytest.raises(IdentityError, match=r"differ by 4\.76%, allowed are 2%"):
        load_networks(card, "cpu")
    path.write_text(json.dumps(plain | {"outputs": plain["outputs"][1:]}))
    with pytest.raises(IdentityError, match="differ by inf"):
        load_networks(card, "cpu")


def test_examining_goes_on_where_it_was_and_notices_another_image(tmp_path):
    card, items = benchmark("dpg", tmp_path / "files")
    card = with_networks(card, tmp_path / "networks")
    load_networks(card, "cpu", trusted=True)
    image_folder(items, tmp_path / "images")
    job, worker = examine_job(card, items, tmp_path / "images", tmp_path / "out")
    run_jobs([job], Examiner, *worker, "cpu")
    job, _ = examine_job(card, items, tmp_path / "images", tmp_path / "out")
    assert job.missing() == []
    write(tmp_path / "images" / "30.png", png("red", 16))
    job, _ = examine_job(card, items, tmp_path / "images", tmp_path / "out")
    assert len(job.missing()) == 1
